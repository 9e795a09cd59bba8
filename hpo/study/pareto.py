"""The order of the best trials. With several objectives, only those on the Pareto front count."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpo.spec.objectives import Goals

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]


def is_non_dominated(losses: Floats) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows that no other row dominates.

    A row dominates another if it is at least as good in every objective and better in one. Equal rows do not dominate
    each other.

    Args:
        losses: [trials, objectives], where less is better.
    """
    found, which = np.unique(losses, axis=0, return_inverse=True)  # sorted: no row is dominated by a later one
    leads = np.zeros(len(found), dtype=bool)
    left = np.arange(len(found))
    while len(left):
        leads[left[0]] = True
        left = left[(found[left] < found[left[0]]).any(axis=1)]
    mask: npt.NDArray[np.bool_] = leads[which.reshape(-1)]
    return mask


def best_trials(goals: Goals, numbers: npt.NDArray[np.int64], values: Floats, violations: Floats) -> Positions:
    """Return the positions of the COMPLETE trials that violate nothing, the best in the first objective first.

    Ties go to the lower number. With several objectives, only the Pareto front is returned.

    Args:
        goals: the objectives and their directions.
        numbers: [trials].
        values: [trials, objectives].
        violations: [trials], above 0 for a trial that violates a constraint.
    """
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in goals.directions.values()]
    feasible = np.flatnonzero(violations <= 0)
    losses = values[feasible] * signs
    if goals.are_several and len(feasible):
        mask = is_non_dominated(losses)
        feasible, losses = feasible[mask], losses[mask]
    return feasible[np.lexsort((numbers[feasible], losses[:, 0]))]
