"""The unused rows of a table, and the row that is nearest to a sampler's proposal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.lab.table import Table

Floats = npt.NDArray[np.float64]
Proposal = Mapping[str, tuple[BaseDistribution, float]]  # by parameter: its distribution and its internal value


def unit(distribution: BaseDistribution, internal: Floats | float) -> Floats:
    """Return internal values on the scale of their range: 0 at its low end, 1 at its high end. Choices stay as they are."""
    values = np.asarray(internal, np.float64)
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return values
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        low, high, values = math.log(low), math.log(high), np.log(values)
    found: Floats = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return found


@dataclass(frozen=True, kw_only=True)
class Match:
    """The row that stands for a proposal."""

    place: int  # in the table
    distance: float
    is_of_branch: bool  # it has the parameters of the proposal


def covering(ranges: Sequence[BaseDistribution]) -> BaseDistribution:
    """Return the range of a parameter over several trials. A user's own objective may ask each for another range."""
    first = ranges[0]
    if not isinstance(first, FloatDistribution | IntDistribution):
        return first
    lows, highs = ([getattr(one, end) for one in ranges] for end in ("low", "high"))
    return FloatDistribution(float(min(lows)), float(max(highs)), log=first.log)


class _Branch:
    """The rows that have the same parameters."""

    def __init__(self, table: Table, places: list[int]) -> None:
        self.places = np.array(places)
        self.is_free = np.ones(len(places), dtype=bool)
        rows = [table.rows[place] for place in places]
        columns = {
            name: np.array([dict(zip(row.space, row.params, strict=True))[name] for row in rows])
            for name in rows[0].space
        }
        self._ranges = {name: covering([row.space[name] for row in rows]) for name in rows[0].space}
        self._units = {name: unit(self._ranges[name], values) for name, values in columns.items()}

    def distances(self, proposal: Proposal) -> Floats:
        """Return the distance of each row: the root of the mean squared difference of the parameters.

        A number's difference is a share of its range. Another choice counts 1, and so does a parameter that one side lacks.
        """
        names = dict.fromkeys((*self._units, *proposal))  # in one order, as a sum of floats depends on it
        total = np.zeros(len(self.places))
        for name in names:
            total += self._squared(name, proposal) if name in self._units and name in proposal else 1.0
        found: Floats = np.where(self.is_free, np.sqrt(total / max(len(names), 1)), math.inf)
        return found

    def _squared(self, name: str, proposal: Proposal) -> Floats:
        distribution, internal = proposal[name]
        difference = self._units[name] - unit(self._ranges[name], internal)
        found: Floats = (difference != 0) * 1.0 if isinstance(distribution, CategoricalDistribution) else difference**2
        return found


class Pool:
    """The unused rows of a table, by branch. A branch is the set of the parameters that a trial has."""

    def __init__(self, table: Table, places: Iterable[int]) -> None:
        """Take the rows at these places of the table."""
        by_branch: dict[frozenset[str], list[int]] = {}
        for place in places:
            by_branch.setdefault(frozenset(table.rows[place].space), []).append(place)
        self._branches = {names: _Branch(table, found) for names, found in by_branch.items()}
        self._left = sum(map(len, by_branch.values()))

    def __len__(self) -> int:
        return self._left

    def take(self, proposal: Proposal) -> Match:
        """Use up the nearest unused row of the proposal's branch, of all branches if that has none. Ties: the first row."""
        branch = self._branches.get(frozenset(proposal))
        is_of_branch = branch is not None and bool(branch.is_free.any())
        among = [branch] if branch is not None and is_of_branch else list(self._branches.values())
        distances = [one.distances(proposal) for one in among]
        nearest = min(range(len(among)), key=lambda at: distances[at].min())
        at = int(distances[nearest].argmin())
        among[nearest].is_free[at] = False
        self._left -= 1
        return Match(
            place=int(among[nearest].places[at]), distance=float(distances[nearest][at]), is_of_branch=is_of_branch
        )
