"""Warm-ups by name, which come before any schedule; every keyword-only parameter of a function is an option of the warm-up.

A warm-up is a pure function of the step: the share of what the schedule asks of its own first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from hpo.train.optim.schedules import CurveSchedule, Rate, Schedule

Warmup = Callable[[int], float]


class Lengths(NamedTuple):
    """Steps of a schedule, the warm-up before it among them, and of an epoch."""

    schedule: int
    epoch: int


def steps(
    lengths: Lengths,
    *,
    share: Annotated[float, Ge(0), Lt(1)] | None = None,
    epochs: Annotated[float, Ge(0)] | None = None,
) -> int:
    """Return the steps that a warm-up takes of a schedule's, none if its length is 0: a share of the schedule, or epochs,
    whole ones or not; 0.05 of the schedule if nothing is said.

    ValueError if both are said, or if nothing is left of the schedule.
    """
    if share is not None and epochs is not None:
        raise ValueError(f"share = {share} and epochs = {epochs}; keep one of the two")
    length = round(
        epochs * lengths.epoch if epochs is not None else (0.05 if share is None else share) * lengths.schedule
    )
    if length >= lengths.schedule:
        raise ValueError(f"{length} steps of warm-up leave nothing of a schedule of {lengths.schedule}; shorten it")
    return length


def linear(length: int, *, start_factor: Annotated[float, Gt(0), Le(1)] = 0.01) -> Warmup:
    """Rise in a straight line from `start_factor` at the first step to all at step `length` (Goyal et al. 2017)."""
    return lambda step: start_factor + (1.0 - start_factor) * step / length


WARMUPS: dict[str, Callable[..., Warmup]] = {"linear": linear}


def before(schedule: Schedule, length: int, warmup: Warmup) -> Schedule:
    """Return a schedule that comes after so many steps of a warm-up."""

    def behind(then: Schedule) -> Schedule:
        first = then(0)

        def at(step: int) -> Rate:
            return then(step - length) if step >= length else Rate(first.factor * warmup(step), first.momentum)

        return at

    if isinstance(schedule, CurveSchedule):
        return CurveSchedule(lambda losses: behind(schedule.after(losses)))
    return behind(schedule)
