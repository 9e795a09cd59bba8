"""Pruners by name. In a declared training a step is the number of epochs finished, from 1.

A warm-up of n means there that the first n epochs are never pruned (Optuna counts steps from 0, hence the + 1 in `plain`). In
an objective of the user's own, steps are as reported and a warm-up is Optuna's: steps below n are never pruned.
The names and defaults are Optuna's, but for Hyperband's and successive halving's resources, which are always explicit
integers: Optuna's "auto" takes them from what one process happens to have seen, so two workers would disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import optuna
from annotated_types import Ge, Le

from hpo.errors import SpecError, nearest, shown
from hpo.search import array_pruners
from hpo.search.pareto_pruner import Comparing, CostAwarePruner
from hpo.spec import options
from hpo.spec.objectives import Goals
from hpo.spec.space import ends_of
from hpo.spec.study_file import StudySpec
from hpo.spec.training import training_defaults

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Percent = Annotated[float, Ge(0), Le(100)]
WARM_UP = "n_warmup_steps"


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
    """Prune below the median of finished trials at the same epoch (Golovin et al., Google Vizier, 2017)."""
    return array_pruners.Median(n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials)


def percentile(
    *,
    percentile: Percent = 25.0,
    n_startup_trials: Count = 5,
    n_warmup_steps: Count = 0,
    interval_steps: Positive = 1,
    n_min_trials: Positive = 3,
) -> optuna.pruners.BasePruner:
    """Keep the best `percentile` percent at each epoch."""
    return array_pruners.Percentile(
        percentile, n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials
    )


def successive_halving(
    *,
    min_resource: Positive = 1,
    reduction_factor: Annotated[int, Ge(2)] = 3,
    min_early_stopping_rate: Count = 0,
) -> optuna.pruners.BasePruner:
    """Asynchronous successive halving, stopping only (Li et al., ASHA, 2020)."""
    return array_pruners.SuccessiveHalving(min_resource, reduction_factor, min_early_stopping_rate)


def hyperband(
    *, max_resource: Positive, min_resource: Positive = 1, reduction_factor: Annotated[int, Ge(2)] = 3
) -> optuna.pruners.BasePruner:
    """Several brackets of successive halving (Li et al., Hyperband, 2018); `max_resource` is the epochs of a full trial."""
    return array_pruners.Hyperband(min_resource, max_resource, reduction_factor)


def threshold(
    *,
    lower: float | None = None,
    upper: float | None = None,
    n_warmup_steps: Count = 0,
    interval_steps: Positive = 1,
) -> optuna.pruners.BasePruner:
    """Prune a trial whose value leaves [lower, upper] or is no number."""
    return optuna.pruners.ThresholdPruner(lower, upper, n_warmup_steps, interval_steps)


def patient(
    *,
    patience: Positive,
    min_delta: Annotated[float, Ge(0)] = 0.0,
    wrapped: Literal["none", "median", "percentile", "successive_halving"] = "none",
) -> optuna.pruners.BasePruner:
    """Prune when the value has not improved for `patience` epochs, and the wrapped pruner, if any, agrees."""
    inner = None if wrapped == "none" else PRUNERS[wrapped]()
    return Patient(inner, patience, min_delta)


class Patient(array_pruners.BatchPruner):
    """Prunes what does not improve. Optuna's own asks whether the value got worse, which a best so far never does."""

    def __init__(self, wrapped: optuna.pruners.BasePruner | None, patience: int, min_delta: float) -> None:
        self.wrapped = wrapped
        self.patience = patience
        self.min_delta = min_delta

    def decide(self, study: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial]) -> list[bool]:
        """Say of each trial whether it has not improved, and the wrapped pruner agrees; only those are shown to it."""
        sign = array_pruners.sign_of(study)
        stuck = [self._is_stuck(trial, sign) for trial in trials]
        if self.wrapped is None:
            return stuck
        shown = [trial for trial, is_stuck in zip(trials, stuck, strict=True) if is_stuck]
        agreed = iter(array_pruners.ask(self.wrapped, study, shown))
        return [is_stuck and next(agreed) for is_stuck in stuck]

    def _is_stuck(self, trial: optuna.trial.FrozenTrial, sign: float) -> bool:
        """Say whether the last `patience` epochs are no better than the best before them by more than min_delta."""
        values = [sign * value for _, value in sorted(trial.intermediate_values.items())]
        if len(values) <= self.patience:
            return False
        return not _best(values[-self.patience :]) > _best(values[: -self.patience]) + self.min_delta


def _best(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=-math.inf)


PRUNERS: dict[str, options.Function] = {
    "none": none,
    "median": median,
    "percentile": percentile,
    "successive_halving": successive_halving,
    "hyperband": hyperband,
    "threshold": threshold,
    "patient": patient,
}


def resolve(spec: StudySpec) -> StudySpec:
    """Return the spec with the pruner's defaults filled and checked; Hyperband's max_resource is the epochs of a trial."""
    table = dict(spec.pruner)
    if table.get("name") == "hyperband" and not spec.objective:
        ends = ends_of((training_defaults() | spec.tree["training"])["epochs"])
        epochs = [end for end in ends if isinstance(end, int)]
        table.setdefault("max_resource", max(epochs, default=2**31))  # wrong epochs are told as training.epochs
    name, given = named(table, "pruner", PRUNERS)
    paths = {key: f"pruner.{key}" for key in given}
    options.check("pruner", name, PRUNERS[name], 0, given, paths)
    if name == "threshold" and not {"lower", "upper"} & given.keys():
        raise SpecError("pruner: threshold needs lower or upper; add one")
    if name == "patient" and given.get("wrapped", "none") == "none" and spec.objectives:
        raise SpecError(
            'pruner.wrapped = "none": a trial that stands still may yet be on the front of several objectives; '
            'wrap a pruner that compares, such as "median"'
        )
    _check_order(given, "lower", "upper")
    _check_order({"min_resource": 1} | given, "min_resource", "max_resource")
    return spec.model_copy(update={"pruner": {"name": name} | options.defaults(PRUNERS[name], 0) | given})


def _check_order(given: dict[str, Any], lower: str, upper: str) -> None:
    if lower in given and upper in given and given[lower] > given[upper]:
        raise SpecError(f"pruner.{lower} = {given[lower]}: is above pruner.{upper} = {given[upper]}; lower it")


def named(table: dict[str, object], section: str, known: dict[str, options.Function]) -> tuple[str, dict[str, object]]:
    """Split a table into its name, which must be a known one, and the rest."""
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
    """Return the study's pruner; where trials are judged by more than their curves, it compares comparable trials only."""
    return _cost_aware(plain(spec), spec.goals) if spec.goals.costs else plain(spec)


def _cost_aware(pruner: optuna.pruners.BasePruner, goals: Goals) -> optuna.pruners.BasePruner:
    if isinstance(pruner, Patient) and pruner.wrapped is not None:
        return Patient(_cost_aware(pruner.wrapped, goals), pruner.patience, pruner.min_delta)
    return CostAwarePruner(pruner, goals) if isinstance(pruner, Comparing) else pruner


def plain(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Return the study's pruner as if a trial were its curve and no more."""
    name, given = named(dict(spec.pruner), "pruner", PRUNERS)
    counts_from_one = spec.format == 1 or not spec.objective
    if counts_from_one and WARM_UP in options.names(PRUNERS[name], 0):
        warm_up = given.get(WARM_UP, 0)
        assert isinstance(warm_up, int)
        given[WARM_UP] = warm_up + 1
    return PRUNERS[name](**given)  # type: ignore[no-any-return]
