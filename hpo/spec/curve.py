"""The rule that turns a trial's curve into its value: last epoch, best epoch, or mean of the last epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hpo.errors import SpecError

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class ValueRule:
    """Turns a curve up to some epoch into one number. Pruners, samplers, results and export all use this number."""

    kind: Literal["last", "best", "mean"]
    last: int = 1  # epochs averaged by "mean"
    direction: Direction

    @classmethod
    def parse(cls, text: str, direction: Direction) -> ValueRule:
        """Read `last`, `best` or `mean of last k`; SpecError for anything else."""
        if text == "last":
            return cls(kind="last", direction=direction)
        if text == "best":
            return cls(kind="best", direction=direction)
        if match := re.fullmatch(r"mean of last ([1-9]\d*)", text):
            return cls(kind="mean", last=int(match[1]), direction=direction)
        raise SpecError(f"value: {text!r} is not a rule; use 'last', 'best' or 'mean of last 3'")

    def __call__(self, curve: Sequence[float]) -> float:
        """Return the value of a non-empty curve. A non-finite epoch is never the best if another epoch is finite."""
        if self.kind == "last":
            return curve[-1]
        if self.kind == "mean":
            tail = curve[-self.last :]
            return sum(tail) / len(tail)
        finite = [value for value in curve if math.isfinite(value)]
        if not finite:
            return curve[-1]
        return max(finite) if self.direction == "maximize" else min(finite)

    def changed(self, curve: Sequence[float], place: int, later: Iterable[float]) -> Iterator[float]:
        """Yield the new values at the steps after an inserted number, up to the last value that changes.

        Args:
            curve: the curve with the inserted number.
            place: the index of the inserted number.
            later: the values at the steps after it, before the insertion.
        """
        number = curve[place]
        if self.kind == "mean":
            for end in range(place + 2, min(place + self.last, len(curve)) + 1):
                yield self(curve[max(0, end - self.last) : end])
        elif self.kind == "best" and math.isfinite(number):
            for value in later:
                if math.isfinite(value) and not self.better(number, value):
                    return
                yield number

    def best_epoch(self, curve: Sequence[float]) -> int:
        """Return the epoch, from 1, whose weights are kept: the best epoch under "best", else the last epoch."""
        if self.kind != "best":
            return len(curve)
        return list(curve).index(self(curve)) + 1

    def better(self, one: float, other: float) -> bool:
        """Return whether `one` is better than `other` in the study's direction."""
        return is_better(one, other, self.direction)


def is_better(one: float, other: float, direction: Direction) -> bool:
    """Return whether `one` is better than `other`."""
    return one > other if direction == "maximize" else one < other
