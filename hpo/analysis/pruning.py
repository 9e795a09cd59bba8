"""What a pruner saved, and what it may have cost.

The saving is counted: the epochs that pruned trials did not train. The cost is an estimate. A pruned trial might have improved
from its last epoch as those complete trials did that were nearest to it in value at the same epoch. The share of them whose
improvement would have made it the best is its chance of having been the best.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpo.analysis.columns import RATES, Columns, Floats

FEWEST = 10  # complete trials with a value at an epoch, from which a chance is estimated
ALIKE = (
    0.2  # share of the complete trials, those nearest in value at that epoch, from whose improvement it is estimated
)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What pruning did in one study."""

    pruned: int  # trials
    trained: int  # epochs of all finished trials
    saved: int  # epochs that pruned trials did not train
    judged: int  # pruned trials for which a chance could be estimated
    missed: float  # the sum of their chances: how many pruned trials would have become the best

    @property
    def share(self) -> float:
        """The share of the epochs that was saved."""
        whole = self.trained + self.saved
        return self.saved / whole if whole else 0.0


def of_study(columns: Columns) -> Pruning | None:
    """Return what pruning did, None if nothing was pruned or it is not known how long trials were to train."""
    own = ~columns.is_imported
    at = np.flatnonzero(columns.is_pruned & own & ~np.isnan(columns.lengths))
    if not len(at):
        return None
    saved = np.maximum(columns.lengths[at] - columns.epochs[at], 0).sum()
    chances = _chances(columns, at.tolist())
    return Pruning(
        pruned=len(at),
        trained=int(columns.epochs[own].sum()),
        saved=int(saved),
        judged=len(chances),
        missed=float(sum(chances)),
    )


def _chances(columns: Columns, pruned: Sequence[int]) -> list[float]:
    """Return the chance of each pruned trial that it would have become the best; none of those of which too little is known."""
    if not len(columns.leaders):
        return []
    best = columns.losses()[columns.leaders[0]]
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for position in pruned:
        row = columns.rows[position]
        if row.steps and math.isfinite(row.curve[-1]):
            by_step[row.steps[-1]].append(row.curve[-1] * _rate(columns))
    found: list[float] = []
    for step, losses in by_step.items():
        then, gains = improvements(columns, step)
        if len(gains) >= FEWEST:
            alike = max(FEWEST, math.ceil(ALIKE * len(gains)))
            for loss in losses:
                nearest = np.argpartition(np.abs(then - loss), alike - 1)[:alike]
                found.append(float(np.mean(loss - gains[nearest] < best)))
    return found


def improvements(columns: Columns, step: int) -> tuple[Floats, Floats]:
    """Return the loss of each COMPLETE trial at a step, and by how much its value is better."""
    then, who = columns.finished.at_step(step) * _rate(columns), columns.finished.who_at_step(step)
    ended = columns.losses()[np.searchsorted(columns.numbers, who)]
    known = np.isfinite(then) & np.isfinite(ended)
    return then[known], (then - ended)[known]


def _rate(columns: Columns) -> float:
    return RATES[columns.goals.directions[columns.goals.first]]
