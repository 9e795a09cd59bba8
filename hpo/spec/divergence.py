"""The divergence guard: it finds from a trial's own curve that the trial has diverged, whatever the pruner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.spec.curve import Direction


@dataclass(frozen=True, kw_only=True)
class DivergenceGuard:
    """Ends a trial whose last `patience` reports all diverge.

    A report v diverges if it is not finite, or if it is worse than 0 and |v| > factor * max(1, r). Here r is the largest |u|
    of all earlier reports u that did not diverge. As long as r is 0 or there is no such report, only values that are not
    finite diverge. "Worse than 0" is above it if the study minimizes, below it if it maximizes.

    Only the trial's own reports count. So a resumed trial and a replay end where an undisturbed trial does.
    """

    factor: float
    patience: int  # 0: the guard ends no trial
    direction: Direction

    def __str__(self) -> str:
        if not self.patience:
            return "off"
        return (
            f"ends a trial after {self.patience} reports in a row that are not finite, or worse than {self.factor:g} times its "
            "largest earlier one"
        )

    def why(self, curve: Sequence[float]) -> str | None:
        """Return why a trial diverged if the guard ends it after the last report of its curve; None if not.

        Args:
            curve: all reported values of the trial, in the order of the steps.
        """
        if not self.patience or len(curve) < self.patience or self._is_tame(curve):
            return None
        in_a_row, scale = 0, 0.0
        for value in curve:
            diverges = not math.isfinite(value) or self._cost(value) > self._bound(scale)
            in_a_row = in_a_row + 1 if diverges else 0
            scale = scale if diverges else max(scale, abs(value))
        if in_a_row < self.patience:
            return None
        bound = self._bound(scale)
        beyond = "" if math.isinf(bound) else f" or {'above' if self._sign > 0 else 'below'} {self._sign * bound:g}"
        which = "the report is" if self.patience == 1 else f"{self.patience} reports in a row are"
        return f"{which} not finite{beyond}"

    def _is_tame(self, curve: Sequence[float]) -> bool:
        """Return whether the last value is within a bound that is never above the guard's. This saves a look at all values."""
        first = curve[0] if math.isfinite(curve[0]) else 0.0
        return math.isfinite(curve[-1]) and self._cost(curve[-1]) <= self.factor * max(1.0, abs(first))

    @property
    def _sign(self) -> float:
        return 1.0 if self.direction == "minimize" else -1.0

    def _cost(self, value: float) -> float:
        """Return a value as one that is better if it is lower."""
        return self._sign * value

    def _bound(self, scale: float) -> float:
        return self.factor * max(1.0, scale) if scale else math.inf
