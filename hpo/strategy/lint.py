"""Warnings of `hpo check` for values of a study file that are valid but likely a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import optuna

from hpo.spec import space
from hpo.spec.curve import Direction
from hpo.spec.space import Choices, Range
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Stopping
from hpo.strategy import pruners

LR_SPREAD = 10.0  # a learning rate range with a larger ratio of its ends belongs on a log scale


def lint(spec: StudySpec) -> list[str]:
    """Return one line for each likely mistake in a resolved spec. Of a user's own training only pruner and start are checked."""
    return [line for rule in (RULES if spec.is_declared else [idle_pruner, long_start]) for line in rule(spec)]


def linear_learning_rate(spec: StudySpec) -> Iterator[str]:
    """A learning rate acts by its order of magnitude. On a linear scale nearly every trial gets a large one."""
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
    """A plateau schedule whose patience is longer than the training never lowers the learning rate."""
    schedule, epochs = spec.tree["schedule"], spec.tree["training"]["epochs"]
    patience = schedule.get("plateau", schedule).get("patience")
    if "plateau" not in space.ends_of(schedule["name"]) or patience is None:
        return
    # One epoch sets the lowest loss, patience + 1 epochs do not improve it, and one more trains at the lower rate.
    if min(space.ends_of(patience)) + 3 > max(space.ends_of(epochs)):
        yield f"schedule plateau: patience = {patience} is too long for training.epochs = {epochs}; shorten it"


def idle_pruner(spec: StudySpec) -> Iterator[str]:
    """A pruner that cannot act within the epochs and trials of the study."""
    name = spec.pruner["name"]
    if name == "none":
        return
    startup = spec.pruner.get("n_startup_trials", 0)
    if startup >= spec.budget.trials:
        budget = spec.budget.trials
        yield f"pruner.n_startup_trials = {startup}: never prunes, since the budget is {budget} trials; lower it"
        return
    # The length of a user's own objective is known from Hyperband's max_resource only.
    epochs = (
        max(space.ends_of(spec.tree["training"]["epochs"])) if spec.is_declared else spec.pruner.get("max_resource")
    )
    last = None if epochs is None else int(epochs) - 1  # the last epoch is not pruned
    if last is not None and not _can_prune(pruners.plain(spec), last, spec.direction or "minimize"):
        mend = "raise training.epochs, or shorten the warm-up" if name == "auto" else "lower its warm-up or rungs"
        yield f"pruner {name}: cannot prune any trial in the first {last} of {epochs} epochs; {mend}"


def long_start(spec: StudySpec) -> Iterator[str]:
    """Configurations beyond the budget are queued and never begun."""
    if len(spec.start) > spec.budget.trials:
        yield f"start: has {len(spec.start)} configurations, the budget is {spec.budget.trials} trials; raise budget.trials"


def _can_prune(pruner: optuna.pruners.BasePruner, epochs: int, direction: Direction) -> bool:
    """Return whether the pruner prunes a hopeless trial beside good ones at some epoch, by running it."""
    sign = 1.0 if direction == "maximize" else -1.0
    with _quiet():
        study = optuna.create_study(direction=direction, pruner=pruner, study_name="lint")
        for _ in range(20):
            good = study.ask()
            for epoch in range(1, epochs + 1):
                good.report(sign * epoch, epoch)
                good.should_prune()
            study.tell(good, sign * epochs)
        for _ in range(12):  # with Hyperband, since the trials of some brackets are never pruned
            bad = study.ask()
            for epoch in range(1, epochs + 1):
                bad.report(-sign * 1e9, epoch)
                if bad.should_prune():
                    return True
            study.tell(bad, state=optuna.trial.TrialState.FAIL)
    return False


class _quiet:
    """Silences Optuna's log within a block."""

    def __enter__(self) -> None:
        self.level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def __exit__(self, *error: object) -> None:
        optuna.logging.set_verbosity(self.level)


def owned_momentum(spec: StudySpec) -> Iterator[str]:
    """If cycle_momentum is searched, the momentum comes from the schedule in some trials and from the optimizer in others."""
    for path, found in space.parameters({"schedule": spec.tree["schedule"]}):
        if path.endswith("cycle_momentum"):
            yield (
                f"{path} = {found}: in some trials the schedule sets the momentum, in others the optimizer's default holds; "
                "write true or false"
            )


HELPERS = {  # option of [augment] -> the options that it modifies
    "fill": ("crop", "resized_crop", "rotation", "translation", "scale", "shear", "trivial_augment"),
    "resized_crop_ratio": ("resized_crop",),
    "erasing_area": ("erasing",),
    "mix_probability": ("mixup", "cutmix"),
}


def idle_augmentation(spec: StudySpec) -> Iterator[str]:
    """An option that modifies other options, none of which is used. Searched options are not checked."""
    given = spec.tree.get("augment", {})
    for name, others in HELPERS.items():
        if name not in given or isinstance(given[name], Range | Choices):
            continue
        if not any(any(space.ends_of(given.get(other, 0))) for other in others):
            yield f"augment.{name} = {json.dumps(given[name])}: has no effect without {', '.join(others)}; remove it"


OF_THE_MODEL: dict[
    str, tuple[str, tuple[Any, ...]]
] = {  # option of [model] -> the option that it depends on, and the values of that option that use it
    "keep": ("weights", ()),  # (): any value but "none"
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
WITH_RESIDUAL = ("mlp", "cnn")  # other models are always residual, or never


def idle_model_option(spec: StudySpec) -> Iterator[str]:
    """An option of a built-in model without effect, since it depends on another option. Searched options are not checked."""
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
                yield f"{path}.{key} = {json.dumps(table[key])}: has no effect without {other} = {mend}; add it or remove {key}"


def idle_stopping(spec: StudySpec) -> Iterator[str]:
    """A stopping rule that cannot apply before the last epoch."""
    table, epochs = spec.tree.get("stopping", {}), max(space.ends_of(spec.tree["training"]["epochs"]))
    least = {key: min(space.ends_of(value)) for key, value in table.items() if key != "monitor"}
    strip = least.get("strip", Stopping().strip)
    earliest = {  # the first epoch after which the rule may stop a trial
        "patience": 1 + least.get("patience", 0),
        "up": strip * (1 + least.get("up", 0)),
        "pq": strip,
        "min_epochs": least.get("min_epochs", 0),
    }
    for key, first in earliest.items():
        if key in table and first >= epochs:
            yield f"stopping.{key} = {table[key]}: stops no trial before epoch {first} of {epochs}; lower it"


def two_patiences(spec: StudySpec) -> Iterator[str]:
    """Patience both as a pruner and as a stopping rule. The shorter one decides whether a trial ends as PRUNED or COMPLETE."""
    own, pruner = spec.tree.get("stopping", {}).get("patience"), spec.pruner.get("patience")
    if own is not None and pruner is not None:
        yield (
            f"pruner.patience = {pruner} and stopping.patience = {own}: the same rule twice; the shorter one decides whether "
            "trials end as pruned or as complete; keep one of the two"
        )


def equal_costs(spec: StudySpec) -> Iterator[str]:
    """Costs as objectives or bounds while the model is the same in every trial."""
    if spec.goals.costs and not any(path.startswith("model.") for path, _ in space.parameters(spec.tree)):
        yield f"{', '.join(spec.goals.costs)}: nothing of [model] is searched, so all trials cost the same; search its size"


def normalised_selu(spec: StudySpec) -> Iterator[str]:
    """A norm together with SELU, which normalises activations by itself (Klambauer et al. 2017)."""
    part = spec.tree["model"]
    for path, table in [("model", part), *((f"model.{name}", branch) for name, branch in space.branches(part).items())]:
        both = part | table
        norms = [norm for norm in space.ends_of(both.get("norm", "none")) if norm != "none"]
        if "selu" in space.ends_of(table.get("activation")) and norms:
            yield (
                f"{path}.activation = selu: normalises by itself, and norm = {' or '.join(norms)} undoes this; "
                'use norm = "none" and init = "lecun_normal"'
            )


RULES: list[Callable[[StudySpec], Iterator[str]]] = [
    linear_learning_rate,
    long_schedule,
    idle_plateau,
    idle_pruner,
    long_start,
    owned_momentum,
    idle_augmentation,
    idle_model_option,
    idle_stopping,
    two_patiences,
    equal_costs,
    normalised_selu,
]
