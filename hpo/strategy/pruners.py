"""Pruners by name.

In a declared training a step is the number of finished epochs, from 1. A warm-up of n means that the first n epochs are never
pruned. Optuna counts steps from 0, hence the + 1 in `plain`. A user's own objective reports its own steps; there a warm-up is
Optuna's, and steps below n are never pruned.

Names and defaults are Optuna's, except the resources of Hyperband and successive halving. These are always integers here.
Optuna's "auto" takes them from the trials that one process has seen, so two workers could disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from annotated_types import Ge, Le

from hpo.errors import SpecError, nearest, shown
from hpo.spec import options
from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Tree, branches, ends_of
from hpo.spec.study_file import StudySpec
from hpo.spec.training import training_defaults
from hpo.strategy import array_pruners
from hpo.strategy.auto_pruner import AutoPruner
from hpo.strategy.pareto_pruner import Comparing, CostAwarePruner
from hpo.strategy.rungs import Ladder

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Percent = Annotated[float, Ge(0), Le(100)]
WARM_UP = "n_warmup_steps"
USUAL_RUNGS = 3  # of `auto`, where the length of trials is not known
MOST_RUNGS = 4  # of `auto`; a lower first rung says little about the end


def none() -> optuna.pruners.BasePruner:
    """Never prune."""
    return optuna.pruners.NopPruner()


def median(
    *,
    n_startup_trials: Count = 5,
    n_warmup_steps: Count = 0,
    interval_steps: Positive = 1,
    n_min_trials: Positive = 3,
) -> optuna.pruners.BasePruner:
    """Prune a trial whose best value is worse than the median of COMPLETE trials at the same epoch (Golovin et al., Google
    Vizier, 2017).

    Args:
        n_startup_trials: the number of COMPLETE trials before the first pruning.
        n_warmup_steps: the number of first epochs that are never pruned; with your own objective, the first prunable step.
        interval_steps: the number of epochs between two decisions.
        n_min_trials: the number of COMPLETE trials that must have reported at the epoch.
    """
    return array_pruners.Median(n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials)


def percentile(
    *,
    percentile: Percent = 25.0,
    n_startup_trials: Count = 5,
    n_warmup_steps: Count = 0,
    interval_steps: Positive = 1,
    n_min_trials: Positive = 3,
) -> optuna.pruners.BasePruner:
    """Prune a trial whose best value is not among the best `percentile` percent of COMPLETE trials at the same epoch.

    Args:
        percentile: the share of trials to keep, in percent.
        n_startup_trials: the number of COMPLETE trials before the first pruning.
        n_warmup_steps: the number of first epochs that are never pruned; with your own objective, the first prunable step.
        interval_steps: the number of epochs between two decisions.
        n_min_trials: the number of COMPLETE trials that must have reported at the epoch.
    """
    return array_pruners.Percentile(
        percentile, n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials
    )


def successive_halving(
    *,
    min_resource: Positive = 1,
    reduction_factor: Annotated[int, Ge(2)] = 3,
    min_early_stopping_rate: Count = 0,
) -> optuna.pruners.BasePruner:
    """Asynchronous successive halving (Li et al., ASHA, 2020). Trials are stopped at rungs and never resumed.

    Args:
        min_resource: the epochs of the first rung.
        reduction_factor: the factor of epochs from rung to rung. The best 1/factor of the trials are promoted.
        min_early_stopping_rate: the number of first rungs to skip.
    """
    return array_pruners.SuccessiveHalving(min_resource, reduction_factor, min_early_stopping_rate)


def hyperband(
    *, max_resource: Positive, min_resource: Positive = 1, reduction_factor: Annotated[int, Ge(2)] = 3
) -> optuna.pruners.BasePruner:
    """Several brackets of successive halving (Li et al., Hyperband, 2018).

    Args:
        max_resource: the epochs of a full trial; in a declared training `training.epochs` by default.
        min_resource: the epochs of the first rung.
        reduction_factor: the factor of epochs from rung to rung. The best 1/factor of the trials are promoted.
    """
    return array_pruners.Hyperband(min_resource, max_resource, reduction_factor)


def threshold(
    *,
    lower: float | None = None,
    upper: float | None = None,
    n_warmup_steps: Count = 0,
    interval_steps: Positive = 1,
) -> optuna.pruners.BasePruner:
    """Prune a trial whose value is below `lower`, above `upper` or NaN.

    Args:
        lower: the lowest allowed value.
        upper: the highest allowed value.
        n_warmup_steps: the number of first epochs that are never pruned; with your own objective, the first prunable step.
        interval_steps: the number of epochs between two decisions.
    """
    return optuna.pruners.ThresholdPruner(lower, upper, n_warmup_steps, interval_steps)


def patient(
    *,
    patience: Positive,
    min_delta: Annotated[float, Ge(0)] = 0.0,
    wrapped: Literal["none", "median", "percentile", "successive_halving"] = "none",
) -> optuna.pruners.BasePruner:
    """Prune a trial whose value has not improved for `patience` epochs, if the wrapped pruner agrees.

    Args:
        patience: the number of epochs without improvement.
        min_delta: an improvement must be larger than this.
        wrapped: the pruner that must agree; with "none" patience alone decides.
    """
    inner = None if wrapped == "none" else PRUNERS[wrapped]()
    return Patient(inner, patience, min_delta)


class Patient(array_pruners.BatchPruner):
    """Prunes trials that do not improve. Optuna's PatientPruner tests whether the value got worse, and a best value never
    does."""

    def __init__(self, wrapped: optuna.pruners.BasePruner | None, patience: int, min_delta: float) -> None:
        self.wrapped = wrapped
        self.patience = patience
        self.min_delta = min_delta

    def decide(self, study: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial]) -> list[bool]:
        """Return for each trial whether it has not improved and the wrapped pruner agrees.

        The wrapped pruner is asked only about trials that have not improved.
        """
        sign = array_pruners.sign_of(study)
        stuck = [self._is_stuck(trial, sign) for trial in trials]
        if self.wrapped is None:
            return stuck
        shown = [trial for trial, is_stuck in zip(trials, stuck, strict=True) if is_stuck]
        agreed = iter(array_pruners.ask(self.wrapped, study, shown))
        return [is_stuck and next(agreed) for is_stuck in stuck]

    def _is_stuck(self, trial: optuna.trial.FrozenTrial, sign: float) -> bool:
        """Return whether the best of the last `patience` epochs exceeds the best before them by at most min_delta."""
        values = [sign * value for _, value in sorted(trial.intermediate_values.items())]
        if len(values) <= self.patience:
            return False
        return not _best(values[-self.patience :]) > _best(values[: -self.patience]) + self.min_delta


def _best(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=-math.inf)


def auto(*, reduction_factor: Annotated[int, Ge(2)] = 3, explore: Count | None = None) -> optuna.pruners.BasePruner:
    """Successive halving that stops trials, at rungs that are shares of each trial's own schedule, such as 1/27, 1/9 and 1/3.

    Args:
        reduction_factor: the factor from rung to rung. The best 1/factor of the trials are promoted.
        explore: one trial in so many is never pruned, so that late bloomers are seen; 0 for none. By default as many as reach
            the end by merit: factor to the power of the number of rungs.
    """
    return AutoPruner(Ladder(first=1, factor=reduction_factor), explore=_explore(reduction_factor, None, explore))


def _explore(factor: int, rungs: int | None, explore: int | None) -> int:
    return int(factor ** (USUAL_RUNGS if rungs is None else rungs)) if explore is None else explore


PRUNERS: dict[str, options.Function] = {
    "none": none,
    "auto": auto,
    "median": median,
    "percentile": percentile,
    "successive_halving": successive_halving,
    "hyperband": hyperband,
    "threshold": threshold,
    "patient": patient,
}


def resolve(spec: StudySpec) -> StudySpec:
    """Return the spec with the pruner's options checked and its defaults filled in.

    Hyperband's `max_resource` is the largest number of epochs by default. Raises SpecError for wrong options.
    """
    table = dict(spec.pruner)
    if table.get("name") == "hyperband" and spec.is_declared:
        ends = ends_of((training_defaults() | spec.tree["training"])["epochs"])
        epochs = [end for end in ends if isinstance(end, int)]
        table.setdefault("max_resource", max(epochs, default=2**31))  # wrong epochs are reported as training.epochs
    name, given = named(table, "pruner", PRUNERS)
    paths = {key: f"pruner.{key}" for key in given}
    options.check("pruner", name, PRUNERS[name], 0, given, paths)
    if name == "threshold" and not {"lower", "upper"} & given.keys():
        raise SpecError("pruner: threshold needs lower or upper; add one")
    if name == "patient" and given.get("wrapped", "none") == "none" and spec.objectives:
        raise SpecError(
            'pruner.wrapped = "none": a trial without improvement may still be on the Pareto front; '
            'wrap a pruner that compares trials, such as "median"'
        )
    _check_order(given, "lower", "upper")
    _check_order({"min_resource": 1} | given, "min_resource", "max_resource")
    return spec.model_copy(update={"pruner": {"name": name} | options.defaults(PRUNERS[name], 0) | given})


def _check_order(given: dict[str, Any], lower: str, upper: str) -> None:
    if lower in given and upper in given and given[lower] > given[upper]:
        raise SpecError(f"pruner.{lower} = {given[lower]}: is above pruner.{upper} = {given[upper]}; lower it")


def named(table: dict[str, object], section: str, known: dict[str, options.Function]) -> tuple[str, dict[str, object]]:
    """Split a table into its name and its other keys; SpecError if the name is missing or unknown."""
    rest = {key: value for key, value in table.items() if key != "name"}
    name = table.get("name")
    if name is None:
        raise SpecError(f'{section}.name: missing; write name = "..."{nearest("", known)}')
    if not isinstance(name, str):
        raise SpecError(f'{section}.name: {shown(name)} is not the name of a {section}; write name = "..."')
    if name not in known:
        raise SpecError(f"{section}.name: there is no {section} {name!r}{nearest(name, known)}")
    return name, rest


def build(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Return the study's pruner. With costs or bounds on costs, it compares comparable trials only."""
    return _cost_aware(plain(spec), spec.goals) if spec.goals.costs else plain(spec)


def _cost_aware(pruner: optuna.pruners.BasePruner, goals: Goals) -> optuna.pruners.BasePruner:
    if isinstance(pruner, Patient) and pruner.wrapped is not None:
        return Patient(_cost_aware(pruner.wrapped, goals), pruner.patience, pruner.min_delta)
    return CostAwarePruner(pruner, goals) if isinstance(pruner, Comparing) else pruner


def ladder(spec: StudySpec) -> Ladder:
    """Return the rungs at which a study's trials are compared: those of its pruner, else the steps 1, 3, 9 and so on."""
    name, given = named(dict(spec.pruner), "pruner", PRUNERS)
    if name == "auto":
        return auto_ladder(spec, options.defaults(auto, 0) | given)
    found: dict[str, Any] = {"min_resource": 1, "reduction_factor": 3, "min_early_stopping_rate": 0} | given
    factor = found["reduction_factor"]
    return Ladder(first=found["min_resource"] * factor ** found["min_early_stopping_rate"], factor=factor)


def auto_ladder(spec: StudySpec, given: Mapping[str, Any]) -> Ladder:
    """Return the rungs of `auto`: shares 1/3, 1/9 and so on of the schedule, at most MOST_RUNGS, none within a warm-up.

    The lowest one may be more than half an epoch, which is rounded up to the first epoch: 20 epochs have the rungs 1, 3 and 7.
    The length of an objective of the user's own is not known. There the rungs are the steps 1, 3, 9 and so on.
    """
    factor = given["reduction_factor"]
    if not spec.is_declared:
        return Ladder(first=1, factor=factor)
    tree = spec.tree
    training = training_defaults() | tree["training"]
    key = "schedule_epochs" if training.get("schedule_epochs") is not None else "epochs"
    ends = [end for end in ends_of(training[key]) if isinstance(end, int)]
    longest = max(ends, default=1)
    warming = _longest_warm_up(tree, longest)
    rungs = sum(factor**place < 2 * longest and warming * factor**place < 1 for place in range(1, MOST_RUNGS + 1))
    first = longest / factor**rungs
    if len(set(ends)) < 2:
        return Ladder(first=first, factor=factor, rungs=rungs, longest=longest)
    choices = tuple(ends) if isinstance(training[key], Choices) else ()
    return Ladder(first=first, factor=factor, rungs=rungs, length=f"training.{key}", longest=longest, choices=choices)


def _longest_warm_up(tree: Tree, epochs: int) -> float:
    """Return the largest share of the schedule that a warm-up may take."""
    part = tree.get("warmup")
    if not part:
        return 0.0
    tables = [part, *branches(part).values()]
    shares = [float(end) for table in tables for end in ends_of(table.get("share", 0.0))]
    lengths = [float(end) / epochs for table in tables for end in ends_of(table.get("epochs", 0.0))]
    default = 0.0 if any({"share", "epochs"} & table.keys() for table in tables) else 0.05
    return max(*shares, *lengths, default)


def plain(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Return the study's pruner without regard to costs."""
    name, given = named(dict(spec.pruner), "pruner", PRUNERS)
    if name == "auto":
        return _plain_auto(spec, options.defaults(auto, 0) | given)
    counts_from_one = spec.format == 1 or spec.is_declared
    if counts_from_one and WARM_UP in options.names(PRUNERS[name], 0):
        warm_up = given.get(WARM_UP, 0)
        assert isinstance(warm_up, int)
        given[WARM_UP] = warm_up + 1
    return PRUNERS[name](**given)  # type: ignore[no-any-return]


def _plain_auto(spec: StudySpec, given: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    found = auto_ladder(spec, given)
    if spec.goals.costs:  # compared with comparable trials only
        return array_pruners.SuccessiveHalving(math.ceil(found.first), found.factor, 0)
    return AutoPruner(found, explore=_explore(found.factor, found.rungs, given.get("explore")))


def explain_auto(spec: StudySpec) -> str:
    """Return where the study's pruner `auto` decides and whom it spares, one line of text."""
    found = auto_ladder(spec, spec.pruner)
    if spec.goals.costs:
        return f"successive halving from epoch {math.ceil(found.first)}, among comparable trials"
    spared = _explore(found.factor, found.rungs, spec.pruner.get("explore"))
    beside = f"; one trial in {spared} trains to its end" if spared else ""
    if found.rungs is None:
        return f"rungs at steps {found.first:g}, {found.factor}, {found.factor**2} and so on{beside}"
    rungs = [int(found.steps(rung, np.array([math.nan]))[0]) for rung in range(found.rungs)]
    if not rungs:
        return f"no rung, since a trial has {found.longest} epochs; it prunes none"
    of = f"of {found.longest}" if found.length is None else f"of {found.longest}, at equal shares in shorter trials"
    return f"rungs at epochs {', '.join(map(str, rungs))} {of}{beside}"
