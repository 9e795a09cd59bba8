"""Warm-ups by name, which run before any schedule. The keyword-only parameters of a function are its options.

A warm-up is a pure function of the step. It returns a multiplier on the learning rate of the schedule's first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from hpo.train.optim.schedules import CurveSchedule, Rate, Schedule

Warmup = Callable[[int], float]


class Lengths(NamedTuple):
    """Number of steps of a schedule, including the warm-up, and of an epoch."""

    schedule: int
    epoch: int


def steps(
    lengths: Lengths,
    *,
    share: Annotated[float, Ge(0), Lt(1)] | None = None,
    epochs: Annotated[float, Ge(0)] | None = None,
) -> int:
    """Return the number of warm-up steps (default: 0.05 of the schedule).

    ValueError if both options are given, or if the warm-up is as long as the schedule.

    Args:
        share: length as a share of the schedule; 0 for no warm-up.
        epochs: length in epochs, also fractions; 0 for no warm-up.
    """
    if share is not None and epochs is not None:
        raise ValueError(f"share = {share} and epochs = {epochs}; keep one of the two")
    length = round(
        epochs * lengths.epoch if epochs is not None else (0.05 if share is None else share) * lengths.schedule
    )
    if length >= lengths.schedule:
        raise ValueError(f"{length} warm-up steps leave nothing of a schedule of {lengths.schedule} steps; shorten it")
    return length


def linear(length: int, *, start_factor: Annotated[float, Gt(0), Le(1)] = 0.01) -> Warmup:
    """Rise linearly to the learning rate of the schedule's first step (Goyal et al. 2017).

    Args:
        start_factor: multiplier at the first step.
    """
    return lambda step: start_factor + (1.0 - start_factor) * step / length


WARMUPS: dict[str, Callable[..., Warmup]] = {"linear": linear}


def before(schedule: Schedule, length: int, warmup: Warmup) -> Schedule:
    """Return a schedule with a warm-up of `length` steps in front of it."""

    def behind(then: Schedule) -> Schedule:
        first = then(0)

        def at(step: int) -> Rate:
            return then(step - length) if step >= length else Rate(first.factor * warmup(step), first.momentum)

        return at

    if isinstance(schedule, CurveSchedule):
        return CurveSchedule(lambda losses: behind(schedule.after(losses)))
    return behind(schedule)
