"""A wider range for a parameter whose best values lie at an end of its range."""

from __future__ import annotations

import math

from hpo.spec.space import Range

DECADE = 10  # a log range grows by this factor, or by its own width if that is less
GROWTH = 0.5  # of its width, by which another range grows


def is_natural(parameter: Range, *, is_high: bool) -> bool:
    """Return whether an end may be one beyond which no value makes sense: 0, 1 as a share, or 1 of a count."""
    if is_high:
        return parameter.high == 1 and not parameter.integer
    return parameter.low == 0 or (parameter.integer and parameter.low == 1)


def widened(parameter: Range, *, is_high: bool) -> Range:
    """Return the range with one end moved out. A share, from 0 to 1, stays one; a positive number stays positive."""
    low, high = float(parameter.low), float(parameter.high)
    if parameter.log:
        factor = min(DECADE, high / low)
        low, high = (low, high * factor) if is_high else (low / factor, high)
    elif is_high:
        grown = high + GROWTH * (high - low)
        high = min(grown, (1 + high) / 2) if low >= 0 and high < 1 else grown
    else:
        grown = low - GROWTH * (high - low)
        low = max(grown, 0.0) if low > 0 else grown
    return _in_steps(parameter, low, high, is_high=is_high)


def _in_steps(parameter: Range, low: float, high: float, *, is_high: bool) -> Range:
    """Return the range with ends that its steps reach, and with whole ends if its own are whole."""
    step = parameter.step
    if step is not None:
        steps = max(1, math.floor(((high - parameter.high) if is_high else (parameter.low - low)) / step + 1e-9))
        moved = steps * step
        ends = (parameter.low, parameter.high + moved) if is_high else (parameter.low - moved, parameter.high)
        return Range(low=_rounded(ends[0]), high=_rounded(ends[1]), step=step, log=parameter.log)
    if parameter.has_whole_ends:
        whole = (parameter.low, math.ceil(high)) if is_high else (max(math.floor(low), 1), parameter.high)
        if not parameter.log and not is_high:
            whole = (math.floor(low), parameter.high)
        return Range(low=whole[0], high=whole[1], log=parameter.log)
    ends = (parameter.low, _rounded(high)) if is_high else (_rounded(low), parameter.high)
    return Range(low=ends[0], high=ends[1], log=parameter.log)


def _rounded(number: float) -> float:
    """Return a number with four digits. A whole number stays one."""
    return number if isinstance(number, int) else float(f"{number:.4g}")
