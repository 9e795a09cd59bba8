"""Learning-rate schedules as pure functions of the step, by name. Keyword-only parameters are their options.

A schedule has no state. Step 0 is the first optimizer step, and `length` is the number of steps of the whole schedule.
After that it stays at its last value. A schedule that depends on validation losses is a pure function of the losses,
which the run keeps. Only `onecycle` with `cycle_momentum` changes the momentum.
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
    """The learning rate and the momentum of one step."""

    factor: float  # multiplier on the base learning rate
    momentum: float | None = None  # replaces the optimizer's momentum or beta1; None keeps it


Schedule = Callable[[int], Rate]


@dataclass(frozen=True)
class CurveSchedule:
    """A schedule that depends on the validation losses of all finished epochs."""

    after: Callable[[Sequence[float]], Schedule]

    def __call__(self, step: int) -> Rate:
        """Return the rate of a step of the first epoch."""
        return self.after(())(step)


def after(schedule: Schedule, losses: Sequence[float]) -> Schedule:
    """Return the schedule for the epoch after these validation losses, one per finished epoch."""
    return schedule.after(losses) if isinstance(schedule, CurveSchedule) else schedule


def constant(length: int) -> Schedule:
    """Keep the learning rate constant."""
    _check_length(length)
    rate = Rate(1.0)
    return lambda _step: rate


def cosine(length: int, *, final_factor: Annotated[float, Ge(0), Le(1)] = 0.0) -> Schedule:
    """Decay along half a cosine (Loshchilov & Hutter 2017, without restarts).

    Args:
        final_factor: multiplier on the learning rate at the end.
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
    """Rise to the learning rate, then decay far below the start (1cycle, Smith & Topin 2018).

    Args:
        pct_start: share of the steps in which the learning rate rises.
        div_factor: the first step has 1 / div_factor of the learning rate.
        final_div_factor: the last step has 1 / (div_factor * final_div_factor) of the learning rate.
        cycle_momentum: whether momentum, or beta1, falls from max_momentum to base_momentum and rises again.
        base_momentum: lowest momentum.
        max_momentum: highest momentum.
    """
    _check_length(length)
    first = 1.0 / div_factor
    last = first / final_div_factor
    top = pct_start * length - 1.0  # step with the highest learning rate, possibly fractional, as in torch
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
    """Drop the learning rate at equally spaced steps.

    Args:
        drops: number of drops.
        gamma: multiplier of each drop.
    """
    _check_length(length)

    def schedule(step: int) -> Rate:
        return Rate(gamma ** min(drops, step * (drops + 1) // length))

    return schedule


def exponential(length: int, *, final_factor: Annotated[float, Gt(0), Le(1)] = 0.01) -> Schedule:
    """Decay the learning rate by the same ratio at every step.

    Args:
        final_factor: multiplier on the learning rate at the end.
    """
    _check_length(length)
    return lambda step: Rate(final_factor ** (min(step, length) / length))


def polynomial(
    length: int, *, power: Annotated[float, Gt(0)] = 1.0, final_factor: Annotated[float, Ge(0), Le(1)] = 0.0
) -> Schedule:
    """Decay as a power of the remaining share of the steps (Liu et al. 2015, "ParseNet", there named poly).

    Args:
        power: exponent; 1 is linear.
        final_factor: multiplier on the learning rate at the end.
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
    """Decay along half a cosine in several cycles, each from the full learning rate (SGDR, Loshchilov & Hutter 2017).

    Args:
        cycles: number of cycles.
        t_mult: ratio of the lengths of a cycle and the one before.
        final_factor: multiplier on the learning rate at the end of a cycle.
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
    """Reduce the learning rate when the validation loss stops falling, as torch.optim.lr_scheduler.ReduceLROnPlateau does.

    It does not depend on the length of the training.

    Args:
        factor: multiplier of each reduction.
        patience: epochs without a lower loss that are allowed; the next one reduces the learning rate.
        threshold: a loss counts as lower if it is below (1 - threshold) times the lowest loss so far.
        cooldown: epochs after a reduction that do not count as epochs without a lower loss.
        min_factor: smallest multiplier on the learning rate.
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
    """Set the learning rate of each parameter group to its base times the factor, and the momentum if `rate` has one.

    ValueError if `rate` has a momentum, but the optimizer has neither momentum nor betas.

    Args:
        base_lrs: base learning rate of each group.
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
                f"cycle_momentum = true sets a momentum of {momentum}, but {type(optimizer).__name__} "
                "has none; set it to false or choose another optimizer"
            )


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1.0)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"a schedule cannot have {length} steps; give the number of optimizer steps, at least 1")
