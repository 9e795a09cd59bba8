"""Normalised images, kept once per process for any number of runs.

Resident images are taken by row on their device. Stored images are read ahead batch by batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hpo.data import Stored
from hpo.train import devices

FLOAT_COPY_BYTES = 64 * 2**20  # images up to this size as floats are normalised once, not batch by batch
AHEAD = 3  # batches that are read ahead
REMEMBERED = 8  # most pairs of split and number type whose `Pixels` are kept

Layout = Callable[[Tensor], Tensor]


class Pixels:
    """The images of one split. Small ones are kept as floats, larger ones are converted from uint8 batch by batch."""

    def __init__(self, images: Tensor | Stored, mean: Tensor, std: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mean = mean.to(dtype).view(-1, 1, 1)
        self._scale = 1.0 / std.to(dtype).view(-1, 1, 1)
        if isinstance(images, Tensor) and images.numel() * dtype.itemsize <= FLOAT_COPY_BYTES:
            images = self._normalised(images)
        self._images = images  # [N, C, H, W]

    def take(self, rows: Tensor) -> Tensor:
        """Return the normalised images of these rows."""
        if isinstance(self._images, Stored):
            return next(self._read([rows]))
        return self._normalised(self._images.index_select(0, rows))

    def feed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the result of `take` for each batch of rows."""
        return self._read(batches) if isinstance(self._images, Stored) else map(self.take, batches)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all normalised images in order, `size` at a time."""
        if isinstance(self._images, Stored):
            return self._read(torch.split(torch.arange(len(self._images)), size))
        return map(self._normalised, torch.split(self._images, size))

    def _read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches from the store, which a thread reads ahead and pins.

        It uses no processes. They would start anew for every epoch, and would need shared memory, which is scarce in
        containers.
        """
        assert isinstance(self._images, Stored)
        device = self._images.device
        listed = list(batches)
        sizes = [len(batch) for batch in listed]
        rows = torch.cat(listed).cpu()  # one wait for the device instead of one per batch
        order: Any = torch.split(rows, sizes)
        loader = DataLoader(
            _Rows(self._images),
            batch_sampler=order,
            collate_fn=_as_it_is,
            pin_memory=devices.is_accelerator(device),
            generator=torch.Generator(),  # the loader draws a number, which must not come from torch's global generator
        )
        for images in _ahead(iter(loader)):
            yield self._normalised(images.to(device, non_blocking=True))

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return images.to(self._dtype).sub_(self._mean).mul_(self._scale)
        return images


class _Rows(Dataset[Tensor]):
    """Stored images as a data set for DataLoader."""

    def __init__(self, images: Stored) -> None:
        self._images = images

    def __getitems__(self, rows: Tensor) -> Tensor:
        return self._images.take(rows)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield from an iterator that a thread reads AHEAD items in advance."""
    with ThreadPoolExecutor(1) as reader:
        due = deque(reader.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := due.popleft().result()) is not None:
            due.append(reader.submit(next, batches, None))
            yield batch


def endless_batches(images: Tensor | Stored, mean: Tensor, std: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches of normalised float32 images [size, C, H, W] on the CPU without end.

    Each pass has a new order from torch's global generator. If there are fewer than `size` images, a batch has all of
    them.
    """
    found, size = pixels(images, mean, std, torch.float32), min(size, len(images))
    while True:
        order = torch.randperm(len(images))[: len(images) // size * size]
        for rows in torch.split(order, size):
            yield found.take(rows.to(images.device)).cpu()


@lru_cache(maxsize=REMEMBERED)
def pixels(images: Tensor | Stored, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Pixels:
    """Return the images of a split in a number type. They are cached by the tensors' identity, so do not change tensors."""
    return Pixels(images, mean, std, dtype)


def as_they_lie(images: Tensor) -> Tensor:
    """Return images unchanged."""
    return images


def channels_last(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] with channels last in memory, for which convolutions on a CPU are fastest.

    The following layers take the layout over from their input. Weights and optimizers are not changed.
    """
    _, channels, height, width = images.shape
    if channels == 1:  # the memory is the same, but torch decides by the strides
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def layout_of(model: nn.Module, images: Pixels) -> Layout:
    """Return the function that lays out a model's images [B, C, H, W] in memory, after a test with two images.

    A model may depend on the layout, for example by `view`. Such a model gets its images unchanged.
    """
    some = next(images.split(2))
    gains = some.device.type == "cpu" and some.dtype == torch.float32  # oneDNN's convolutions
    if not gains or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return as_they_lie
    was_training = model.training
    try:
        model.eval()(channels_last(some))
    except RuntimeError:
        return as_they_lie
    finally:
        model.train(was_training)
    return channels_last
