"""Images that come out normalised, kept once per process however many runs train on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

FLOAT_COPY_BYTES = 64 * 2**20  # images up to this size as floats are normalised once, not batch by batch
REMEMBERED = 8  # parts, in one number type each, whose float copies are kept

Layout = Callable[[Tensor], Tensor]


class Pixels:
    """The images of one part: as floats from the start if those are small, else from uint8 batch by batch."""

    def __init__(self, images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mean = mean.to(dtype).view(-1, 1, 1)
        self._scale = 1.0 / std.to(dtype).view(-1, 1, 1)
        small = images.numel() * dtype.itemsize <= FLOAT_COPY_BYTES
        self._images = self._normalised(images) if small else images  # [N, C, H, W]

    def take(self, rows: Tensor) -> Tensor:
        """Return the images of these rows."""
        return self._normalised(self._images.index_select(0, rows))

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        return map(self._normalised, torch.split(self._images, size))

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return images.to(self._dtype).sub_(self._mean).mul_(self._scale)
        return images


@lru_cache(maxsize=REMEMBERED)
def pixels(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Pixels:
    """Return the images of a part in a number type; tensors are told apart by identity, so they must not be written to."""
    return Pixels(images, mean, std, dtype)


def as_they_lie(images: Tensor) -> Tensor:
    """Return images as they are."""
    return images


def channels_last(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] whose channels lie beside each other in memory, which convolutions on a CPU like best.

    The layers behind take the layout over from their input; weights stay as they are, and so do optimizers.
    """
    _, channels, height, width = images.shape
    if channels == 1:  # the same memory either way, but torch goes by the strides
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)
