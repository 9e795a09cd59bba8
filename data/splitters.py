"""Rules that divide rows into two: by class, by quantile, by group or by time. Each holds out a part and makes folds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpo.data import stratify

Rows = npt.NDArray[np.int64]

QUANTILES = 10  # most strata of a regression's target
FEWEST_OF_QUANTILE = 8  # rows; so each part of 70/15/15 has at least one, for any rounding
MANY_GROUPS = 10_000  # more are put into folds by chance, since balancing them takes seconds in each worker
CANDIDATES = 100  # choices of whole groups, of which the one nearest to the wanted shares is taken


class Splitter(Protocol):
    """Divides rows into two. All rows are given and returned by number, sorted."""

    def hold_out(self, rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rest of the rows, and about `count` that are held out."""

    def fold(self, rows: Rows, folds: int, number: int, seed: int) -> tuple[Rows, Rows]:
        """Return the training and the validation rows of a fold, which is counted from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ByClass:
    """Each part has the same share of each class. With one class for all it is plain random."""

    classes: Rows  # [N]

    def hold_out(self, rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rest of the rows and `count` of them."""
        rest, held = stratify.held_out(self.classes[rows], count, seed % 2**32)
        return rows[rest], rows[held]

    def fold(self, rows: Rows, folds: int, number: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rows outside and inside of a fold."""
        outside, inside = stratify.fold(self.classes[rows], folds, number, seed % 2**32)
        return rows[outside], rows[inside]


@dataclass(frozen=True, kw_only=True, eq=False)
class ByQuantile:
    """Each part has the same share of each quantile of a number."""

    values: npt.NDArray[Any]  # [N]

    def hold_out(self, rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rest of the rows and `count` of them."""
        return self._within(rows, FEWEST_OF_QUANTILE).hold_out(rows, count, seed)

    def fold(self, rows: Rows, folds: int, number: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rows outside and inside of a fold."""
        return self._within(rows, folds).fold(rows, folds, number, seed)

    def _within(self, rows: Rows, fewest: int) -> ByClass:
        """Return the splitter by the quantiles of these rows."""
        classes = np.zeros(len(self.values), dtype=np.int64)
        classes[rows] = quantiles(self.values[rows], fewest)
        return ByClass(classes=classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class ByGroup:
    """No group has rows in two parts. Sizes and classes come as near to the wanted shares as whole groups allow."""

    groups: Rows  # [N]
    classes: Rows  # [N]; the same number for all rows if there are no classes

    def hold_out(self, rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rest of the rows and about `count` of them. ValueError if they have a single group."""
        from sklearn.metrics.cluster import contingency_matrix  # here, since its import takes a second
        from sklearn.model_selection import ShuffleSplit

        named, of_row = np.unique(self.groups[rows], return_inverse=True)
        if len(named) < 2:
            raise ValueError('split = "group": all rows that are to be divided have one group; give more groups')
        share = count / len(rows)
        choices = [
            held for _, held in ShuffleSplit(CANDIDATES, test_size=share, random_state=seed % 2**32).split(named)
        ]
        counts = contingency_matrix(of_row, self.classes[rows], sparse=True)  # [groups, classes]
        whole = np.asarray(counts.sum(0))
        of_choices = np.concatenate([np.asarray(counts[held].sum(0)) for held in choices])  # [choices, classes]
        missing = ((of_choices == 0) | (of_choices == whole)).sum(1)  # classes that one of the two parts lacks
        best = choices[np.lexsort((np.abs(of_choices - share * whole).sum(1), missing))[0]]
        is_held = np.isin(of_row, best)
        return rows[~is_held], rows[is_held]

    def fold(self, rows: Rows, folds: int, number: int, seed: int) -> tuple[Rows, Rows]:
        """Return the rows outside and inside of a fold. ValueError if there are fewer groups than folds."""
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

        count = len(np.unique(self.groups[rows]))
        if count < folds:
            raise ValueError(
                f'folds = {folds}, split = "group": train and validation have {count} groups; give at most {count} folds'
            )
        kind = StratifiedGroupKFold if count <= MANY_GROUPS else GroupKFold
        splitter = kind(folds, shuffle=True, random_state=seed % 2**32)
        outside, inside = list(splitter.split(rows, self.classes[rows], self.groups[rows]))[number]
        return rows[outside], rows[inside]


@dataclass(frozen=True, kw_only=True, eq=False)
class ByTime:
    """Each part begins after the end of the one before it. Rows of one time stay together. A seed changes nothing."""

    times: npt.NDArray[Any]  # [N]

    def hold_out(self, rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:  # noqa: ARG002 (as all splitters)
        """Return the earlier rows and about `count` later ones. ValueError if all have one time."""
        times = self.times[rows]
        begin = np.sort(times)[len(rows) - count]
        if begin == times.min():
            raise ValueError(
                f'split = "time": {int((times == begin).sum())} of {len(rows)} rows have the first time, {begin}, so nothing '
                "lies before the later part; give finer times"
            )
        is_held = times >= begin
        return rows[~is_held], rows[is_held]

    def fold(self, rows: Rows, folds: int, number: int, seed: int) -> tuple[Rows, Rows]:  # noqa: ARG002
        """Return all rows before a block of time, and those of the block. ValueError if times are too few or too coarse."""
        from sklearn.model_selection import TimeSeriesSplit

        times = self.times[rows]
        distinct = len(np.unique(times))
        if distinct <= folds:
            raise ValueError(
                f'folds = {folds}, split = "time": train and validation have {distinct} different times, and the first '
                f"fold trains on rows before all blocks; give at most {distinct - 1} folds"
            )
        in_order = np.sort(times)
        _, block = list(TimeSeriesSplit(folds).split(in_order))[number]
        begin = in_order[block[0]]
        is_inside = times >= begin
        if block[-1] + 1 < len(rows):
            is_inside &= times < in_order[block[-1] + 1]
        is_before = times < begin
        if not (is_before.any() and is_inside.any()):
            raise ValueError(
                f'folds = {folds}, fold = {number}, split = "time": so many rows have the time {begin} that a part is empty; '
                "give fewer folds, or finer times"
            )
        return rows[is_before], rows[is_inside]


def quantiles(values: npt.NDArray[Any], fewest: int) -> Rows:
    """Return the quantile of each value, from 0: of equal sizes, at most `QUANTILES`, each of at least `fewest` rows."""
    count = max(1, min(QUANTILES, len(values) // fewest))
    found = np.empty(len(values), dtype=np.int64)
    for number, places in enumerate(np.array_split(np.argsort(values, kind="stable"), count)):
        found[places] = number
    return found


def refuse_narrow_classes(groups: Rows, classes: Rows, parts: int, said: Callable[[int, int], str]) -> None:
    """Raise ValueError if a class lies in fewer groups than there are parts.

    Args:
        parts: number of parts that are divided.
        said: returns a class's name with one of its places, by the class and a row.
    """
    pairs = np.unique(np.stack([classes, groups]), axis=1)
    numbers, counts = np.unique(pairs[0], return_counts=True)
    narrow = np.flatnonzero(counts < parts)
    if not len(narrow):
        return
    number, count = int(numbers[narrow[0]]), int(counts[narrow[0]])
    more = f", and {len(narrow) - 1} more classes are like it" if len(narrow) > 1 else ""
    raise ValueError(
        f'split = "group": class {said(number, int(np.argmax(classes == number)))} lies in {count} '
        f"group{'s' * (count > 1)}{more}: too few for {parts} parts that share no group; add groups, or write the classes to "
        "keep into `classes`"
    )
