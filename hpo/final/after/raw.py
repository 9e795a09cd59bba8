"""Batches of raw images on the device, from a tensor or from stored images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpo.data import Stored


def batches(images: Tensor | Stored, size: int) -> Iterator[Tensor]:
    """Yield all images in order, in batches [size, C, H, W], on the device."""
    if isinstance(images, Tensor):
        yield from torch.split(images, size)
    else:
        for rows in torch.split(torch.arange(len(images)), size):
            yield images.take(rows).to(images.device)


def first(images: Tensor | Stored, count: int) -> Tensor:
    """Return the first `count` images, or all if there are fewer."""
    return next(batches(images, count))
