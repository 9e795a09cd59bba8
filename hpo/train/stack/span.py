"""The part of a row that one parameter group of an optimizer owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MOMENTUM = "momentum_buffer"

Group = Mapping[str, Any]  # a parameter group of an optimizer


@dataclass(frozen=True, eq=False)
class Span:
    """The part of a row that one parameter group owns, as flat tensors."""

    value: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]
    steps: Tensor  # number of steps; torch keeps one for each parameter [n], all equal
    products: Tensor  # NAdam's product of momenta; torch keeps one for each parameter [n], all equal
    late: list[tuple[dict[str, Any], Tensor]]  # states without a momentum buffer yet, each with its place in the row

    def count(self) -> Tensor:
        """Count a step and return the number of steps."""
        self.steps.add_(1)
        return self.steps[0]

    def has(self, momentum: float) -> bool:
        """Return whether momentum is not 0. From then on the states hold a momentum buffer, as torch's do."""
        while momentum and self.late:
            state, place = self.late.pop()
            state[MOMENTUM] = place
        return momentum != 0
