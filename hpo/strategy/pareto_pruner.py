"""Pruning with several objectives or constraints, which Optuna does not support.

A trial's costs, and its violations of bounds on costs, are known before its training. Another trial is *comparable* to it if
it violates less, or if it violates as much and costs no more in any objective. A pruner compares a trial's curve, the first
objective, with comparable trials only. So a trial is never pruned because of a trial that costs more in some objective, or
because of an infeasible trial while it is feasible itself. A trial without comparable trials or with unknown costs is never
pruned.

Violations come first, as in NSGA-II (Deb et al., 2002), where feasible solutions dominate infeasible ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.spec.objectives import Goals
from hpo.storage.finished_trials import FinishedTrials, cost_in, percentile
from hpo.storage.optuna_private import id_of, storage_of
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.tables import COST_PREFIX
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.array_pruners import (
    BatchPruner,
    Bools,
    ComparableTo,
    Floats,
    Hyperband,
    Integers,
    Percentile,
    SuccessiveHalving,
    sign_of,
)

Comparing = Percentile | SuccessiveHalving | Hyperband  # the pruners that compare a trial with others


class ComparableTrials:
    """The trials of a study with their known costs, from one read."""

    def __init__(self, goals: Goals, columns: FinishedTrials, rows: Sequence[TrialRow] = ()) -> None:
        """Take finished trials from columns and open trials from rows."""
        self._goals = goals
        numbers = np.append(columns.numbers, np.array([row.number for row in rows], np.int64))
        order = np.argsort(numbers)
        self._numbers: Integers = numbers[order]
        self._costs: dict[str, Floats] = {
            name: np.append(columns.costs(name), [cost_in(row.user_attributes, name) for row in rows])[order]
            for name in goals.costs
        }

    def comparable(self, trial: FrozenTrial, numbers: Integers) -> Bools:
        """Return which of the trials with these numbers [N] are comparable to a trial. A trial is not comparable to itself."""
        if not len(self._numbers):
            return np.zeros(len(numbers), dtype=bool)
        at = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        theirs = {name: cost[at] for name, cost in self._costs.items()}
        own = {name: np.full(len(numbers), _told(trial, name)) for name in self._costs}
        violated, own_violated = self._violation(theirs, len(numbers)), self._violation(own, len(numbers))
        is_no_dearer = np.ones(len(numbers), dtype=bool)
        for name in self._goals.names[1:]:
            sign = 1.0 if self._goals.directions[name] == "minimize" else -1.0
            is_no_dearer &= sign * theirs[name] <= sign * own[name]
        found: Bools = (violated < own_violated) | ((violated == own_violated) & is_no_dearer)
        found &= (self._numbers[at] == numbers) & (numbers != trial.number)
        return found

    def _violation(self, costs: Mapping[str, Floats], count: int) -> Floats:
        """Return the violation [count] of the bounds on costs; NaN, which compares with nothing, for unknown costs."""
        total = np.zeros(count)
        for bound in self._goals.static_bounds:
            total += np.maximum(bound.violation(costs[bound.name]), 0.0)
        return total


def _told(trial: FrozenTrial, name: str) -> float:
    told = trial.user_attrs.get(COST_PREFIX + name)
    return float(told) if isinstance(told, int | float) else math.nan


class _ComparableHistory:
    """The COMPLETE trials that are comparable to one trial, as the percentile pruner needs them."""

    def __init__(self, columns: FinishedTrials, trials_of_study: ComparableTrials, trial: FrozenTrial) -> None:
        self._columns = columns
        self._comparable = trials_of_study
        self._trial = trial

    @property
    def complete(self) -> int:
        numbers = self._columns.numbers[self._columns.states == TrialState.COMPLETE.value]
        return int(self._comparable.comparable(self._trial, numbers).sum())

    def at_step(self, step: int) -> Floats:
        values = self._columns.at_step(step)
        found: Floats = values[self._comparable.comparable(self._trial, self._columns.who_at_step(step)[: len(values)])]
        return found

    def percentile(self, step: int, percent: float) -> float:
        return percentile(self.at_step(step), percent)


class CostAwarePruner(BatchPruner):
    """Wraps another pruner, which then compares each trial with comparable trials only."""

    def __init__(self, inner: Comparing, goals: Goals) -> None:
        self.inner = inner
        self.goals = goals

    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Return for each trial of a study in our storage whether it is pruned."""
        storage = storage_of(study)
        assert isinstance(storage, OptunaStorage)
        if isinstance(self.inner, Percentile):
            return self._below(self.inner, storage, study, trials)
        return self.inner.halve(storage, study, trials, self._comparable_to(storage, study))

    def _below(
        self, pruner: Percentile, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]
    ) -> list[bool]:
        due = [pruner.is_due(trial) for trial in trials]
        if not any(due):
            return due
        columns, sign = storage.columns(id_of(study)), sign_of(study)
        trials_of_study = ComparableTrials(self.goals, columns)
        return [
            is_due and pruner.ends(trial, _ComparableHistory(columns, trials_of_study, trial), sign)
            for is_due, trial in zip(due, trials, strict=True)
        ]

    def _comparable_to(self, storage: OptunaStorage, study: optuna.Study) -> ComparableTo:
        """Return the function `comparable`. It reads the trials once, at its first call."""
        read: list[ComparableTrials] = []

        def comparable(trial: FrozenTrial, numbers: Integers) -> Bools:
            if not read:
                read.append(ComparableTrials(self.goals, *storage.view(id_of(study))))
            return read[0].comparable(trial, numbers)

        return comparable
