"""Random numbers of a run, a stream for each purpose, drawn on the CPU: they are the same on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Random = Callable[[str], torch.Generator]  # a fresh generator of the CPU by purpose
Size = tuple[int, int]  # height and width of an image


def spread(drawn: Tensor, most: float) -> Tensor:
    """Return uniform numbers in [0, 1) spread from -most to most."""
    return (2 * drawn - 1) * most
