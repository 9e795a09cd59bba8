"""The benchmark of searches: its rival 1-Epoch, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from optuna.trial import TrialState

from benchmarks import one_epoch, search
from benchmarks.search import Replays
from hpo.lab import plan as plans
from tests.support.tables import falling, row, table


def replays(*reached: float) -> Replays:
    """Return replays with a budget of 100 epochs."""
    return Replays(
        table="made",
        method="made",
        budget=100,
        goal=1.0,
        reached_after=list(reached),
        bests=[],
        regret=0.0,
        sampler_seconds=0.0,
        pruner_seconds=0.0,
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_one_epoch_trains_the_best_three_of_81_to_their_end(workers: int) -> None:
    """At the end of the first epoch lower numbers are better. The round is over after 81 + 3 * 3 epochs."""
    plan = plans.make(table(*falling(81)), sampler="random", pruner="none", workers=workers, epochs=1000)
    course = one_epoch.run(plan, seed=0)
    complete = sorted(end.number for end in course.ends if end.state == TrialState.COMPLETE)
    assert (complete, len(course.ends), course.epochs) == ([0, 1, 2], 81, 81 + 3 * 3)
    assert course.bests[-1].value == 97.0


def test_one_epoch_begins_another_round_and_ends_with_the_budget() -> None:
    plan = plans.make(table(*falling(200)), sampler="random", pruner="none", workers=3, epochs=150)
    course = one_epoch.run(plan, seed=0)
    assert course.epochs == 150
    assert sum(end.state == TrialState.COMPLETE for end in course.ends) == 3
    assert len(course.distances) > one_epoch.SCREENED


def test_one_epoch_ranks_a_value_that_is_no_number_last() -> None:
    rows = [row(0, [math.nan, 1.0]), *(row(number, [float(number), 1.0]) for number in range(1, 6))]
    plan = plans.make(table(*rows), sampler="random", pruner="none", workers=2, epochs=1000)
    course = one_epoch.run(plan, seed=0)
    assert sorted(end.number for end in course.ends if end.epochs == 2) == [1, 2, 3]


def test_holm_corrects_the_smallest_p_value_most() -> None:
    assert search.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert search.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_missed_goal_counts_as_two_budgets() -> None:
    assert replays(50.0, math.inf).penalized.tolist() == [50.0, 200.0]


def test_a_rival_with_fewer_seeds_is_compared_with_the_same_seeds() -> None:
    logs = search.log_ratios(replays(10.0, 50.0, 99.0), replays(20.0, 50.0))
    assert np.exp(logs).tolist() == pytest.approx([0.5, 1.0])
    assert search.ratio_text(np.log([[0.5, 0.5], [2.0, 2.0]])) == "1.00 (1.00 to 1.00)"
