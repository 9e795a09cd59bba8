"""How numbers, times and states are written, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

#: state -> how it is called, in the order of a trial's life
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
    """Return {state: its count in words, such as "3 failed"} for the states that occur, in the order of `STATES`."""
    return {state: f"{counts[state]} {word}" for state, word in STATES.items() if counts[state]}


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def amount_text(value: float) -> str:
    """Return a value as `value_text`, a large count as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 and value == round(value) else value_text(value)


def value_text(value: float | None) -> str:
    """Return a value with four decimals, in exponent form where these would hide it, a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
