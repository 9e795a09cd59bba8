"""Images as the source has them, resident or in store, brought to the device some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpo.data import Stored


def batches(images: Tensor | Stored, size: int) -> Iterator[Tensor]:
    """Yield all images in order, `size` at a time, on the device where they are used."""
    if isinstance(images, Tensor):
        yield from torch.split(images, size)
    else:
        for rows in torch.split(torch.arange(len(images)), size):
            yield images.take(rows).to(images.device)


def first(images: Tensor | Stored, count: int) -> Tensor:
    """Return the first images, all of them if there are fewer."""
    return next(batches(images, count))
