"""Images that come out normalised, kept once per process however many runs train on them.

Those that are resident are taken by row where they are; those in store are read ahead, batch by batch, as they are due.
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

FLOAT_COPY_BYTES = 64 * 2**20  # images up to this size as floats are normalised once, not batch by batch
AHEAD = 3  # batches that are read before they are due
REMEMBERED = 8  # parts, in one number type each, whose float copies are kept

Layout = Callable[[Tensor], Tensor]


class Pixels:
    """The images of one part: as floats from the start if those are small, else from uint8 batch by batch."""

    def __init__(self, images: Tensor | Stored, mean: Tensor, std: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mean = mean.to(dtype).view(-1, 1, 1)
        self._scale = 1.0 / std.to(dtype).view(-1, 1, 1)
        if isinstance(images, Tensor) and images.numel() * dtype.itemsize <= FLOAT_COPY_BYTES:
            images = self._normalised(images)
        self._images = images  # [N, C, H, W]

    def take(self, rows: Tensor) -> Tensor:
        """Return the images of these rows."""
        if isinstance(self._images, Stored):
            return next(self._read([rows]))
        return self._normalised(self._images.index_select(0, rows))

    def feed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield, batch by batch, what `take` returns for each."""
        return self._read(batches) if isinstance(self._images, Stored) else map(self.take, batches)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        if isinstance(self._images, Stored):
            return self._read(torch.split(torch.arange(len(self._images)), size))
        return map(self._normalised, torch.split(self._images, size))

    def _read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches from the store, read and pinned by a thread ahead of their use: no processes, which would each
        start anew for every epoch, and need shared memory that containers are short of.
        """
        assert isinstance(self._images, Stored)
        device = self._images.device
        listed = list(batches)
        sizes = [len(batch) for batch in listed]
        rows = torch.cat(listed).cpu()  # one wait for the device, not one a batch
        order: Any = torch.split(rows, sizes)
        loader = DataLoader(
            _Rows(self._images),
            batch_sampler=order,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # it draws a number, which is not to come from what models draw from
        )
        for images in _ahead(iter(loader)):
            yield self._normalised(images.to(device, non_blocking=True))

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return images.to(self._dtype).sub_(self._mean).mul_(self._scale)
        return images


class _Rows(Dataset[Tensor]):
    """Stored images as a DataLoader wants them."""

    def __init__(self, images: Stored) -> None:
        self._images = images

    def __getitems__(self, rows: Tensor) -> Tensor:
        return self._images.take(rows)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield from an iterator that a thread keeps AHEAD of us."""
    with ThreadPoolExecutor(1) as reader:
        due = deque(reader.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := due.popleft().result()) is not None:
            due.append(reader.submit(next, batches, None))
            yield batch


def endless_batches(images: Tensor | Stored, mean: Tensor, std: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches of normalised images [size, C, H, W] on the CPU without end, each pass in an order of its own from torch's
    generator; of all images where there are fewer than `size`.
    """
    found, size = pixels(images, mean, std, torch.float32), min(size, len(images))
    while True:
        order = torch.randperm(len(images))[: len(images) // size * size]
        for rows in torch.split(order, size):
            yield found.take(rows.to(images.device)).cpu()


@lru_cache(maxsize=REMEMBERED)
def pixels(images: Tensor | Stored, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Pixels:
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


@torch.no_grad()
def layout_of(model: nn.Module, images: Pixels) -> Layout:
    """Return how a model's images are to lie in memory, tried on two of them: a function of a batch [B, C, H, W].

    A model may depend on where numbers lie, as one that calls `view` does; it gets its images as they are.
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
