"""Division of an epoch's images into batches, one per optimizer step, and of batches into micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_PIECE = 2  # images in a micro-batch; batch norm fails on one


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one epoch.

    A short last batch is dropped, since batch norm fails on one image and trials in a stack need batches of one size.
    The order changes every epoch, so no image is dropped for good. Fewer images than one batch make one batch.
    """
    return max(1, images // batch_size)


def most_pieces(batch_size: int) -> int:
    """Return the most micro-batches of a batch such that each has at least SMALLEST_PIECE images."""
    return max(1, batch_size // SMALLEST_PIECE)


def can_halve(batch_size: int, accumulation: int) -> bool:
    """Return whether twice as many micro-batches are possible, each with at least SMALLEST_PIECE images."""
    return 2 * accumulation <= most_pieces(batch_size)


def cut(batch: Tensor, pieces: int) -> tuple[Tensor, ...]:
    """Return the micro-batches of a batch, near-equal and in order."""
    return torch.tensor_split(batch, pieces) if pieces > 1 else (batch,)
