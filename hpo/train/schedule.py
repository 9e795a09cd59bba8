"""Learning-rate schedules as pure functions of the step; every keyword-only parameter is an option of the
schedule.

A schedule has no state to save: step 0 is the first optimizer step, `length` the number of steps of the whole
schedule, and past its length it stays at its last value. Momentum is touched by `onecycle` with
`cycle_momentum` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from torch.optim import Optimizer


class Rate(NamedTuple):
    """What a schedule asks of one step."""

    factor: float  # of the sampled learning rate
    momentum: float | None = None  # in place of the optimizer's momentum or beta1; None leaves it alone


Schedule = Callable[[int], Rate]


def constant(length: int) -> Schedule:
    """Keep the learning rate."""
    _check_length(length)
    rate = Rate(1.0)
    return lambda _step: rate


def cosine(length: int, *, final_factor: Annotated[float, Ge(0), Le(1)] = 0.0) -> Schedule:
    """Fall along half a cosine to `final_factor`, reached at step `length` (Loshchilov & Hutter 2017, without
    restarts).
    """
    _check_length(length)

    def schedule(step: int) -> Rate:
        turn = math.pi * min(step, length) / length
        return Rate(final_factor + (1.0 - final_factor) * (1.0 + math.cos(turn)) / 2.0)

    return schedule


def onecycle(
    length: int,
    *,
    pct_start: Annotated[float, Gt(0), Lt(1)] = 0.3,
    div_factor: Annotated[float, Ge(1)] = 25.0,
    final_div_factor: Annotated[float, Ge(1)] = 1e4,
    cycle_momentum: bool = False,
    base_momentum: Annotated[float, Ge(0), Lt(1)] = 0.85,
    max_momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
) -> Schedule:
    """Rise to the learning rate over `pct_start` of the steps, then fall far below the start (Smith & Topin
    2018).

    The first step has 1 / div_factor of the learning rate, the last 1 / (div_factor * final_div_factor). With
    `cycle_momentum`, momentum (or beta1) runs the other way, from max_momentum to base_momentum and back.
    """
    _check_length(length)
    first = 1.0 / div_factor
    last = first / final_div_factor
    top = pct_start * length - 1.0  # the step with the highest learning rate, a fraction as in torch
    end = length - 1.0

    def schedule(step: int) -> Rate:
        now = min(float(step), end)
        if now <= top:
            risen = now / top if top > 0.0 else 1.0
            return rate(_anneal(first, 1.0, risen), _anneal(max_momentum, base_momentum, risen))
        fallen = (now - top) / (end - top)
        return rate(_anneal(1.0, last, fallen), _anneal(base_momentum, max_momentum, fallen))

    def rate(factor: float, momentum: float) -> Rate:
        return Rate(factor, momentum if cycle_momentum else None)

    return schedule


def step(length: int, *, drops: Annotated[int, Ge(1)] = 2, gamma: Annotated[float, Gt(0), Le(1)] = 0.1) -> Schedule:
    """Multiply the learning rate by gamma at each of `drops` equally spaced steps."""
    _check_length(length)

    def schedule(step: int) -> Rate:
        return Rate(gamma ** min(drops, step * (drops + 1) // length))

    return schedule


def exponential(length: int, *, final_factor: Annotated[float, Gt(0), Le(1)] = 0.01) -> Schedule:
    """Shrink the learning rate by one ratio every step, so that step `length` reaches `final_factor`."""
    _check_length(length)
    return lambda step: Rate(final_factor ** (min(step, length) / length))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
    "step": step,
    "exponential": exponential,
}


def apply(optimizer: Optimizer, base_lrs: Sequence[float], rate: Rate) -> None:
    """Set each parameter group to its base learning rate times the factor, and to the momentum if one is
    asked.

    ValueError if a momentum is asked of an optimizer that has neither momentum nor betas.
    """
    factor, momentum = rate
    for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base * factor
        if momentum is None:
            continue
        if "momentum" in group:
            group["momentum"] = momentum
        elif "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            raise ValueError(
                f"cycle_momentum = true asks for a momentum of {momentum}, but {type(optimizer).__name__} "
                "has none; set it to false or choose another optimizer"
            )


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1.0)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"a schedule over {length} steps; give the number of optimizer steps, at least 1")
