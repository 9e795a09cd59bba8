"""The importance of parameters by PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023), for many sets of best trials at once.

A parameter is important if its values in the best trials are distributed unlike those in all trials. The numbers are those of
Optuna's `PedAnovaImportanceEvaluator`. Optuna computes one set of best trials; a bound by permutation or bootstrap needs
hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

GRID = 50  # cells of a numeric parameter
NARROWEST = 0.5 / 1.64  # the least bandwidth in cells, so that 90 % of a kernel lie in its cell
TINY = 1e-12  # added to densities, against a division by 0
PRIOR = 1.0  # weight of the prior, in trials


def cells(distribution: BaseDistribution, stored: Floats) -> tuple[Integers, int]:
    """Return the grid cell of each value of a parameter, as Optuna stores it, and the number of cells."""
    if isinstance(distribution, CategoricalDistribution):
        return stored.astype(np.int64), len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, count = float(distribution.low), float(distribution.high), GRID
    if isinstance(distribution, IntDistribution) and distribution.log:
        count = min(math.ceil(math.log2(high - low + 1)) + 1, count)
    elif distribution.step is not None:
        count = min(round((high - low) / distribution.step) + 1, count)
    if distribution.log:
        low, high, stored = math.log(low), math.log(high), np.log(stored)
    places = np.ceil((stored - low) / ((high - low) / (count - 1)) - 0.5)
    return np.clip(places, 0, count - 1).astype(np.int64), count


def divergences(at: Integers, count: int, best: Iterable[npt.NDArray[Any]], *, is_choice: bool) -> Floats:
    """Return how much the values in sets of best trials differ from those in all trials: Pearson's divergence, by set.

    Args:
        at: the cell of each trial [N].
        count: the number of cells.
        best: the trials in each set: a mask [N], or positions, where a trial that is drawn twice stands twice.
        is_choice: the cells have no order.
    """
    weights = np.stack([np.bincount(at[members], minlength=count) for members in best]).astype(float)
    everywhere = np.bincount(at, minlength=count).astype(float)[None]
    density = _of_choices if is_choice else _of_numbers
    top, local = density(weights) + TINY, density(everywhere) + TINY
    found: Floats = (local * (top / local - 1) ** 2).sum(axis=1)
    return found


def _of_choices(weights: Floats) -> Floats:
    """Return the densities over cells without order. [S, C] -> [S, C]"""
    count = weights.shape[1]
    kernels = (weights > 0).sum(axis=1, keepdims=True) + 1.0  # the cells that occur, and the prior
    share = PRIOR / kernels  # what each kernel gives to all cells
    occurring = weights / (1 + share * count)
    told = occurring + share * occurring.sum(axis=1, keepdims=True) + PRIOR / count
    found: Floats = told / (weights.sum(axis=1, keepdims=True) + PRIOR)
    return found


def _of_numbers(weights: Floats) -> Floats:
    """Return the densities over ordered cells, by normal kernels with Scott's bandwidth. [S, C] -> [S, C]"""
    sets, count = weights.shape
    grid = np.arange(count, dtype=float)
    found = np.empty_like(weights)
    prior = _kernels(np.array([(count - 1) / 2]), grid, float(count))[0]
    for place in range(sets):
        occurring = np.flatnonzero(weights[place])
        of_cells = weights[place, occurring]
        kernels = _kernels(occurring.astype(float), grid, _bandwidth(occurring.astype(float), of_cells))
        found[place] = (of_cells @ kernels + PRIOR * prior) / (of_cells.sum() + PRIOR)
    return found


def _bandwidth(cells_taken: Floats, weights: Floats) -> float:
    cumulated = weights.cumsum()
    total = cumulated[-1]
    mean = cells_taken @ weights / total
    deviation = np.sqrt((cells_taken - mean) ** 2 @ weights / max(1, total - 1))
    lower = np.searchsorted(cumulated, total // 4, side="left")
    upper = min(len(cells_taken) - 1, np.searchsorted(cumulated, total * 3 // 4, side="right"))
    between = cells_taken[upper] - cells_taken[lower]
    return max(float(1.059 * min(between / 1.34, deviation) * total**-0.2), NARROWEST)


def _kernels(middles: Floats, grid: Floats, width: float) -> Floats:
    """Return normal kernels of one width, cut off at the ends of the grid. [K], [C] -> [K, C]"""
    edges = ndtr((np.append(grid, grid[-1] + 1)[None] - 0.5 - middles[:, None]) / width)
    found: Floats = np.diff(edges, axis=1) / (edges[:, -1:] - edges[:, :1])
    return found
