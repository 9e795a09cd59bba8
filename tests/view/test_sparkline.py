from __future__ import annotations

import math

from hpo.view.sparkline import sparkline


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, 0.0], 8) == "█▁"


def test_a_sparkline_marks_what_is_no_number() -> None:
    assert sparkline([0.0, math.nan, 1.0], 8) == "▁×█"
    assert sparkline([0.0, math.inf, 1.0, -math.inf], 8) == "▁██▁"
    assert sparkline([math.nan, math.nan], 8) == "××"


def test_a_flat_or_empty_curve_has_a_sparkline() -> None:
    assert sparkline([0.5, 0.5], 8) == "▄▄"
    assert sparkline([], 8) == ""


def test_a_long_curve_is_squeezed_into_the_width() -> None:
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
    assert len(sparkline([float(step) for step in range(1000)], 37)) == 37
