"""Verdicts on repeated runs: what they say of known values, and how often they are wrong on simulated ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hpo.analysis import verdict
from hpo.errors import SpecError

CLEAR = {4: [0.95, 0.951, 0.949, 0.95, 0.952], 7: [0.90, 0.902, 0.899, 0.90, 0.901]}


def test_the_better_one_is_best_and_the_same_runs_as_losses_say_the_other() -> None:
    found = verdict.judge(CLEAR, delta=0.005, direction="maximize")
    assert (found.kind, found.leader, found.bound, found.more) == ("best", 4, 0.0, None)
    assert verdict.judge(CLEAR, delta=0.005, direction="minimize").leader == 7


def test_equals_are_within_delta_and_the_lower_number_leads() -> None:
    """Values that do not move at all are exact: an objective without randomness."""
    found = verdict.judge({9: [0.5, 0.5], 3: [0.5, 0.5]}, delta=0.001, direction="maximize")
    assert (found.kind, found.leader, found.deviation, found.bound) == ("within", 3, 0.0, 0.0)


def test_two_equal_differences_are_no_proof_unless_many_runs_show_that_nothing_is_random() -> None:
    """Shares of a few items repeat by chance, whoever computes them."""
    once = verdict.judge({0: [0.99, 0.99], 1: [0.98, 0.98]}, delta=0.001, direction="maximize")
    assert (once.kind, once.more) == ("undecided", 2)
    moving = {0: [0.99, 0.98, 0.99], 1: [0.98, 0.97, 0.98]}
    assert verdict.judge(moving, delta=0.001, direction="maximize").kind == "best"
    exact = {one: [1.0 - one / 100] * 2 for one in range(5)}
    assert verdict.judge(exact, delta=0.001, direction="maximize").kind == "best"
    twice = {0: [(0.99, 7.0)] * 2, 1: [(0.98, 7.0)] * 2}
    assert not verdict.dominances(twice, ["maximize", "minimize"])[1].is_sure
    assert verdict.dominances(
        {one: [(value, 7.0)] * 2 for one, value in enumerate((0.9, 0.8, 0.7, 0.6, 0.5))}, ["maximize", "minimize"]
    )[4].is_sure


def test_the_bound_is_that_of_scipys_paired_test() -> None:
    ours, theirs = [0.5, 0.7, 0.6, 0.65], [0.52, 0.66, 0.61, 0.6]
    found = verdict.judge({0: ours, 1: theirs}, delta=1.0, direction="maximize")
    level = verdict.level_of(1) / 2
    other = stats.ttest_rel(theirs, ours).confidence_interval(1 - 2 * level)
    assert found.bound == pytest.approx(other.high, rel=1e-12)
    mean = verdict.mean(ours)
    known = stats.ttest_1samp(ours, 0).confidence_interval(0.95)
    assert (mean.low, mean.high) == pytest.approx((known.low, known.high), rel=1e-12)
    within = verdict.mean(ours, (0.0, 0.7))
    assert known.high > 0.7
    assert (within.low, within.high) == (mean.low, 0.7)
    assert (verdict.mean([0.5], (0.0, 1.0)).low, verdict.mean([0.5]).low) == (0.0, -math.inf)


def test_the_named_number_of_further_runs_decides_and_one_less_does_not() -> None:
    rng = np.random.default_rng(1)
    drawn = rng.normal(0.9, 0.01, (3, 6))
    found = verdict.judge(dict(enumerate(drawn.tolist())), delta=0.004, direction="maximize")
    assert found.kind == "undecided"
    assert found.more is not None

    def kind(more: int) -> str:
        """Return the kind of a second look at runs with the same paired means and deviations."""
        count, level = 6 + more, verdict.level_of(2) / 3
        pairs = drawn - drawn[found.leader]
        reach = stats.t.isf(level, count - 1) * pairs.std(axis=1, ddof=1) / math.sqrt(count)
        others = [one for one in range(3) if one != found.leader]
        return "decided" if all((pairs.mean(axis=1) + reach)[others] < 0.004) else "undecided"

    assert (kind(found.more - 1), kind(found.more)) == ("undecided", "decided")


def test_all_looks_together_spend_less_than_the_error() -> None:
    levels = [verdict.level_of(look) for look in range(1, 10)]
    assert levels == sorted(levels, reverse=True)
    assert 0.09999 < sum(levels) < verdict.ERROR


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_wrong_verdicts_are_as_rare_as_promised(noise: float) -> None:
    """The short form of `benchmarks/confirm_verdicts.py`: 5 leaders, of which one is better; the others are equal."""
    rng, wrong, naive = np.random.default_rng(7), 0, 0
    for _ in range(200):
        drawn = rng.normal(size=(5, 5)) * noise
        drawn[0] += 1.0
        found = verdict.judge(dict(enumerate(drawn.tolist())), delta=0.5, direction="maximize")
        wrong += found.is_decided and found.leader != 0
        naive += int(drawn[:, 0].argmax()) != 0
    assert wrong <= 200 * verdict.ERROR
    assert naive > wrong


@pytest.mark.parametrize(
    ("runs", "delta", "said"),
    [
        (CLEAR, 0.0, "delta = 0.0: must be a finite number above 0"),
        (CLEAR, math.nan, "delta = nan"),
        ({1: [0.5, 0.5]}, 0.1, "1 configuration"),
        ({1: [0.5], 2: [0.5]}, 0.1, r"runs of the configurations: \[1\]"),
        ({1: [0.5, 0.5], 2: [0.5, 0.5, 0.5]}, 0.1, r"runs of the configurations: \[2, 3\]"),
    ],
)
def test_what_cannot_be_judged_is_refused(runs: dict[int, list[float]], delta: float, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        verdict.judge(runs, delta=delta, direction="maximize")
