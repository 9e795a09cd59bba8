"""Pruning where trials are judged by more than their curves, which Optuna refuses: each is compared with comparable ones.

The rule. Of a trial some things are known before it is trained: its costs, and which bounds on costs it violates. Another
trial is *comparable* to it if it is at least as good in all of these: it violates less, or it violates as much and costs no
more in any objective. A pruner judges a trial's curve, which is the first objective's, as if the comparable trials were all
that there are. So a trial is never ended by one that costs more in some objective, whatever its curve. Nor is it ended by one
that is no result while it may be one itself. A trial without comparable ones is never ended. Nor is one with unknown costs.

To violate less comes first, as in NSGA-II (Deb et al., 2002), where what is feasible dominates what is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search.array_pruners import (
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
from hpo.spec.objectives import Goals
from hpo.storage.finished_trials import COST_PREFIX, FinishedTrials, cost_in, percentile
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow

Comparing = Percentile | SuccessiveHalving | Hyperband  # the pruners that compare a trial with others


class ComparableTrials:
    """The trials of a study by what was known of each before it was trained, as last read."""

    def __init__(self, goals: Goals, columns: FinishedTrials, rows: Sequence[TrialRow] = ()) -> None:
        """Take the finished ones in columns, and the rows of others."""
        self._goals = goals
        numbers = np.append(columns.numbers, np.array([row.number for row in rows], np.int64))
        order = np.argsort(numbers)
        self._numbers: Integers = numbers[order]
        self._costs: dict[str, Floats] = {
            name: np.append(columns.costs(name), [cost_in(row.user_attributes, name) for row in rows])[order]
            for name in goals.costs
        }

    def comparable(self, trial: FrozenTrial, numbers: Integers) -> Bools:
        """Say of trials, by their numbers, which of them are comparable to this one; it is not comparable to itself."""
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
        """Return by how much each of so many trials violates the bounds on costs; NaN, which makes none comparable, if that
        is not known.
        """
        total = np.zeros(count)
        for bound in self._goals.static_bounds:
            total += np.maximum(bound.violation(costs[bound.name]), 0.0)
        return total


def _told(trial: FrozenTrial, name: str) -> float:
    told = trial.user_attrs.get(COST_PREFIX + name)
    return float(told) if isinstance(told, int | float) else math.nan


class _ComparableHistory:
    """The COMPLETE trials comparable to one: what a percentile asks of a history."""

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
    """Asks another pruner about each trial, and shows it the comparable trials only."""

    def __init__(self, inner: Comparing, goals: Goals) -> None:
        """Ask this pruner about trials that are judged so."""
        self.inner = inner
        self.goals = goals

    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Say of each trial of a study in our storage whether it is to end."""
        storage = study._storage
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
        columns, sign = storage.columns(study._study_id), sign_of(study)
        trials_of_study = ComparableTrials(self.goals, columns)
        return [
            is_due and pruner.ends(trial, _ComparableHistory(columns, trials_of_study, trial), sign)
            for is_due, trial in zip(due, trials, strict=True)
        ]

    def _comparable_to(self, storage: OptunaStorage, study: optuna.Study) -> ComparableTo:
        """Return what knows which trials are comparable, of those that there are when it is first asked."""
        read: list[ComparableTrials] = []

        def comparable(trial: FrozenTrial, numbers: Integers) -> Bools:
            if not read:
                read.append(ComparableTrials(self.goals, *storage.view(study._study_id)))
            return read[0].comparable(trial, numbers)

        return comparable
