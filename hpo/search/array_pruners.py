"""Optuna's pruners, deciding from columns in memory: the same decisions without a look at every trial.

Each is Optuna's class and is asked in Optuna's way. On a study in our storage it looks at the trial itself first, reads only
what is new, and only when the history has a say; on any other storage Optuna's own code decides.

Several trials are decided on from one read, and then the order in which they stand is of no account. The percentile knows
COMPLETE trials only. At a rung of successive halving all of them enter their values before the first one is judged, as if
each had come last.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.storage.finished_trials import RUNG_PREFIX, STANDING, FinishedTrials
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
BracketsOf = Callable[[Integers], Integers]  # by the numbers of trials
ComparableTo = Callable[[FrozenTrial, Integers], Bools]  # with which of the trials with these numbers one is compared


def decide(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
    """Say of each trial whether the study's pruner ends it: on our storage from one read and whatever their order.

    For one trial it is `study.pruner.prune`. All their last values have been reported. What a pruner writes down about a
    trial is added to its `system_attrs`; where these are a dict, and not Optuna's lazy ones, they are not read either.
    """
    return ask(study.pruner, study, trials)


def ask(pruner: optuna.pruners.BasePruner, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
    """Do as `decide`, by this pruner."""
    if isinstance(pruner, BatchPruner):
        return pruner.decide(study, trials)
    return [pruner.prune(study, trial) for trial in trials]


class BatchPruner(optuna.pruners.BasePruner):
    """A pruner that decides on several trials together."""

    @abstractmethod
    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Say of each trial whether it is to end."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return self.decide(study, [trial])[0]


class _ArrayPruner(BatchPruner):
    """What stands before one of Optuna's pruners and decides in its place where it can."""

    def decide(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        storage = study._storage
        if isinstance(storage, OptunaStorage) and self._is_settled():
            return self._decide(storage, study, trials)
        optunas = super(BatchPruner, self).prune  # type: ignore[safe-super]  # the next class is one of Optuna's
        return [optunas(study, trial) for trial in trials]

    def _is_settled(self) -> bool:
        """Say whether no option is left to be found out from the history."""
        return True

    @abstractmethod
    def _decide(self, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        """Say of each trial of a study in our storage whether it is to end."""


# --- percentiles ------------------------------------------------------------------------------------------------------


class CompleteTrials(Protocol):
    """The COMPLETE trials that one is compared with."""

    @property
    def complete(self) -> int:
        """How many they are."""

    def at_step(self, step: int) -> Floats:
        """Return what they reported at a step, of those that did, NaN included."""

    def percentile(self, step: int, percent: float) -> float:
        """Return a percentile of that, but for NaN; NaN if nothing is left."""


class Percentile(_ArrayPruner, optuna.pruners.PercentilePruner):
    """Ends a trial whose best value so far is beyond a percentile of the COMPLETE ones at its step (Golovin et al., Google
    Vizier, 2017)."""

    def _decide(self, storage: OptunaStorage, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[bool]:
        due = [self.is_due(trial) for trial in trials]
        if not any(due):
            return due
        columns = storage.columns(study._study_id)
        sign = sign_of(study)
        return [is_due and self.ends(trial, columns, sign) for is_due, trial in zip(due, trials, strict=True)]

    def ends(self, trial: FrozenTrial, history: CompleteTrials, sign: float) -> bool:
        """Say whether a trial that is due ends, compared with these.

        Args:
            sign: what makes more the better of their values.
        """
        return history.complete >= max(self._n_startup_trials, 1) and self._is_beyond(history, trial, sign)

    def is_due(self, trial: FrozenTrial) -> bool:
        """Say whether a trial is past the warm-up and has just entered an interval."""
        step = trial.last_step
        if step is None or step < self._n_warmup_steps:
            return False
        into_interval = (step - self._n_warmup_steps) % self._interval_steps
        return max((other for other in trial.intermediate_values if other != step), default=-1) < step - into_interval

    def _is_beyond(self, history: CompleteTrials, trial: FrozenTrial, sign: float) -> bool:
        best = max(
            (sign * value for value in trial.intermediate_values.values() if not math.isnan(value)), default=None
        )
        if best is None:
            return True  # it has reported, but no number
        step = trial.last_step
        assert step is not None
        if len(history.at_step(step)) < self._n_min_trials:
            return False
        bar = history.percentile(step, self._percentile if sign < 0 else 100 - self._percentile)
        return best < sign * bar  # False for a bar that is NaN


class Median(Percentile, optuna.pruners.MedianPruner):
    """Ends a trial whose best value so far is worse than the median of the COMPLETE ones at its step."""


# --- successive halving -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RungSchedule:
    """Where the rungs of successive halving are, and who goes on from one (Li et al., ASHA, 2020)."""

    first: int  # the step of rung 0
    factor: int  # the next rung's step is so many times a rung's, and one of so many trials goes on
    bootstrap: int = 0  # none goes on from a rung that no more than so many have reached

    @classmethod
    def of(cls, pruner: optuna.pruners.SuccessiveHalvingPruner) -> RungSchedule:
        """Return the schedule of a pruner that knows its `min_resource`."""
        assert pruner._min_resource is not None
        factor = pruner._reduction_factor
        return cls(pruner._min_resource * factor**pruner._min_early_stopping_rate, factor, pruner._bootstrap_count)

    def step(self, rung: int) -> int:
        """Return the step that a trial must reach to be judged at a rung."""
        return self.first * int(self.factor**rung)

    def bar(self, values: Floats) -> float:
        """Return the value that a trial must show to go on from a rung, of all those shown there; more is better.

        NaN if none goes on.
        """
        if len(values) <= self.bootstrap:
            return math.nan
        place = len(values) - max(len(values) // self.factor, 1)
        return float(np.partition(values, place)[place])


class RungState:
    """Where a trial stands on its schedule of rungs."""

    def __init__(self, trial: FrozenTrial, bracket: int, schedule: RungSchedule, sign: float) -> None:
        """Find out at which rung it is.

        Args:
            sign: what makes more the better of its values.
        """
        self.trial = trial
        self.bracket = bracket
        self.schedule = schedule
        self.step = -1 if trial.last_step is None else trial.last_step
        self.reported = trial.intermediate_values.get(self.step, math.nan)
        self.value = sign * self.reported
        self.rung = 0  # the lowest at which it has not been judged
        self.entries: dict[str, float] = {}  # what it reported, by the keys of the rungs at which it is judged now
        self.is_pruned = False
        while self.is_due and _key(self.rung) in trial.system_attrs:
            self.rung += 1

    @property
    def is_due(self) -> bool:
        """Whether it has reached its rung."""
        return not self.is_pruned and self.step >= self.schedule.step(self.rung)

    def judge(self, bar: float) -> None:
        """End it, or let it go on to the next rung."""
        self.entries[_key(self.rung)] = self.reported
        self.is_pruned = not self.value >= bar
        self.rung += 1


class Standings:
    """What the trials of a study had to show at the rungs, as last read."""

    def __init__(self, columns: FinishedTrials, rows: Sequence[TrialRow], sign: float, brackets: BracketsOf) -> None:
        """Take the finished ones in columns, and the rows of the others."""
        self._columns = columns
        self._rows = rows
        self._sign = sign
        self._brackets = brackets

    def at(self, rung: int, bracket: int) -> npt.NDArray[np.void]:
        """Return the STANDINGs of a bracket's trials at a rung; more is better."""
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
    """Say of each trial whether it ends at a rung of its bracket's schedule, and write down at which rungs it was judged.

    Args:
        comparable: which trials each is compared with; all of its bracket if not given.
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
        _judge_rungs(judged, Standings(*storage.view(study._study_id), sign, brackets), comparable)
        storage.set_system_attributes({state.trial._trial_id: state.entries for state in judged})
        for state in judged:
            state.trial.system_attrs.update(state.entries)
    return [state.is_pruned for state in states]


def _judge_rungs(states: Sequence[RungState], standings: Standings, comparable: ComparableTo | None) -> None:
    """Judge trials rung by rung from the lowest, so that who goes on is in time for the next one."""
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
    """Return what makes more the better of the values that trials report, which are the first objective's."""
    return 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0


class _Halving(_ArrayPruner):
    """A pruner with rungs, which may be told to compare each trial with comparable ones only."""

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
        """Say of each trial whether it ends."""


class SuccessiveHalving(_Halving, optuna.pruners.SuccessiveHalvingPruner):
    """Ends a trial that is not among the best at a rung (Li et al., ASHA, 2020)."""

    def _is_settled(self) -> bool:
        return self._min_resource is not None

    def halve(
        self,
        storage: OptunaStorage,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        comparable: ComparableTo | None = None,
    ) -> list[bool]:
        """Say of each trial whether it ends, compared with comparable ones."""
        return halve(storage, study, trials, [RungSchedule.of(self)], np.zeros_like, comparable)


# --- Hyperband --------------------------------------------------------------------------------------------------------


class Hyperband(_Halving, optuna.pruners.HyperbandPruner):
    """Successive halving in brackets, each with another first rung (Li et al., Hyperband, 2018)."""

    def _is_settled(self) -> bool:
        return self._max_resource != "auto"

    def halve(
        self,
        storage: OptunaStorage,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        comparable: ComparableTo | None = None,
    ) -> list[bool]:
        """Say of each trial whether it ends, compared with comparable ones of its bracket."""
        brackets = self.brackets(study)
        return halve(
            storage, study, trials, [RungSchedule.of(pruner) for pruner in self._pruners], brackets, comparable
        )

    def brackets(self, study: optuna.Study) -> Brackets:
        """Return what knows the brackets of a study's trials; `max_resource` is known."""
        if not self._pruners:
            self._try_initialization(study)
        return _brackets(study.study_name, tuple(self._trial_allocation_budgets))


class Brackets:
    """Which bracket each trial of a study is in: a hash of the study's name and the trial's number, as in Optuna."""

    def __init__(self, study_name: str, shares: Sequence[int]) -> None:
        """Divide the trials of a study among as many brackets as there are shares, in proportion to these."""
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
