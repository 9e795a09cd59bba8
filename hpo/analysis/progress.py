"""How the best value improved while the search spent epochs and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpo.analysis.columns import Columns, Floats, Positions

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The finished trials in the order of their ends, with what had been spent when each of them ended."""

    order: Positions  # positions in the columns
    epochs: npt.NDArray[np.int64]  # of all trials that had ended
    hours: Floats  # in which at least one trial ran

    def improvements(self, columns: Columns, objective: int = 0) -> list[int]:
        """Return the places in `order` of the trials that were better in an objective than all before."""
        losses = columns.losses(objective)
        found, best = [], np.inf
        for place, position in enumerate(self.order.tolist()):
            if columns.is_feasible[position] and losses[position] < best:
                best = losses[position]
                found.append(place)
        return found


def of_study(columns: Columns) -> Progress:
    """Return a study's progress. What a fork copied has cost nothing."""
    ended = columns.ended
    order = np.lexsort((columns.numbers, ended))
    own = ~columns.is_imported
    spent = np.where(own, columns.epochs, 0)[order]
    hours = np.zeros(len(order))
    if own.any():
        busy = busy_seconds(columns.started[own], columns.ended[own], ended[order])
        hours = np.where(own[order], busy, 0.0) / SECONDS_PER_HOUR
    return Progress(order=order, epochs=np.cumsum(spent), hours=hours)


def busy_seconds(starts: Floats, ends: Floats, until: Floats) -> Floats:
    """Return in how many seconds at least one span (start, end) was open, up to each of these moments."""
    covered, last, edges, totals = 0.0, -np.inf, [], []
    for start, end in sorted(zip(starts.tolist(), ends.tolist(), strict=True)):
        start = max(start, last)
        if end <= start:
            continue
        edges += [start, end]
        totals += [covered, covered + end - start]
        covered, last = totals[-1], end
    return np.interp(until, edges, totals) if edges else np.zeros(len(until))


def sampled(positions: Sequence[int], most: int, *, keep: Sequence[int] = (), seed: int = 0) -> list[int]:
    """Return at most `most` of these positions, in their order: those to keep first of all, the others at random."""
    if len(positions) <= most:
        return list(positions)
    kept = set(list(dict.fromkeys(keep))[:most])
    others = [position for position in positions if position not in kept]
    drawn = np.random.default_rng(seed).choice(len(others), most - len(kept), replace=False)
    chosen = kept | {others[place] for place in drawn.tolist()}
    return [position for position in positions if position in chosen]
