"""What samplers make of diverged trials: they are never good, however good they were before."""

from __future__ import annotations

import math

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.tables import DIVERGED_KEY
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.fidelity import RungRanking
from hpo.strategy.rungs import Curves, Ladder
from hpo.strategy.tpe import RankedTrials

SPACE = {"x": FloatDistribution(0.0, 1.0)}


def row(number: int, curve: list[float], state: TrialState = TrialState.PRUNED, *, diverged: bool = False) -> TrialRow:
    found = TrialRow(number, number, state, started=None, completed=None, space=SPACE, params=(0.5,))
    found.steps.extend(range(1, len(curve) + 1))
    found.curve.extend(curve)
    found.values = (curve[-1],) if math.isfinite(curve[-1]) else None
    found.user_attributes = {DIVERGED_KEY: '"why"'} if diverged else {}
    return found


#: The diverged ones were the best at every step before, and got further than any other.
TRIALS = [
    row(0, [0.1, 0.1, 0.1, 0.1, math.nan], diverged=True),
    row(1, [3.0]),
    row(2, [2.0, 2.0]),
    row(3, [0.1, 0.1, 0.1, 1e6], diverged=True),
    row(4, [1.0, 1.0, 1.0], TrialState.COMPLETE),
]


def columns(rows: list[TrialRow]) -> FinishedTrials:
    found = FinishedTrials()
    found.add(rows)
    return found


@pytest.mark.parametrize("good", range(6))
def test_tpe_takes_no_diverged_trial_as_good(good: int) -> None:
    below, above = RankedTrials(columns(TRIALS), StudyDirection.MINIMIZE).split(good)
    assert below.tolist() == sorted([4, 2, 1][:good])
    assert sorted([*below.tolist(), *above.tolist()]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("enough", "reached", "order"), [(1, 1, [4, 2, 1, 0, 3]), (2, 2, [4, 2, 1, 0, 3]), (3, 3, [4, 2, 1, 0, 3])]
)
def test_the_ranking_by_rungs_puts_diverged_trials_last(enough: int, reached: int, order: list[int]) -> None:
    ranking = RungRanking(Curves.of(columns(TRIALS), [], Ladder(first=1, factor=2)), 1.0, enough)
    assert ranking.reached == enough  # trial 4 at its end, 2 at the step 2, 1 at the step 1
    assert ranking.order.tolist() == [4, 2, 1, 0, 3]
