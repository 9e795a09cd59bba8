"""Learning-rate schedules as pure functions of the step; every keyword-only parameter is an option of the
schedule.

A schedule has no state to save: step 0 is the first optimizer step, `length` the number of steps of the whole
schedule, and past its length it stays at its last value. One that depends on the validation losses as well is a pure
function of these, which the run keeps. Momentum is touched by `onecycle` with
`cycle_momentum` alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from torch.optim import Optimizer


class Rate(NamedTuple):
    """What a schedule asks of one step."""

    factor: float  # of the sampled learning rate
    momentum: float | None = None  # in place of the optimizer's momentum or beta1; None leaves it alone


Schedule = Callable[[int], Rate]


@dataclass(frozen=True)
class CurveSchedule:
    """A schedule that depends on the validation losses so far, one of each finished epoch."""

    after: Callable[[Sequence[float]], Schedule]

    def __call__(self, step: int) -> Rate:
        """Return what is asked before the end of any epoch."""
        return self.after(())(step)


def after(schedule: Schedule, losses: Sequence[float]) -> Schedule:
    """Return a schedule as it is for the epoch that follows these validation losses."""
    return schedule.after(losses) if isinstance(schedule, CurveSchedule) else schedule


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


def polynomial(
    length: int, *, power: Annotated[float, Gt(0)] = 1.0, final_factor: Annotated[float, Ge(0), Le(1)] = 0.0
) -> Schedule:
    """Fall to `final_factor`, reached at step `length`, as a power of what is left of the steps: in a straight line if power
    is 1 (Liu et al. 2015, "ParseNet", where it is called poly).
    """
    _check_length(length)
    return lambda step: Rate(final_factor + (1.0 - final_factor) * (1.0 - min(step, length) / length) ** power)


def warm_restarts(
    length: int,
    *,
    cycles: Annotated[int, Ge(1), Le(100)] = 3,
    t_mult: Annotated[int, Ge(1), Le(10)] = 2,
    final_factor: Annotated[float, Ge(0), Le(1)] = 0.0,
) -> Schedule:
    """Fall along half a cosine towards `final_factor` and start afresh, in `cycles` cycles, each `t_mult` times as long as the
    one before (SGDR, Loshchilov & Hutter 2017); at step `length` stands the end of the last one.
    """
    _check_length(length)
    lengths = [length * t_mult**cycle / sum(t_mult**c for c in range(cycles)) for cycle in range(cycles)]
    starts = [0.0, *accumulate(lengths[:-1])]

    def schedule(step: int) -> Rate:
        cycle = bisect_right(starts, step) - 1
        share = min((step - starts[cycle]) / lengths[cycle], 1.0)
        return Rate(final_factor + (1.0 - final_factor) * (1.0 + math.cos(math.pi * share)) / 2.0)

    return schedule


def plateau(
    length: int,
    *,
    factor: Annotated[float, Gt(0), Lt(1)] = 0.1,
    patience: Annotated[int, Ge(0)] = 10,
    threshold: Annotated[float, Ge(0), Lt(1)] = 1e-4,
    cooldown: Annotated[int, Ge(0)] = 0,
    min_factor: Annotated[float, Ge(0), Le(1)] = 0.0,
) -> CurveSchedule:
    """Multiply the learning rate by `factor`, down to `min_factor`, whenever the validation loss has not fallen for more than
    `patience` epochs, as torch.optim.lr_scheduler.ReduceLROnPlateau does.

    A loss has fallen if it is below the lowest by more than its share `threshold`. The `cooldown` epochs after a reduction do
    not count. There is no end to reach: the length is not asked for.
    """
    _check_length(length)

    def rate(losses: Sequence[float]) -> Rate:
        lowest, waited, cooling, now = math.inf, 0, 0, 1.0
        for loss in losses:
            if loss < lowest * (1.0 - threshold):
                lowest, waited = loss, 0
            else:
                waited += 1
            if cooling:
                cooling, waited = cooling - 1, 0
            if waited > patience:
                now, cooling, waited = max(now * factor, min_factor), cooldown, 0
        return Rate(now)

    def after(losses: Sequence[float]) -> Schedule:
        now = rate(losses)
        return lambda _step: now

    return CurveSchedule(after)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
    "step": step,
    "exponential": exponential,
    "polynomial": polynomial,
    "warm_restarts": warm_restarts,
    "plateau": plateau,
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
