"""How an epoch's images are cut: into batches, of one step each, and those into micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_PIECE = 2  # images in a micro-batch; batch norm fails on one


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return how many optimizer steps one epoch over so many training images has.

    A last short batch is dropped: batch norm fails on a batch of one image, and trials in a stack need
    batches of one size. The order differs every epoch, so no image is left out for good. A part smaller than
    one batch is one batch.
    """
    return max(1, images // batch_size)


def most_pieces(batch_size: int) -> int:
    """Return into how many micro-batches a batch may be cut, so that none has fewer images than SMALLEST_PIECE."""
    return max(1, batch_size // SMALLEST_PIECE)


def can_halve(batch_size: int, accumulation: int) -> bool:
    """Return whether a run may take its batches in twice as many micro-batches: each keeps at least 2 images."""
    return 2 * accumulation <= most_pieces(batch_size)


def cut(batch: Tensor, pieces: int) -> tuple[Tensor, ...]:
    """Return the micro-batches of a batch, near-equal and in order."""
    return torch.tensor_split(batch, pieces) if pieces > 1 else (batch,)
