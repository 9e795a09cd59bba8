"""TPE that ranks trials of unequal length at the highest rung that enough of them have reached.

Optuna's TPE ranks COMPLETE trials first, then pruned ones by how far they got. So a pruner that lets few trials end leaves it
little to learn from. Here all trials that reached a rung are compared by their values there: COMPLETE, pruned, parked and
running ones. The estimators and the drawing are those of `tpe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.rungs import Bools, Curves, Floats, Integers, Ladder, Positions
from hpo.strategy.tpe import ArrayTPE, Look, Observed, RankedTrials, Space, joined

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
class Ranked:
    """The finished trials of a study and the running ones that have reported, in order. Trials opened together share it."""

    history: RankedTrials
    ranking: RungRanking
    at: Positions  # of the finished trials, in the columns
    numbers: Integers  # of the running trials
    _parted: dict[tuple[int, tuple[str, ...]], tuple[tuple[Observed, Observed], set[int]]] = field(default_factory=dict)

    def parted(self, count: int, space: Space) -> tuple[tuple[Observed, Observed], set[int]]:
        """Return the observations of the best finished trials and of the others, and the numbers of the best running ones.

        The observations must not be changed.
        """
        key = count, tuple(space)  # a parameter's kind is the same in all trials of a study
        if key not in self._parted:
            is_first, numbers = self.first(count)
            of = self.history.observations
            self._parted[key] = (of(self.at[is_first], space), of(self.at[~is_first], space)), numbers
        return self._parted[key]

    def first(self, count: int) -> tuple[Bools, set[int]]:
        """Return the best trials: which of the finished ones, and the numbers of the running ones."""
        is_first = np.zeros(len(self.at) + len(self.numbers), bool)
        is_first[self.ranking.order[:count]] = True
        return is_first[: len(self.at)], set(self.numbers[is_first[len(self.at) :]].tolist())


@dataclass(frozen=True)
class RungLook(Look):
    """The input of a trial's sampler: the ranked trials, and the parameters of all other running trials."""

    ranked: Ranked

    def __len__(self) -> int:
        return len(self.ranked.ranking.order)

    @property
    def compared(self) -> int:
        """The number of trials that reached the rung."""
        return self.ranked.ranking.reached

    def good_and_bad(self, good: int, space: Space) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the internal values of the best `good` trials and of the others, by parameter.

        Running trials below the rung count as others, so that parallel workers do not all try the same point.
        """
        (below, above), numbers = self.ranked.parted(good, space)
        best = {number: params for number, params in self.running.items() if number in numbers}
        others = {number: params for number, params in self.running.items() if number not in numbers}
        return joined(below, best, space), joined(above, others, space)


class FidelityTPE(ArrayTPE):
    """TPE whose good trials are the best at the highest rung that enough trials have reached.

    On another storage than ours, with several objectives or with constraints it is Optuna's TPE.
    """

    def __init__(
        self,
        *,
        ladder: Ladder,
        enough: int = ENOUGH,
        first: optuna.samplers.BaseSampler | None = None,
        **settings: Any,
    ) -> None:
        """Take the rungs and the number of trials that are enough at one.

        Args:
            ladder: the rungs.
            enough: the number of trials.
            first: draws the parameters as long as too few trials are ranked; by default each is drawn at random.
            settings: of Optuna's TPE.
        """
        super().__init__(constant_liar=True, **settings)
        self._ladder = ladder
        self._enough = enough
        self._first = first

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        found = super().infer_relative_search_space(study, trial)
        first = self._drawing_first
        return found if first is None else first.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        first = self._drawing_first
        if first is not None:
            return first.sample_relative(study, trial, search_space)
        return super().sample_relative(study, trial, search_space)

    @property
    def _drawing_first(self) -> optuna.samplers.BaseSampler | None:
        """What draws this trial in place of the model, None if the model does."""
        return self._first if self._look is not None and len(self._look) < self.startup_trials else None

    def look_of(self, columns: FinishedTrials, running: Sequence[TrialRow], study: optuna.Study) -> Look:
        """Return the look at finished trials and at other running ones, which are given by ascending number."""
        ranked = self._ranked(columns, [row for row in running if row.steps], study.direction)
        return RungLook(
            history=ranked.history,
            running=self.params_by_number(running, columns, study),
            ranked=ranked,
        )

    def _ranked(self, columns: FinishedTrials, reporting: Sequence[TrialRow], direction: StudyDirection) -> Ranked:
        """Rank trials, or return the last ranking if no trial has reported or finished since."""
        known = tuple((row.number, row.steps.tobytes(), row.curve.tobytes()) for row in reporting)
        key = (len(columns), known, self._ladder, self._enough)
        kept = columns.derived.get("ranked")
        if kept is None or kept[0] != key:
            curves = Curves.of(columns, reporting, self._ladder)
            ranked = Ranked(
                history=RankedTrials.of(columns, direction),
                ranking=RungRanking(curves, 1.0 if direction == StudyDirection.MINIMIZE else -1.0, self._enough),
                at=curves.at,
                numbers=np.array([row.number for row in reporting], np.int64),
            )
            kept = columns.derived["ranked"] = key, ranked
        found: Ranked = kept[1]
        return found
