"""What is legal in a study file and still likely a mistake; `hpo check` says so, nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import optuna

from hpo.search import pruners
from hpo.spec import space
from hpo.spec.curve import Direction
from hpo.spec.space import Choices, Range
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Stopping

LR_SPREAD = 10.0  # a learning rate searched over more than a factor of this belongs on a log scale


def lint(spec: StudySpec) -> list[str]:
    """Return one line for each likely mistake in a resolved spec; of a user's own objective only the pruner is known."""
    return [line for rule in ([idle_pruner] if spec.objective else RULES) for line in rule(spec)]


def linear_learning_rate(spec: StudySpec) -> Iterator[str]:
    """A learning rate acts by its order of magnitude; drawn linearly, nearly every trial gets a large one."""
    for path, found in space.parameters(spec.tree):
        if not (path.endswith(".lr") and isinstance(found, Range)) or found.log or found.step is not None:
            continue
        if found.low <= 0 or found.high / found.low > LR_SPREAD:
            yield f"{path} = {found}: searched on a linear scale; add log = true"


def long_schedule(spec: StudySpec) -> Iterator[str]:
    """A schedule longer than the training never reaches its end."""
    training = spec.tree["training"]
    length, epochs = training.get("schedule_epochs"), training["epochs"]
    if length is None:
        return
    if max(space.ends_of(length)) > min(space.ends_of(epochs)):
        yield f"training.schedule_epochs = {length}: the schedule is longer than training.epochs = {epochs}; shorten it"


def idle_plateau(spec: StudySpec) -> Iterator[str]:
    """A plateau whose patience outlasts the training never lowers the rate."""
    schedule, epochs = spec.tree["schedule"], spec.tree["training"]["epochs"]
    patience = schedule.get("plateau", schedule).get("patience")
    if "plateau" not in space.ends_of(schedule["name"]) or patience is None:
        return
    # The first epoch sets the lowest loss, patience + 1 more do not undercut it, and one is to have the lower rate.
    if min(space.ends_of(patience)) + 3 > max(space.ends_of(epochs)):
        yield f"schedule plateau: patience = {patience} outlasts training.epochs = {epochs}; shorten it"


def idle_pruner(spec: StudySpec) -> Iterator[str]:
    """A pruner that cannot act within the epochs and trials of the study."""
    name = spec.pruner["name"]
    if name == "none":
        return
    startup = spec.pruner.get("n_startup_trials", 0)
    if startup >= spec.budget.trials:
        budget = spec.budget.trials
        yield f"pruner.n_startup_trials = {startup}: prunes only after so many complete trials, the budget is {budget}"
        return
    # Of an objective of the user's own only Hyperband says how long it is.
    epochs = spec.pruner.get("max_resource") if spec.objective else max(space.ends_of(spec.tree["training"]["epochs"]))
    last = None if epochs is None else int(epochs) - 1  # the last epoch is not pruned
    if last is not None and not _can_prune(pruners.plain(spec), last, spec.direction or "minimize"):
        yield f"pruner {name}: cannot prune anything within the first {last} of {epochs} epochs; lower its warm-up or rungs"


def _can_prune(pruner: optuna.pruners.BasePruner, epochs: int, direction: Direction) -> bool:
    """Try the pruner itself: may it end a hopeless trial beside good ones at some epoch?"""
    sign = 1.0 if direction == "maximize" else -1.0
    with _quiet():
        study = optuna.create_study(direction=direction, pruner=pruner, study_name="lint")
        for _ in range(20):
            good = study.ask()
            for epoch in range(1, epochs + 1):
                good.report(sign * epoch, epoch)
                good.should_prune()
            study.tell(good, sign * epochs)
        for _ in range(12):  # Hyperband puts trials into brackets, the first of which may never prune
            bad = study.ask()
            for epoch in range(1, epochs + 1):
                bad.report(-sign * 1e9, epoch)
                if bad.should_prune():
                    return True
            study.tell(bad, state=optuna.trial.TrialState.FAIL)
    return False


class _quiet:
    """Keep Optuna's log still for a while."""

    def __enter__(self) -> None:
        self.level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def __exit__(self, *error: object) -> None:
        optuna.logging.set_verbosity(self.level)


def owned_momentum(spec: StudySpec) -> Iterator[str]:
    """A schedule that may cycle the momentum leaves the optimizer's own to chance."""
    for path, found in space.parameters({"schedule": spec.tree["schedule"]}):
        if path.endswith("cycle_momentum"):
            yield f"{path} = {found}: some trials' momentum is the schedule's, some the optimizer's default; pin it"


HELPERS = {  # options of [augment] that only say how others act
    "fill": ("crop", "resized_crop", "rotation", "translation", "scale", "shear", "trivial_augment"),
    "resized_crop_ratio": ("resized_crop",),
    "erasing_area": ("erasing",),
    "mix_probability": ("mixup", "cutmix"),
}


def idle_augmentation(spec: StudySpec) -> Iterator[str]:
    """An option that says how others act, where there are no others; a searched one is found out by training."""
    given = spec.tree.get("augment", {})
    for name, others in HELPERS.items():
        if name not in given or isinstance(given[name], Range | Choices):
            continue
        if not any(any(space.ends_of(given.get(other, 0))) for other in others):
            yield f"augment.{name} = {json.dumps(given[name])}: does nothing without {', '.join(others)}; remove it"


OF_THE_MODEL: dict[
    str, tuple[str, tuple[Any, ...]]
] = {  # option of [model] -> another one, and its values that ask for it
    "keep": ("weights", ()),  # (): any but "none"
    "unfreeze_every": ("freeze", ()),
    "pretrain_steps": ("pretrain", ()),
    "pretrain_lr": ("pretrain", ()),
    "norm_momentum": ("norm", ("batch",)),
    "groups": ("norm", ("group",)),
    "init_std": ("init", ("uniform", "normal")),
    "negative_slope": ("activation", ("leaky_relu", "prelu")),
    "lower": ("activation", ("rrelu",)),
    "upper": ("activation", ("rrelu",)),
    "alpha": ("activation", ("elu",)),
    "beta": ("activation", ("swish", "softplus")),
    "learn_beta": ("activation", ("swish",)),
    "stochastic_depth": ("residual", (True,)),
}
NOTHING = {None, "none", 0}
WITH_RESIDUAL = ("mlp", "cnn")  # other models are residual by themselves, or cannot be


def idle_model_option(spec: StudySpec) -> Iterator[str]:
    """An option of a model of ours that no other one asks for; a searched one is found out by training."""
    part = spec.tree["model"]
    tables = {"model": part} | {f"model.{name}": branch for name, branch in space.branches(part).items()}
    for path, table in tables.items():
        names = [path.partition(".")[2]] if "." in path else space.ends_of(part["name"])
        for key in [key for key in OF_THE_MODEL if key in table and not isinstance(table[key], Range | Choices)]:
            other, asking = OF_THE_MODEL[key]
            if any(":" in name or (other == "residual" and name not in WITH_RESIDUAL) for name in names):
                continue
            said = {value for one in tables.values() for value in space.ends_of(one.get(other))}
            if not (said & set(asking) if asking else said - NOTHING):
                mend = " or ".join(map(json.dumps, asking)) if asking else "..."
                yield f"{path}.{key} = {json.dumps(table[key])}: does nothing without {other} = {mend}; add that or remove this"


def idle_stopping(spec: StudySpec) -> Iterator[str]:
    """A rule of stopping that cannot act before the last epoch."""
    table, epochs = spec.tree.get("stopping", {}), max(space.ends_of(spec.tree["training"]["epochs"]))
    least = {key: min(space.ends_of(value)) for key, value in table.items() if key != "monitor"}
    strip = least.get("strip", Stopping().strip)
    earliest = {  # epochs after which it may stop a trial
        "patience": 1 + least.get("patience", 0),
        "up": strip * (1 + least.get("up", 0)),
        "pq": strip,
        "min_epochs": least.get("min_epochs", 0),
    }
    for key, first in earliest.items():
        if key in table and first >= epochs:
            yield f"stopping.{key} = {table[key]}: stops nothing before epoch {first} of {epochs}; lower it"


def two_patiences(spec: StudySpec) -> Iterator[str]:
    """Patience as a pruner and as a rule of the trial's own: the shorter one decides whether a trial is PRUNED or COMPLETE."""
    own, pruner = spec.tree.get("stopping", {}).get("patience"), spec.pruner.get("patience")
    if own is not None and pruner is not None:
        yield (
            f"pruner.patience = {pruner} and stopping.patience = {own}: one and the same rule, by which trials end as pruned "
            "or as complete; keep one of the two"
        )


def equal_costs(spec: StudySpec) -> Iterator[str]:
    """Where the model is the same in every trial, all cost the same, and there is nothing to weigh against the curve."""
    if spec.goals.costs and not any(path.startswith("model.") for path, _ in space.parameters(spec.tree)):
        yield f"{', '.join(spec.goals.costs)}: nothing of [model] is searched, so every trial costs the same; search its size"


def normalised_selu(spec: StudySpec) -> Iterator[str]:
    """SELU keeps activations normal by itself (Klambauer et al. 2017), which a norm undoes."""
    part = spec.tree["model"]
    for path, table in [("model", part), *((f"model.{name}", branch) for name, branch in space.branches(part).items())]:
        both = part | table
        norms = [norm for norm in space.ends_of(both.get("norm", "none")) if norm != "none"]
        if "selu" in space.ends_of(table.get("activation")) and norms:
            yield (
                f"{path}.activation = selu: normalises by itself, which norm = {' or '.join(norms)} undoes; "
                'take norm = "none" and init = "lecun_normal" with it'
            )


RULES: list[Callable[[StudySpec], Iterator[str]]] = [
    linear_learning_rate,
    long_schedule,
    idle_plateau,
    idle_pruner,
    owned_momentum,
    idle_augmentation,
    idle_model_option,
    idle_stopping,
    two_patiences,
    equal_costs,
    normalised_selu,
]
