"""Lengths of time as people write them."""

from __future__ import annotations

import pytest

from hpo.errors import SpecError
from hpo.spec.durations import MAX_SECONDS, seconds


@pytest.mark.parametrize(
    ("text", "length"),
    [("1s", 1), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172_800), ("1d2h3m4s", 93_784), (" 5m ", 300)],
)
def test_a_duration_is_read_as_seconds(text: str, length: float) -> None:
    assert seconds(text, "x") == length


def test_nothing_at_all_is_a_duration_only_where_it_means_something() -> None:
    assert seconds("0s", "x", zero=True) == 0.0
    assert seconds("0h0m", "x", zero=True) == 0.0
    with pytest.raises(SpecError):
        seconds("0s", "x")


@pytest.mark.parametrize(
    "text",
    ["", " ", "5", "5 m", "1.5h", "-1s", "30m1h", "1h1h", "5min", "s", "tomorrow", "1e9s", f"{MAX_SECONDS + 1}s"],
)
@pytest.mark.parametrize("zero", [True, False])
def test_what_is_no_duration_is_told_with_its_place_and_the_mend(text: str, zero: bool) -> None:
    with pytest.raises(SpecError) as caught:
        seconds(text, "recovery.lease", zero=zero)
    assert str(caught.value) == f"recovery.lease: {text!r} is not a duration; write it like 90s, 30m or 1h30m"


def test_the_longest_duration_is_ten_years() -> None:
    assert seconds(f"{MAX_SECONDS}s", "x") == seconds("3650d", "x") == 10 * 365 * 86400


def test_a_number_with_more_digits_than_python_reads_is_no_duration() -> None:
    with pytest.raises(SpecError, match="is not a duration"):
        seconds("9" * 5000 + "s", "x")
