"""Rungs at which trials of unequal length can be compared, and the values that trials have there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.trial import TrialState

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.trial_rows import TrialRow

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Positions = npt.NDArray[np.intp]  # places in columns


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The steps of a study's rungs.

    If a parameter decides how long a trial trains, a rung is a share of each trial's own length.
    """

    first: float  # the step of the lowest rung, rounded up; of the longest trial, if lengths differ
    factor: int  # steps grow by this factor from rung to rung
    rungs: int | None = None  # number of rungs; None: as many as there are steps
    length: str | None = None  # the parameter that is a trial's length in steps
    longest: int = 1  # the largest value of this parameter
    choices: tuple[int, ...] = ()  # its values by the index that Optuna stores; none if it stores the value itself

    def up_to(self, furthest: float) -> Iterator[int]:
        """Yield all rungs from the lowest. If their number is not known, yield those up to this step."""
        if self.rungs is not None:
            return iter(range(self.rungs))
        return itertools.takewhile(lambda rung: self.first * self.factor**rung <= furthest, itertools.count())

    def steps(self, rung: int, lengths: Floats) -> Integers:
        """Return the step of a rung for trials of these lengths [N]. NaN stands for a length that is not known: the longest."""
        step = self.first * self.factor**rung
        shares = 1.0 if self.length is None else np.where(np.isnan(lengths), 1.0, lengths / self.longest)
        return np.maximum(np.ceil(np.full(len(lengths), step) * shares - 1e-9), 1).astype(np.int64)


@dataclass(frozen=True)
class Curves:
    """The COMPLETE, PRUNED and RUNNING trials of a study, in this order: the finished ones of columns, then rows."""

    columns: FinishedTrials
    at: Positions  # of the COMPLETE and PRUNED trials, in the columns
    running: Sequence[TrialRow]  # parked ones too
    ladder: Ladder

    @classmethod
    def of(cls, columns: FinishedTrials, running: Sequence[TrialRow], ladder: Ladder) -> Curves:
        """Return the curves of all COMPLETE and PRUNED trials in number order, and of these running ones."""
        return cls(columns=columns, at=counting(columns), running=running, ladder=ladder)

    @property
    def numbers(self) -> Integers:
        return np.append(self.columns.numbers[self.at], np.array([row.number for row in self.running], np.int64))

    @property
    def last_steps(self) -> Integers:
        """The last reported steps, -1 for a trial without reports."""
        of_running = [row.steps[-1] if row.steps else -1 for row in self.running]
        return np.append(self.columns.last_steps[self.at], np.array(of_running, np.int64))

    @property
    def last_values(self) -> Floats:
        """The last reported values, NaN for a trial without reports."""
        of_running = [row.curve[-1] if row.curve else math.nan for row in self.running]
        return np.append(self.columns.last_values[self.at], of_running)

    @property
    def is_running(self) -> Bools:
        return np.arange(len(self.at) + len(self.running)) >= len(self.at)

    @property
    def is_complete(self) -> Bools:
        of_finished = self.columns.states[self.at] == TrialState.COMPLETE.value
        return np.append(of_finished, np.zeros(len(self.running), bool))

    @property
    def is_diverged(self) -> Bools:
        return np.append(self.columns.diverged[self.at], np.zeros(len(self.running), bool))

    @property
    def finals(self) -> Floats:
        """The values with which trials ended, NaN for others."""
        return np.append(self.columns.values[self.at], np.full(len(self.running), math.nan))

    def at_rung(self, rung: int) -> tuple[Bools, Floats]:
        """Return which trials have reached a rung, and their values there.

        A trial has reached a rung if it reported at or after its step. The first of these reports is its value there. A
        COMPLETE trial has reached every rung, since nothing more is to come; beyond its last report its final value counts.
        """
        steps = self.ladder.steps(rung, self._lengths)
        has_reported, complete = self.last_steps >= steps, self.is_complete
        values = np.where(complete & ~has_reported, self.finals, self._first_from(steps))
        return complete | has_reported, values

    @property
    def _lengths(self) -> Floats:
        name = self.ladder.length
        if name is None:
            return np.full(len(self.at) + len(self.running), math.nan)
        of_running = [dict(zip(row.space, row.params, strict=True)).get(name, math.nan) for row in self.running]
        stored = np.append(self.columns.params(name)[self.at], of_running)
        if not self.ladder.choices:
            return stored
        is_known = ~np.isnan(stored)
        stored[is_known] = np.array(self.ladder.choices)[stored[is_known].astype(int)]
        return stored

    def _first_from(self, steps: Integers) -> Floats:
        """Return the first value that each trial reported at or after its step, NaN without one."""
        of_finished = np.full(len(self.at), math.nan)
        steps_of_finished = steps[: len(self.at)]
        for step in np.unique(steps_of_finished).tolist():
            these = steps_of_finished == step
            of_finished[these] = self.columns.first_from(step)[self.at[these]]
        of_running = [row.first_from(int(step)) for row, step in zip(self.running, steps[len(self.at) :], strict=True)]
        return np.append(of_finished, of_running)


def counting(columns: FinishedTrials) -> Positions:
    """Return the places of the COMPLETE and PRUNED trials, in number order."""
    found = np.flatnonzero(np.isin(columns.states, (TrialState.COMPLETE.value, TrialState.PRUNED.value)))
    ordered: Positions = found[np.argsort(columns.numbers[found])]
    return ordered
