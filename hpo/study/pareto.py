"""Which trials lead: of several objectives the front, the trials that none beats; of one objective the best."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpo.spec.objectives import Goals

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]


def is_non_dominated(losses: Floats) -> npt.NDArray[np.bool_]:
    """Say of each row of losses [trials, objectives], less being better, whether no other beats it.

    One beats another that is at least as good in every objective and better in one (Pareto); of equal ones none does.
    """
    found, which = np.unique(losses, axis=0, return_inverse=True)  # in lexical order: nobody is beaten by a later one
    leads = np.zeros(len(found), dtype=bool)
    left = np.arange(len(found))
    while len(left):
        leads[left[0]] = True
        left = left[(found[left] < found[left[0]]).any(axis=1)]
    mask: npt.NDArray[np.bool_] = leads[which.reshape(-1)]
    return mask


def best_trials(goals: Goals, numbers: npt.NDArray[np.int64], values: Floats, violations: Floats) -> Positions:
    """Return the positions of the COMPLETE trials that violate nothing, the best in the first objective first, of equal ones
    the lower number; of several objectives those on the front.

    Args:
        values: [trials, objectives].
        violations: of each, more than 0 for a trial that is no result.
    """
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in goals.directions.values()]
    feasible = np.flatnonzero(violations <= 0)
    losses = values[feasible] * signs
    if goals.are_several and len(feasible):
        mask = is_non_dominated(losses)
        feasible, losses = feasible[mask], losses[mask]
    return feasible[np.lexsort((numbers[feasible], losses[:, 0]))]
