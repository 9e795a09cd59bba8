"""A curve as one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"
NOT_A_NUMBER = "×"


def sparkline(curve: Sequence[float], width: int, scale: tuple[float, float] | None = None) -> str:
    """Return a curve as blocks of eight heights between two values, by default its own lowest and highest; NaN is ×.

    Neighbouring values of a curve longer than `width` are averaged.
    """
    points = _squeezed(curve, width)
    finite = [value for value in points if math.isfinite(value)]
    if not finite:
        return NOT_A_NUMBER * len(points)
    low, high = scale or (min(finite), max(finite))
    span = high - low
    return "".join(_block(value, low, span) for value in points)


def _block(value: float, low: float, span: float) -> str:
    if math.isnan(value):
        return NOT_A_NUMBER
    if math.isinf(value):
        return LEVELS[-1] if value > 0 else LEVELS[0]
    if span == 0:
        return LEVELS[3]
    return LEVELS[max(0, min(len(LEVELS) - 1, int((value - low) / span * len(LEVELS))))]


def _squeezed(curve: Sequence[float], width: int) -> list[float]:
    if len(curve) <= width:
        return list(curve)
    edges = [round(column * len(curve) / width) for column in range(width + 1)]
    groups = [curve[start:end] for start, end in itertools.pairwise(edges)]
    return [sum(group) / len(group) for group in groups]
