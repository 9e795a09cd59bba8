"""The section `budget` of a study file: what ends a search."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import pydantic
from annotated_types import Ge, Gt, Le

from hpo.errors import Mistakes, SpecError
from hpo.spec.durations import seconds
from hpo.spec.training import Positive

MEND = "change it in [budget], then hpo run again"
SIGN = "budget."  # the beginning of a stop reason that a limit gave
HOUR = 3600.0
MAX_TRIALS = 2**31 - 1  # the largest value of an integer column in Postgres


class Budget(pydantic.BaseModel):
    """Limits of the study."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    trials: Annotated[int, Ge(1), Le(MAX_TRIALS)] = 64
    """Trials of the study in total, over all runs and in any state but WAITING."""
    timeout: str | None = None
    """Wall-clock limit of one `hpo run`, such as "30m". Unfinished trials are parked and continue in the next run."""
    wall_clock: str | None = None
    """Wall-clock limit of the study, such as "6h", over all runs and machines. Time counts while at least one worker is there.
    When it is spent, running trials are parked."""
    gpu_hours: Annotated[float, Gt(0), pydantic.Field(allow_inf_nan=False)] | None = None
    """Limit on the hours for which workers occupy GPUs, summed over GPUs. A worker on the CPU counts as one GPU. When it is
    spent, running trials are parked."""
    target: float | None = None
    """Value at which the search ends: a COMPLETE trial that violates no constraint reaches it. Running trials are finished."""
    patience: Positive | None = None
    """Number of trials without a better value after which the search ends. Complete and pruned trials count, from the best one
    on. Running trials are finished."""
    trial_timeout: str | None = None
    """Limit on the training time of one trial, epochs restored from a checkpoint included. `failures.time_limit` says how the
    trial ends."""

    LIMITS: ClassVar = ("wall_clock", "gpu_hours", "target", "patience")

    @property
    def limits(self) -> tuple[str, ...]:
        """The keys of the limits beside trials that are set."""
        return tuple(key for key in self.LIMITS if getattr(self, key) is not None)

    @property
    def wall_clock_seconds(self) -> float | None:
        return seconds(self.wall_clock, "budget.wall_clock") if self.wall_clock else None

    @property
    def trial_seconds(self) -> float | None:
        return seconds(self.trial_timeout, "budget.trial_timeout") if self.trial_timeout else None

    def check(self, *, has_front: bool) -> None:
        """Raise SpecError that lists wrong durations and limits.

        Args:
            has_front: whether the study has several objectives.
        """
        mistakes = Mistakes()
        if has_front and (given := [key for key in ("target", "patience") if key in self.limits]):
            mistakes.add(
                SpecError(
                    f"budget.{given[0]}: several objectives have a front and no best value; remove it, or limit the study by "
                    "trials, wall_clock or gpu_hours"
                )
            )
        if not math.isfinite(self.target or 0):
            mistakes.add(SpecError(f"budget.target = {self.target}: no trial has such a value; give a finite number"))
        for key in ("timeout", "wall_clock", "trial_timeout"):
            if text := getattr(self, key):
                with mistakes.collect():
                    seconds(text, f"budget.{key}")
        mistakes.raise_if_any()
