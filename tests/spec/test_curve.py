"""One rule turns a curve into a value: last, best, or the mean of the last few epochs."""

from __future__ import annotations

import math

import pytest

from hpo.errors import SpecError
from hpo.spec.curve import ValueRule

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("text", "direction", "curve", "value", "epoch"),
    [
        ("last", "maximize", [0.1, 0.9, 0.5], 0.5, 3),
        ("last", "minimize", [0.1], 0.1, 1),
        ("best", "maximize", [0.1, 0.9, 0.5], 0.9, 2),
        ("best", "minimize", [0.3, 0.1, 0.5], 0.1, 2),
        ("best", "maximize", [0.9, 0.9, 0.9], 0.9, 1),
        ("best", "maximize", [NAN, 0.2, INF], 0.2, 2),
        ("best", "minimize", [-INF, 0.2, NAN], 0.2, 2),
        ("mean of last 2", "maximize", [1.0, 2.0, 4.0], 3.0, 3),
        ("mean of last 3", "minimize", [1.0, 2.0], 1.5, 2),
        ("mean of last 1", "minimize", [1.0, 2.0], 2.0, 2),
    ],
)
def test_the_value_and_the_epoch_whose_weights_stand_for_it(
    text: str, direction: str, curve: list[float], value: float, epoch: int
) -> None:
    rule = ValueRule.parse(text, direction)
    assert rule(curve) == value
    assert rule.best_epoch(curve) == epoch


def test_the_best_of_a_curve_without_numbers_is_its_last_entry() -> None:
    assert math.isnan(ValueRule.parse("best", "maximize")([INF, NAN]))
    assert ValueRule.parse("best", "minimize")([NAN, -INF]) == -INF


@pytest.mark.parametrize("text", ["", "Best", "mean", "mean of last 0", "mean of last -1", "mean of last 1.5", "first"])
def test_anything_else_is_refused_with_the_three_rules(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        ValueRule.parse(text, "maximize")
    assert str(caught.value) == f"value: {text!r} is not a rule; use 'last', 'best' or 'mean of last 3'"


def test_better_follows_the_direction_and_equal_is_not_better() -> None:
    up, down = ValueRule.parse("last", "maximize"), ValueRule.parse("last", "minimize")
    assert (up.better(2.0, 1.0), up.better(1.0, 2.0), up.better(1.0, 1.0)) == (True, False, False)
    assert (down.better(2.0, 1.0), down.better(1.0, 2.0), down.better(1.0, 1.0)) == (False, True, False)
