"""Random numbers of a run, one stream per purpose. They are drawn on the CPU, so they are the same on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Random = Callable[[str], torch.Generator]  # returns a fresh CPU generator for a purpose
Size = tuple[int, int]  # height and width of an image


def spread(drawn: Tensor, most: float) -> Tensor:
    """Map uniform numbers in [0, 1) to [-most, most)."""
    return (2 * drawn - 1) * most
