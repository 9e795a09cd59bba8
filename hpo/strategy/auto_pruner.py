"""The pruner `auto`: successive halving that stops, at equal shares of each trial's own schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.finished_trials import RUNG_PREFIX, FinishedTrials
from hpo.storage.optuna_private import id_of, storage_of, trial_id_of
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.array_pruners import BatchPruner, RungSchedule, sign_of
from hpo.strategy.rungs import Curves, Ladder


class AutoPruner(BatchPruner):
    """Prunes a trial that is not among the best at a rung (Li et al., ASHA, 2020).

    A trial is compared with all that have reached the rung: COMPLETE ones that stopped before it too, by their final value. A
    rung is a share of the trial's own length. One trial in `explore` is never pruned, so that late bloomers are seen.
    """

    def __init__(self, ladder: Ladder, *, explore: int) -> None:
        self._ladder = ladder
        self.explore = explore
        self._rule = RungSchedule(first=1, factor=ladder.factor)

    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Return for each trial whether it is pruned. Store the rungs at which each trial was judged."""
        due = [self._due(trial) for trial in trials]
        if not any(due):
            return [False] * len(trials)
        standings = Standings(self._curves(study), sign_of(study), self._rule)
        decisions, entries = [], {}
        for trial, rungs in zip(trials, due, strict=True):
            values = {rung: self._value(trial, rung) for rung in rungs}
            decisions.append(any(not sign_of(study) * value >= standings.bar(rung) for rung, value in values.items()))
            told = {f"{RUNG_PREFIX}{rung}": value for rung, value in values.items() if not math.isnan(value)}
            if told:
                entries[trial_id_of(trial)] = told
                trial.system_attrs.update(told)
        _store(study, entries)
        return decisions

    def _curves(self, study: optuna.Study) -> Curves:
        columns, rows = _view(study)
        running = sorted((row for row in rows if row.state == TrialState.RUNNING), key=lambda row: row.number)
        return Curves.of(columns, running, self._ladder)

    def _due(self, trial: FrozenTrial) -> list[int]:
        """Return the rungs that a trial has reached and at which it has not been judged."""
        last = trial.last_step
        if last is None or (self.explore and trial.number % self.explore == self.explore - 1):
            return []
        reached = []
        for rung in self._ladder.up_to(math.inf):
            if self._step(trial, rung) > last:
                break
            reached.append(rung)
        return [rung for rung in reached if f"{RUNG_PREFIX}{rung}" not in trial.system_attrs]

    def _step(self, trial: FrozenTrial, rung: int) -> int:
        length = trial.params.get(self._ladder.length or "", math.nan)
        return int(self._ladder.steps(rung, np.array([length]))[0])

    def _value(self, trial: FrozenTrial, rung: int) -> float:
        """Return the first value that a trial reported at or after a rung it has reached."""
        step = self._step(trial, rung)
        return trial.intermediate_values[min(other for other in trial.intermediate_values if other >= step)]


class Standings:
    """The lowest value that is promoted from each rung, from one read."""

    def __init__(self, curves: Curves, sign: float, rule: RungSchedule) -> None:
        self._curves = curves
        self._sign = sign
        self._rule = rule
        self._bars: dict[int, float] = {}

    def bar(self, rung: int) -> float:
        """Return the lowest value that is promoted from a rung; higher is better."""
        if rung not in self._bars:
            reached, values = self._curves.at_rung(rung)
            known = self._sign * values[reached & ~np.isnan(values)]
            self._bars[rung] = self._rule.bar(known) if len(known) else math.nan
        return self._bars[rung]


def _view(study: optuna.Study) -> tuple[FinishedTrials, list[TrialRow]]:
    """Return the finished trials of a study in columns and the open ones as rows."""
    storage = storage_of(study)
    if isinstance(storage, OptunaStorage):
        return storage.view(id_of(study))
    rows = [TrialRow.of(trial) for trial in study.get_trials(deepcopy=False)]
    columns = FinishedTrials()
    columns.add([row for row in rows if row.is_finished])
    return columns, [row for row in rows if not row.is_finished]


def _store(study: optuna.Study, entries: dict[int, dict[str, float]]) -> None:
    """Store system attributes of trials by trial id."""
    storage = storage_of(study)
    if isinstance(storage, OptunaStorage):
        storage.set_system_attributes(entries)
        return
    for trial_id, attributes in entries.items():
        for key, value in attributes.items():
            storage.set_trial_system_attr(trial_id, key, value)
