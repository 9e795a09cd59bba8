"""Optuna's pruners on numpy columns: the same decisions without reading every trial.

Each class here is a subclass of Optuna's. On a study in our storage it checks the trial first. It reads the history only if
the decision depends on it, and then only the new part. On any other storage Optuna's own code decides.

Several trials are decided from one read, and their order does not matter. The percentile pruner compares with COMPLETE trials
only. At a rung of successive halving all trials enter their values before the first one is judged.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.storage.finished_trials import RUNG_PREFIX, STANDING, FinishedTrials
from hpo.storage.optuna_private import (
    HalvingSettings,
    PercentileSettings,
    brackets_of,
    id_of,
    max_resource_of,
    storage_of,
    trial_id_of,
)
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
BracketsOf = Callable[[Integers], Integers]  # trial numbers -> brackets
ComparableTo = Callable[[FrozenTrial, Integers], Bools]  # trial, numbers -> which of these trials it is compared with


def decide(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
    """Return for each trial whether the study's pruner prunes it.

    For one trial this is `study.pruner.prune`. On our storage all trials are decided from one read, in any order. Their last
    values must have been reported. Attributes that the pruner stores are added to the trial's `system_attrs`. If these are a
    plain dict, not Optuna's lazy one, they are not read from the storage either.
    """
    return ask(study.pruner, study, trials)


def ask(pruner: optuna.pruners.BasePruner, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
    """Return the decisions of this pruner, as `decide` does for the study's."""
    if isinstance(pruner, BatchPruner):
        return pruner.decide(study, trials)
    return [pruner.prune(study, trial) for trial in trials]


class BatchPruner(optuna.pruners.BasePruner):
    """A pruner that decides several trials together."""

    @abstractmethod
    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Return for each trial whether it is pruned."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return self.decide(study, [trial])[0]


class _ArrayPruner(BatchPruner):
    """Base of a pruner that decides on our storage and leaves other storages to Optuna's class."""

    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        storage = storage_of(study)
        if isinstance(storage, OptunaStorage) and self._knows_its_options():
            return self._decide(storage, study, trials)
        optunas = super(BatchPruner, self).prune  # type: ignore[safe-super]  # the next class is one of Optuna's
        return [optunas(study, trial) for trial in trials]

    def _knows_its_options(self) -> bool:
        """Return whether all options are known. Optuna finds "auto" options from the history."""
        return True

    @abstractmethod
    def _decide(self, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Return for each trial of a study in our storage whether it is pruned."""


# --- percentiles ------------------------------------------------------------------------------------------------------


class CompleteTrials(Protocol):
    """The COMPLETE trials that a trial is compared with."""

    @property
    def complete(self) -> int:
        """The number of trials."""

    def at_step(self, step: int) -> Floats:
        """Return the values that were reported at a step, NaN included."""

    def percentile(self, step: int, percent: float) -> float:
        """Return a percentile of these values without NaN; NaN if no value is left."""


class Percentile(_ArrayPruner, optuna.pruners.PercentilePruner):
    """Prunes a trial whose best value so far is worse than a percentile of the COMPLETE trials at its step (Golovin et al.,
    Google Vizier, 2017)."""

    @cached_property
    def _settings(self) -> PercentileSettings:
        return PercentileSettings.of(self)

    def _decide(self, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        due = [self.is_due(trial) for trial in trials]
        if not any(due):
            return due
        columns = storage.columns(id_of(study))
        sign = sign_of(study)
        return [is_due and self.ends(trial, columns, sign) for is_due, trial in zip(due, trials, strict=True)]

    def ends(self, trial: FrozenTrial, history: CompleteTrials, sign: float) -> bool:
        """Return whether a due trial is pruned, compared with this history.

        Args:
            trial: the trial, for which `is_due` is true.
            history: the COMPLETE trials to compare with.
            sign: the factor, 1 or -1, after which higher values are better.
        """
        return history.complete >= max(self._settings.startup_trials, 1) and self._is_beyond(history, trial, sign)

    def is_due(self, trial: FrozenTrial) -> bool:
        """Return whether a trial is past the warm-up and its last report is the first of an interval."""
        step, settings = trial.last_step, self._settings
        if step is None or step < settings.warmup_steps:
            return False
        begin = step - (step - settings.warmup_steps) % settings.interval_steps
        # The newest steps first: they tell at once.
        return begin == step or not any(begin <= other < step for other in reversed(trial.intermediate_values))

    def _is_beyond(self, history: CompleteTrials, trial: FrozenTrial, sign: float) -> bool:
        best = max(
            (sign * value for value in trial.intermediate_values.values() if not math.isnan(value)), default=None
        )
        if best is None:
            return True  # all its values are NaN
        step = trial.last_step
        assert step is not None
        if len(history.at_step(step)) < self._settings.min_trials:
            return False
        percent = self._settings.percentile
        bar = history.percentile(step, percent if sign < 0 else 100 - percent)
        return best < sign * bar  # False if the bar is NaN


class Median(Percentile, optuna.pruners.MedianPruner):
    """Prunes a trial whose best value so far is worse than the median of the COMPLETE trials at its step."""


# --- successive halving -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RungSchedule:
    """The rungs of successive halving and the rule of promotion (Li et al., ASHA, 2020)."""

    first: int  # the step of rung 0
    factor: int  # steps grow by this factor from rung to rung; the best 1/factor of the trials are promoted
    bootstrap: int = 0  # a rung promotes no trial before more trials than this have reached it

    @classmethod
    def of(cls, pruner: optuna.pruners.SuccessiveHalvingPruner) -> RungSchedule:
        """Return the schedule of a pruner whose `min_resource` is known."""
        settings = HalvingSettings.of(pruner)
        assert settings.min_resource is not None
        first = settings.min_resource * settings.factor**settings.min_early_stopping_rate
        return cls(first, settings.factor, settings.bootstrap)

    def step(self, rung: int) -> int:
        """Return the step that a trial must reach to be judged at a rung."""
        return self.first * int(self.factor**rung)

    def bar(self, values: Floats) -> float:
        """Return the lowest value that is promoted from a rung, NaN if none is.

        Args:
            values: the values of all trials at the rung; higher is better.
        """
        if len(values) <= self.bootstrap:
            return math.nan
        place = len(values) - max(len(values) // self.factor, 1)
        return float(np.partition(values, place)[place])


class RungState:
    """The state of one trial in its schedule of rungs."""

    def __init__(self, trial: FrozenTrial, bracket: int, schedule: RungSchedule, sign: float) -> None:
        """Find the trial's next rung.

        Args:
            trial: the trial.
            bracket: its bracket.
            schedule: the schedule of the bracket.
            sign: the factor, 1 or -1, after which higher values are better.
        """
        self.trial = trial
        self.bracket = bracket
        self.schedule = schedule
        self.step = -1 if trial.last_step is None else trial.last_step
        self.reported = trial.intermediate_values.get(self.step, math.nan)
        self.value = sign * self.reported
        self.rung = 0  # the lowest rung at which it has not been judged
        self.entries: dict[str, float] = {}  # its reported value, by the keys of the rungs at which it is judged now
        self.is_pruned = False
        while self.is_due and _key(self.rung) in trial.system_attrs:
            self.rung += 1

    @property
    def is_due(self) -> bool:
        """Whether the trial has reached its next rung."""
        return not self.is_pruned and self.step >= self.schedule.step(self.rung)

    def judge(self, bar: float) -> None:
        """Prune the trial or promote it to the next rung."""
        self.entries[_key(self.rung)] = self.reported
        self.is_pruned = not self.value >= bar
        self.rung += 1


class Standings:
    """The values of a study's trials at the rungs, from one read."""

    def __init__(self, columns: FinishedTrials, rows: Sequence[TrialRow], sign: float, brackets: BracketsOf) -> None:
        """Take finished trials from columns and open trials from rows."""
        self._columns = columns
        self._rows = rows
        self._sign = sign
        self._brackets = brackets

    def at(self, rung: int, bracket: int) -> npt.NDArray[np.void]:
        """Return the number and value of each trial of a bracket at a rung, with dtype STANDING; higher is better."""
        key = _key(rung)
        of_open = [
            (row.number, float(row.system_attributes[key])) for row in self._rows if key in row.system_attributes
        ]
        found = np.append(self._columns.at_rung(rung), np.array(of_open, STANDING))
        found["value"] *= self._sign
        of_bracket: npt.NDArray[np.void] = found[self._brackets(found["number"]) == bracket]
        return of_bracket


def halve(
    storage: OptunaStorage,
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    schedules: Sequence[RungSchedule],
    brackets: BracketsOf,
    comparable: ComparableTo | None = None,
) -> list[bool]:
    """Return for each trial whether it is pruned at a rung. Store the rungs at which each trial was judged.

    Args:
        storage: the storage of the study.
        study: the study.
        trials: the trials to decide.
        schedules: one schedule per bracket.
        brackets: the bracket of each trial by number.
        comparable: the trials that each trial is compared with; all trials of its bracket by default.
    """
    sign = sign_of(study)
    of_trials = brackets(np.array([trial.number for trial in trials], np.int64))
    states = [
        RungState(trial, bracket, schedules[bracket], sign)
        for trial, bracket in zip(trials, of_trials.tolist(), strict=True)
    ]
    due = [state for state in states if state.is_due]
    for state in due:
        state.is_pruned = math.isnan(state.value)
    judged = [state for state in due if not state.is_pruned]
    if judged:
        _judge_rungs(judged, Standings(*storage.view(id_of(study)), sign, brackets), comparable)
        storage.set_system_attributes({trial_id_of(state.trial): state.entries for state in judged})
        for state in judged:
            state.trial.system_attrs.update(state.entries)
    return [state.is_pruned for state in states]


def _judge_rungs(states: Sequence[RungState], standings: Standings, comparable: ComparableTo | None) -> None:
    """Judge trials rung by rung from the lowest, so that promoted trials are judged at the next rung too."""
    while states:
        rung, bracket = min((state.rung, state.bracket) for state in states)
        group = [state for state in states if (state.rung, state.bracket) == (rung, bracket)]
        of_group = np.array([(state.trial.number, state.value) for state in group], STANDING)
        shown = np.append(standings.at(rung, bracket), of_group)
        schedule = group[0].schedule
        if comparable is None:
            bar = schedule.bar(shown["value"])
            bars = [bar] * len(group)
        else:
            bars = [
                schedule.bar(shown["value"][_own_or_comparable(one.trial, shown["number"], comparable)])
                for one in group
            ]
        for state, bar in zip(group, bars, strict=True):
            state.judge(bar)
        states = [state for state in states if state.is_due]


def _own_or_comparable(trial: FrozenTrial, numbers: Integers, comparable: ComparableTo) -> Bools:
    found: Bools = (numbers == trial.number) | comparable(trial, numbers)
    return found


def _key(rung: int) -> str:
    return f"{RUNG_PREFIX}{rung}"


def sign_of(study: optuna.Study) -> float:
    """Return the factor, 1 or -1, after which higher reported values are better. Trials report the first objective."""
    return 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0


class _Halving(_ArrayPruner):
    """Base of pruners with rungs. They can compare each trial with comparable trials only."""

    def _decide(self, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        return self.halve(storage, study, trials)

    @abstractmethod
    def halve(
        self,
        storage: OptunaStorage,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        comparable: ComparableTo | None = None,
    ) -> list[bool]:
        """Return for each trial whether it is pruned, compared with comparable trials."""


class SuccessiveHalving(_Halving, optuna.pruners.SuccessiveHalvingPruner):
    """Prunes a trial that is not among the best at a rung (Li et al., ASHA, 2020)."""

    def _knows_its_options(self) -> bool:
        return HalvingSettings.of(self).min_resource is not None

    def halve(
        self,
        storage: OptunaStorage,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        comparable: ComparableTo | None = None,
    ) -> list[bool]:
        """Return for each trial whether it is pruned, compared with comparable trials."""
        return halve(storage, study, trials, [RungSchedule.of(self)], np.zeros_like, comparable)


# --- Hyperband --------------------------------------------------------------------------------------------------------


class Hyperband(_Halving, optuna.pruners.HyperbandPruner):
    """Successive halving in brackets that start at different rungs (Li et al., Hyperband, 2018)."""

    def _knows_its_options(self) -> bool:
        return max_resource_of(self) is not None

    def halve(
        self,
        storage: OptunaStorage,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        comparable: ComparableTo | None = None,
    ) -> list[bool]:
        """Return for each trial whether it is pruned, compared with comparable trials of its bracket."""
        pruners, _ = brackets_of(self, study)
        schedules = [RungSchedule.of(pruner) for pruner in pruners]
        return halve(storage, study, trials, schedules, self.brackets(study), comparable)

    def brackets(self, study: optuna.Study) -> Brackets:
        """Return the brackets of a study's trials; `max_resource` must be known."""
        _, shares = brackets_of(self, study)
        return _brackets(study.study_name, tuple(shares))


class Brackets:
    """The bracket of each trial of a study: a hash of the study's name and the trial's number, as in Optuna."""

    def __init__(self, study_name: str, shares: Sequence[int]) -> None:
        """Divide the trials among one bracket per share, in proportion to the shares."""
        self._ends = np.cumsum(shares)
        self._of_name = zlib.crc32(f"{study_name}_".encode())
        self._known = np.empty(0, np.int64)  # by number

    def __call__(self, numbers: Integers) -> Integers:
        """Return the brackets of the trials with these numbers."""
        known, wanted = self._known, int(numbers.max(initial=-1)) + 1
        if wanted > len(known):
            known = self._known = self._up_to(max(wanted, 2 * len(known), 64))
        return known[numbers]

    def _up_to(self, end: int) -> Integers:
        hashes = np.array([zlib.crc32(b"%d" % number, self._of_name) for number in range(end)])
        found: Integers = np.searchsorted(self._ends, hashes % self._ends[-1], side="right")
        return found


@lru_cache(maxsize=16)
def _brackets(study_name: str, shares: tuple[int, ...]) -> Brackets:
    return Brackets(study_name, shares)
