"""TPE that ranks trials of unequal length at the highest rung that enough of them have reached.

Optuna's TPE ranks COMPLETE trials first, then pruned ones by how far they got. So a pruner that lets few trials end leaves it
little to learn from. Here all trials that reached a rung are compared by their values there: COMPLETE, pruned, parked and
running ones. The estimators and the drawing are those of `tpe.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.rungs import Bools, Curves, Floats, Ladder, Positions
from hpo.strategy.tpe import ArrayTPE, Look, RankedTrials, Space

ENOUGH = 8  # trials at a rung, from which on they are compared there


class RungRanking:
    """The trials of a study in order, as far as they can be compared.

    The trials that reached the highest rung with enough trials come first, by their value there. The other finished trials
    follow, by last step (later is better), then by the value there. NaN is worst. Of equal trials the lower number comes
    first. Diverged trials come last. Running trials below the rung have no rank. Above all rungs is the end of the training,
    which only COMPLETE trials have reached.
    """

    def __init__(self, curves: Curves, sign: float, enough: int = ENOUGH) -> None:
        """Rank trials.

        Args:
            curves: the trials.
            sign: the factor, 1 or -1, after which lower values are better.
            enough: the number of trials that must have reached a rung. If none has as many, it is the lowest rung.
        """
        reached, there = _highest(curves, enough)
        scores = sign * np.where(reached, there, curves.last_values)
        scores[np.isnan(scores)] = math.inf
        worse = (~reached).astype(np.int8) + curves.is_diverged
        order = np.lexsort((curves.numbers, scores, np.where(reached, 0, -curves.last_steps), worse))
        self.reached = int(reached.sum())  # number of trials that reached the rung
        self.order: Positions = order[(reached | ~curves.is_running)[order]]


def _highest(curves: Curves, enough: int) -> tuple[Bools, Floats]:
    """Return which trials have reached the highest rung with enough trials, and their values there."""
    if curves.is_complete.sum() >= enough:
        return curves.is_complete, curves.finals
    furthest = int(curves.last_steps.max(initial=0))
    rungs = list(curves.ladder.up_to(furthest)) or [0]
    counts = ~curves.is_diverged

    def at(rung: int) -> tuple[Bools, Floats]:
        reached, values = curves.at_rung(rung)
        return reached & counts, values

    return next((found for found in map(at, reversed(rungs)) if found[0].sum() >= enough), at(0))


@dataclass(frozen=True)
class RungLook(Look):
    """The input of a trial's sampler: a ranking, and the parameters of all other running trials."""

    ranking: RungRanking
    at: Positions  # of the finished trials that are ranked, in the columns

    def __len__(self) -> int:
        return len(self.ranking.order)

    @property
    def compared(self) -> int:
        """The number of trials that reached the rung."""
        return self.ranking.reached

    def good_and_bad(self, good: int, space: Space) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the internal values of the best `good` trials and of the others, by parameter.

        Running trials below the rung count as others, so that parallel workers do not all try the same point.
        """
        is_good = np.zeros(len(self.at) + len(self.running), bool)
        is_good[self.ranking.order[:good]] = True
        return self._values_of(is_good, space), self._values_of(~is_good, space)

    def _values_of(self, which: Bools, space: Space) -> dict[str, Any]:
        chosen = dict(itertools.compress(self.running.items(), which[len(self.at) :]))
        return self.values(self.at[which[: len(self.at)]], chosen, space)


class FidelityTPE(ArrayTPE):
    """TPE whose good trials are the best at the highest rung that enough trials have reached.

    On another storage than ours, with several objectives or with constraints it is Optuna's TPE.
    """

    def __init__(self, *, ladder: Ladder, enough: int = ENOUGH, **settings: Any) -> None:
        super().__init__(constant_liar=True, **settings)
        self._ladder = ladder
        self._enough = enough

    def look_of(self, columns: FinishedTrials, running: Sequence[TrialRow], study: optuna.Study) -> Look:
        """Return the look at finished trials and at other running ones, which are given by ascending number."""
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        curves = Curves.of(columns, running, self._ladder)
        return RungLook(
            history=RankedTrials(columns, study.direction),
            running={row.number: self.params_of(row, study) for row in running},
            ranking=RungRanking(curves, sign, self._enough),
            at=curves.at,
        )
