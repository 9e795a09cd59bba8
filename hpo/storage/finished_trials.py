"""Finished trials as numpy columns, from which samplers and pruners decide without an object for each trial.

A position is a finished trial's index in each column. Positions follow the order in which this process read the trials,
which is not the order of their numbers. Columns only grow: a finished trial never changes.
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

from hpo.storage.tables import CONSTRAINTS, COST_PREFIX, DIVERGED_KEY
from hpo.storage.trial_rows import TrialRow

Scalar = TypeVar("Scalar", bound=np.generic)
RUNG_PREFIX = (
    "completed_rung_"  # prefix of Optuna's system attributes with a trial's value at a rung of successive halving
)
STANDING = np.dtype([("number", np.int64), ("value", np.float64)])  # a trial at a rung


class GrowingArray(Generic[Scalar]):
    """A numpy array that grows at its end."""

    def __init__(self, kind: type[Scalar] | np.dtype[Scalar], fill: float = 0) -> None:
        self._fill = fill
        self._room: npt.NDArray[Scalar] = np.full(16, fill, dtype=kind)
        self._length = 0

    @property
    def array(self) -> npt.NDArray[Scalar]:
        """The contents, as a view that must not be changed."""
        return self._room[: self._length]

    def __len__(self) -> int:
        return self._length

    def extend(self, values: Sequence[Any]) -> None:
        """Append values."""
        end = self._length + len(values)
        self._reserve(end)
        self._room[self._length : end] = values
        self._length = end  # set last: another thread may read meanwhile

    def pad(self, length: int) -> None:
        """Extend it to at least this length with the fill value."""
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
    """Return the cost of this name in a trial's user attributes (JSON by key), NaN if there is none."""
    text = attributes.get(COST_PREFIX + name)
    told = None if text is None else json.loads(text)
    return float(told) if isinstance(told, int | float) else math.nan


def violation_in(attributes: Mapping[str, str]) -> float:
    """Return the sum of the violations in a trial's system attributes (JSON by key). 0 is feasible."""
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
        self._further: list[GrowingArray[np.float64]] = []  # values of the second and later objectives
        self._violations = GrowingArray(np.float64)
        self._diverged = GrowingArray(np.bool_)
        self._costs: dict[str, GrowingArray[np.float64]] = {}
        self._at_step: defaultdict[int, GrowingArray[np.float64]] = defaultdict(lambda: GrowingArray(np.float64))
        self._who_at_step: defaultdict[int, GrowingArray[np.int64]] = defaultdict(lambda: GrowingArray(np.int64))
        self._rows: list[TrialRow] = []  # those of the cache, by position
        self._first_from: defaultdict[int, GrowingArray[np.float64]] = defaultdict(lambda: GrowingArray(np.float64))
        self._percentiles: dict[tuple[int, float], tuple[int, float]] = {}  # with the number of values
        self._at_rung: defaultdict[str, GrowingArray[np.void]] = defaultdict(
            lambda: GrowingArray(STANDING)
        )  # by attribute key
        self._index_of_space: dict[int, int] = {}
        self.spaces: list[dict[str, BaseDistribution]] = []  # all search spaces of trials, each once
        self.has_constraints = False  # whether some trial has constraints
        self.complete = 0  # number of COMPLETE trials
        self.derived: dict[str, Any] = {}  # what others have computed from the trials, by their own names

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, rows: Sequence[TrialRow]) -> None:
        """Add finished trials."""
        start = len(self)
        self._rows.extend(rows)
        self._numbers.extend([row.number for row in rows])
        self._states.extend([row.state.value for row in rows])
        self._values.extend([row.values[0] if row.values else math.nan for row in rows])
        self._last_steps.extend([row.steps[-1] if row.steps else -1 for row in rows])
        self._last_values.extend([row.curve[-1] if row.curve else math.nan for row in rows])
        self._spaces.extend([self._space(row.space) for row in rows])
        self.has_constraints |= any(key.startswith(CONSTRAINTS) for row in rows for key in row.system_attributes)
        self._violations.extend([violation_in(row.system_attributes) for row in rows])
        self._diverged.extend([DIVERGED_KEY in row.user_attributes for row in rows])
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
        index = self._index_of_space.setdefault(id(space), len(self.spaces))  # `trial_rows` shares equal spaces
        if index == len(self.spaces):
            self.spaces.append(space)  # the reference keeps its id valid
        return index

    # --- by position ------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The trials' numbers."""
        return self._numbers.array

    @property
    def states(self) -> npt.NDArray[np.int8]:
        """The integer values of the trials' TrialStates."""
        return self._states.array

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The trials' values of the first objective, NaN for a trial without values."""
        return self._values.array

    def values_of(self, objective: int) -> npt.NDArray[np.float64]:
        """Return the trials' values of an objective, NaN for a trial without one."""
        if objective == 0:
            return self.values
        known = objective <= len(self._further)
        return self._further[objective - 1].array if known else np.full(len(self), math.nan)

    @property
    def violations(self) -> npt.NDArray[np.float64]:
        """The sum of each trial's violations, 0 for a trial that is feasible or has no constraints."""
        return self._violations.array

    @property
    def diverged(self) -> npt.NDArray[np.bool_]:
        """Whether each trial was pruned because it diverged."""
        return self._diverged.array

    def costs(self, name: str) -> npt.NDArray[np.float64]:
        """Return each trial's cost of this name, NaN for a trial without one."""
        column = self._costs.get(name)
        return np.full(len(self), math.nan) if column is None else column.array

    @property
    def last_steps(self) -> npt.NDArray[np.int64]:
        """Each trial's last reported step, -1 for a trial without reports."""
        return self._last_steps.array

    @property
    def last_values(self) -> npt.NDArray[np.float64]:
        """Each trial's value at its last step, NaN for a trial without reports."""
        return self._last_values.array

    @property
    def space_indices(self) -> npt.NDArray[np.int32]:
        """The index in `spaces` of each trial's search space."""
        return self._spaces.array

    def params(self, name: str) -> npt.NDArray[np.float64]:
        """Return each trial's value of a parameter in Optuna's internal representation, NaN for a trial without it."""
        column = self._params.get(name)
        return np.full(len(self), math.nan) if column is None else column.array

    def first_from(self, step: int) -> npt.NDArray[np.float64]:
        """Return each trial's first value that was reported at or after a step, NaN if there is none."""
        column = self._first_from[step]
        column.extend([row.first_from(step) for row in self._rows[len(column) : len(self)]])
        return column.array

    # --- by step ----------------------------------------------------------------------------------------------------

    def at_step(self, step: int) -> npt.NDArray[np.float64]:
        """Return the values that COMPLETE trials reported at a step, NaN included."""
        column = self._at_step.get(step)
        return np.empty(0) if column is None else column.array

    def who_at_step(self, step: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the trials whose values `at_step` returns."""
        column = self._who_at_step.get(step)
        return np.empty(0, np.int64) if column is None else column.array

    def percentile(self, step: int, percent: float) -> float:
        """Return a percentile of the values of COMPLETE trials at a step. NaN values are left out; NaN if none is left.

        It is cached until the step has more values.
        """
        values = self.at_step(step)
        count, known = self._percentiles.get((step, percent), (0, math.nan))
        if count != len(values):
            known = percentile(values, percent)
            self._percentiles[step, percent] = len(values), known
        return known

    # --- by rung ----------------------------------------------------------------------------------------------------

    def at_rung(self, rung: int) -> npt.NDArray[np.void]:
        """Return the STANDINGs of all finished trials at a rung of successive halving."""
        column = self._at_rung.get(f"{RUNG_PREFIX}{rung}")
        return np.empty(0, STANDING) if column is None else column.array


def percentile(values: npt.NDArray[np.float64], percent: float) -> float:
    """Return a percentile of values. NaN values are left out; NaN if none is left."""
    if np.isnan(values).all():
        return math.nan
    with np.errstate(invalid="ignore"):  # interpolation between -inf and inf
        return float(np.nanpercentile(values, percent))
