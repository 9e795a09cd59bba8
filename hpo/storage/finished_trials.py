"""Finished trials in columns: what samplers and pruners ask of a history, without a look at every trial's object.

A position stands for a finished trial, in the order in which this process learnt of it, which is not the order of their
numbers. Columns only grow: a finished trial never changes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from hpo.storage.trial_rows import TrialRow

Scalar = TypeVar("Scalar", bound=np.generic)
CONSTRAINTS = "constraints"  # how the system attributes begin in which Optuna keeps a trial's constraints
COST_PREFIX = "hpo:cost:"  # begins the user attributes in which a trial's costs stand, known before its first epoch
RUNG_PREFIX = "completed_rung_"  # begins those in which its halving pruners keep what a trial had to show at a rung
STANDING = np.dtype([("number", np.int64), ("value", np.float64)])  # of a trial at a rung


class GrowingArray(Generic[Scalar]):
    """A numpy array that grows at its end."""

    def __init__(self, kind: type[Scalar] | np.dtype[Scalar], fill: float = 0) -> None:
        self._fill = fill
        self._room: npt.NDArray[Scalar] = np.full(16, fill, dtype=kind)
        self._length = 0

    @property
    def array(self) -> npt.NDArray[Scalar]:
        """What it holds, as a view: not to be changed."""
        return self._room[: self._length]

    def __len__(self) -> int:
        return self._length

    def extend(self, values: Sequence[Any]) -> None:
        """Append values."""
        end = self._length + len(values)
        self._reserve(end)
        self._room[self._length : end] = values
        self._length = end  # last: another thread may look meanwhile

    def pad(self, length: int) -> None:
        """Make it at least so long, with what it is filled with."""
        self._reserve(length)
        self._length = max(self._length, length)

    def _reserve(self, length: int) -> None:
        if length > len(self._room):
            room = np.full(max(length, 2 * len(self._room)), self._fill, dtype=self._room.dtype)
            room[: self._length] = self._room[: self._length]
            self._room = room

    def put(self, positions: Sequence[int], values: Sequence[float]) -> None:
        """Set values at positions within its length."""
        self._room[positions] = values


def cost_in(attributes: Mapping[str, str], name: str) -> float:
    """Return the cost of this name that a trial's user attributes, JSON by key, tell; NaN if they do not."""
    text = attributes.get(COST_PREFIX + name)
    told = None if text is None else json.loads(text)
    return float(told) if isinstance(told, int | float) else math.nan


def violation_in(attributes: Mapping[str, str]) -> float:
    """Return the sum of what a trial's system attributes, JSON by key, say that it violates; 0 is feasible."""
    told = [json.loads(text) for key, text in attributes.items() if key.startswith(CONSTRAINTS)]
    listed = [number for one in told for number in (one if isinstance(one, list) else [one])]  # Optuna 4 wrote a list
    return float(sum(number for number in listed if number > 0))


class FinishedTrials:
    """The finished trials of one study."""

    def __init__(self) -> None:
        self._numbers = GrowingArray(np.int64)
        self._states = GrowingArray(np.int8)
        self._values = GrowingArray(np.float64)
        self._last_steps = GrowingArray(np.int64)
        self._last_values = GrowingArray(np.float64)
        self._spaces = GrowingArray(np.int32)
        self._params: dict[str, GrowingArray[np.float64]] = {}
        self._further: list[GrowingArray[np.float64]] = []  # values of the objectives after the first
        self._violations = GrowingArray(np.float64)
        self._costs: dict[str, GrowingArray[np.float64]] = {}
        self._at_step: defaultdict[int, GrowingArray[np.float64]] = defaultdict(lambda: GrowingArray(np.float64))
        self._who_at_step: defaultdict[int, GrowingArray[np.int64]] = defaultdict(lambda: GrowingArray(np.int64))
        self._percentiles: dict[tuple[int, float], tuple[int, float]] = {}  # and of how many values each is
        self._at_rung: defaultdict[str, GrowingArray[np.void]] = defaultdict(
            lambda: GrowingArray(STANDING)
        )  # by the rung's key
        self._index_of_space: dict[int, int] = {}
        self.spaces: list[dict[str, BaseDistribution]] = []  # each that a trial was given
        self.has_constraints = False  # some trial says what it violates
        self.complete = 0  # how many are COMPLETE

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, rows: Sequence[TrialRow]) -> None:
        """Take in trials that have finished."""
        start = len(self)
        self._numbers.extend([row.number for row in rows])
        self._states.extend([row.state.value for row in rows])
        self._values.extend([row.values[0] if row.values else math.nan for row in rows])
        self._last_steps.extend([row.steps[-1] if row.steps else -1 for row in rows])
        self._last_values.extend([row.curve[-1] if row.curve else math.nan for row in rows])
        self._spaces.extend([self._space(row.space) for row in rows])
        self.has_constraints |= any(key.startswith(CONSTRAINTS) for row in rows for key in row.system_attributes)
        self._violations.extend([violation_in(row.system_attributes) for row in rows])
        self._add_further(rows, start)
        self._add_costs(rows, start)
        self._add_params(rows, start)
        self._add_rungs(rows)
        self._add_curves([row for row in rows if row.state == TrialState.COMPLETE])

    def _add_further(self, rows: Sequence[TrialRow], start: int) -> None:
        most = max((len(row.values) for row in rows if row.values), default=1) - 1
        self._further += [GrowingArray(np.float64, math.nan) for _ in range(len(self._further), most)]
        for objective, column in enumerate(self._further, 1):
            column.pad(len(self))
            told = [
                (at, row.values[objective])
                for at, row in enumerate(rows, start)
                if row.values is not None and len(row.values) > objective
            ]
            column.put([at for at, _ in told], [value for _, value in told])

    def _add_costs(self, rows: Sequence[TrialRow], start: int) -> None:
        names = {key for row in rows for key in row.user_attributes if key.startswith(COST_PREFIX)}
        for name in {key.removeprefix(COST_PREFIX) for key in names} - self._costs.keys():
            self._costs[name] = GrowingArray(np.float64, math.nan)
        for name, column in self._costs.items():
            column.pad(len(self))
            column.put(range(start, len(self)), [cost_in(row.user_attributes, name) for row in rows])

    def _add_params(self, rows: Sequence[TrialRow], start: int) -> None:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for position, row in enumerate(rows, start):
            for name, value in zip(row.space, row.params, strict=True):
                positions, values = found.setdefault(name, ([], []))
                positions.append(position)
                values.append(value)
        for name in found.keys() - self._params.keys():
            self._params[name] = GrowingArray(np.float64, math.nan)
        for column in self._params.values():
            column.pad(len(self))
        for name, (positions, values) in found.items():
            self._params[name].put(positions, values)

    def _add_rungs(self, rows: Sequence[TrialRow]) -> None:
        found: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            for key, text in row.system_attributes.items():
                if key.startswith(RUNG_PREFIX):
                    found[key].append((row.number, float(text)))
        for key, standings in found.items():
            self._at_rung[key].extend(standings)

    def _add_curves(self, complete: Sequence[TrialRow]) -> None:
        found: defaultdict[int, list[float]] = defaultdict(list)
        who: defaultdict[int, list[int]] = defaultdict(list)
        for row in complete:
            for step, value in zip(row.steps, row.curve, strict=True):
                found[step].append(value)
                who[step].append(row.number)
        for step, values in found.items():
            self._who_at_step[step].extend(who[step])
            self._at_step[step].extend(values)
        self.complete += len(complete)

    def _space(self, space: dict[str, BaseDistribution]) -> int:
        index = self._index_of_space.setdefault(id(space), len(self.spaces))  # `trial_rows` shares those that are alike
        if index == len(self.spaces):
            self.spaces.append(space)  # which keeps it, and its id, alive
        return index

    # --- by position ------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The trials' numbers."""
        return self._numbers.array

    @property
    def states(self) -> npt.NDArray[np.int8]:
        """The values of their TrialStates."""
        return self._states.array

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Their values (the first objective's), NaN for one that has none."""
        return self._values.array

    def values_of(self, objective: int) -> npt.NDArray[np.float64]:
        """Return their values of an objective, likewise."""
        if objective == 0:
            return self.values
        known = objective <= len(self._further)
        return self._further[objective - 1].array if known else np.full(len(self), math.nan)

    @property
    def violations(self) -> npt.NDArray[np.float64]:
        """The sum of the constraints that each violates, 0 for one that is feasible or says nothing."""
        return self._violations.array

    def costs(self, name: str) -> npt.NDArray[np.float64]:
        """Return what each said that it costs, NaN for one that did not."""
        column = self._costs.get(name)
        return np.full(len(self), math.nan) if column is None else column.array

    @property
    def last_steps(self) -> npt.NDArray[np.int64]:
        """The last step at which each reported, -1 for one that did not."""
        return self._last_steps.array

    @property
    def last_values(self) -> npt.NDArray[np.float64]:
        """What each reported there, NaN for one that did not or reported so."""
        return self._last_values.array

    @property
    def space_indices(self) -> npt.NDArray[np.int32]:
        """Which of `spaces` each was given."""
        return self._spaces.array

    def params(self, name: str) -> npt.NDArray[np.float64]:
        """Return each trial's value of a parameter in Optuna's internal representation, NaN where it has none."""
        column = self._params.get(name)
        return np.full(len(self), math.nan) if column is None else column.array

    # --- by step ----------------------------------------------------------------------------------------------------

    def at_step(self, step: int) -> npt.NDArray[np.float64]:
        """Return what COMPLETE trials reported at a step, of those that did, NaN included."""
        column = self._at_step.get(step)
        return np.empty(0) if column is None else column.array

    def who_at_step(self, step: int) -> npt.NDArray[np.int64]:
        """Return the numbers of those that reported what `at_step` returns."""
        column = self._who_at_step.get(step)
        return np.empty(0, np.int64) if column is None else column.array

    def percentile(self, step: int, percent: float) -> float:
        """Return a percentile of what COMPLETE trials reported at a step, but for NaN; NaN if nothing is left.

        It is worked out once for as long as no other of them reported at that step.
        """
        values = self.at_step(step)
        count, known = self._percentiles.get((step, percent), (0, math.nan))
        if count != len(values):
            known = percentile(values, percent)
            self._percentiles[step, percent] = len(values), known
        return known

    # --- by rung ----------------------------------------------------------------------------------------------------

    def at_rung(self, rung: int) -> npt.NDArray[np.void]:
        """Return the STANDINGs of trials, in whichever state they ended, at a rung of successive halving."""
        column = self._at_rung.get(f"{RUNG_PREFIX}{rung}")
        return np.empty(0, STANDING) if column is None else column.array


def percentile(values: npt.NDArray[np.float64], percent: float) -> float:
    """Return a percentile of values, but for NaN; NaN if nothing is left."""
    if np.isnan(values).all():
        return math.nan
    with np.errstate(invalid="ignore"):  # there is nothing between -inf and inf
        return float(np.nanpercentile(values, percent))
