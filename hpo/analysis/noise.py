"""How large a difference between two trials must be to say something, and how many trials lie within it of the best.

Two sources are known. A share of n validation examples moves in steps of 1/n. Repeated runs of one configuration, as
`hpo confirm` makes them, differ by their standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hpo.spec import metrics
from hpo.spec.curve import Direction

ROUNDING = 1e-9  # of a difference; shares of equal counts may differ in their last bits


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The largest difference of two values that says nothing, and where it comes from."""

    size: float
    source: str  # such as "one of 270 validation examples"


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How many trials are as good as the best, or cannot be told from it."""

    tied: int  # trials with exactly the best value, the best included
    within: int  # trials within the noise of the best value, the tied ones included
    noise: Noise | None

    @property
    def is_close(self) -> bool:
        """Whether another trial is as good as the best or cannot be told from it."""
        return max(self.tied, self.within) > 1


def of_one_item(metric: str | None, images: int | None) -> Noise | None:
    """Return the noise of one validation example; None for a metric that is no share of examples."""
    if metric is None or not metrics.is_share(metric) or not images:
        return None
    return Noise(size=1 / images, source=f"one of {images:,} validation examples")


def of_runs(deviation: float, runs: int) -> Noise | None:
    """Return the noise that repeated runs have measured; None if they measured none."""
    if not math.isfinite(deviation):
        return None
    return Noise(size=deviation, source=f"the deviation from run to run, of {runs:,} repeated runs")


def larger(*found: Noise | None) -> Noise | None:
    """Return the largest noise of several sources."""
    return max((one for one in found if one is not None), key=lambda one: one.size, default=None)


def closeness(values: Iterable[float], direction: Direction, noise: Noise | None) -> Closeness:
    """Return how many of these values of complete trials are as good as the best one."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Closeness(tied=0, within=0, noise=noise)
    best = max(known) if direction == "maximize" else min(known)
    reach = 0.0 if noise is None else noise.size * (1 + ROUNDING)
    return Closeness(
        tied=sum(value == best for value in known),
        within=sum(abs(value - best) <= reach for value in known),
        noise=noise,
    )
