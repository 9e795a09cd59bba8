"""The text of numbers, times and states, the same on every page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.study.interval import Interval

#: state -> the word for it, in the order in which they are shown
STATES = {
    "complete": "complete",
    "pruned": "pruned",
    "fail": "failed",
    "running": "running",
    "parked": "parked",
    "foreign": "foreign",
    "waiting": "queued",
}


def counted(counts: Mapping[str, int]) -> dict[str, str]:
    """Return {state: text such as "3 failed"} for the states that occur, in the order of `STATES`."""
    return {state: f"{counts[state]} {word}" for state, word in STATES.items() if counts[state]}


def duration(seconds: float) -> str:
    """Return a duration in at most two units: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def amount_text(value: float) -> str:
    """Return a value as `value_text` does. Whole numbers from 100 on keep all their digits."""
    return f"{value:,.0f}" if abs(value) >= 100 and value == round(value) else value_text(value)


def value_text(value: float | None) -> str:
    """Return a value with four decimals. Tiny and huge values have an exponent; None is a dash."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Return a value, followed by its interval if it has one: 0.6667 (0.4878 to 0.8077, n = 30)."""
    return value_text(value) + (f" ({range_text(interval)}, n = {interval.images:,})" if interval else "")


def range_text(interval: Interval) -> str:
    """Return the ends of an interval: 0.4878 to 0.8077."""
    return f"{value_text(interval.low)} to {value_text(interval.high)}"
