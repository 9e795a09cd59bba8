"""Standardised inputs, kept once per process for any number of runs.

Resident inputs are taken by row on their device. Stored ones are read ahead batch by batch.
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

from hpo.data import Split, Splits, Stored, each
from hpo.train import devices

FLOAT_COPY_BYTES = 64 * 2**20  # inputs up to this size as floats are standardised once, not batch by batch
AHEAD = 3  # batches that are read ahead
REMEMBERED = 8  # most pairs of split and number type whose `PreparedInputs` are kept

Batch = Tensor | dict[str, Tensor]
Layout = Callable[[Any], Any]  # from batch to batch


class PreparedTensor:
    """One tensor of a split. A small one is kept as floats, a larger one is converted batch by batch."""

    def __init__(self, rows: Tensor | Stored, mean: Tensor, std: Tensor, dtype: torch.dtype) -> None:
        behind = (-1, *[1] * (rows.ndim - 2))
        self._dtype = dtype
        self._mean = mean.to(dtype).view(behind)
        self._scale = 1.0 / std.to(dtype).view(behind)
        self._is_raw = mean.numel() > 0
        if isinstance(rows, Tensor) and self._is_raw and rows.numel() * dtype.itemsize <= FLOAT_COPY_BYTES:
            rows = self._standardised(rows)
            self._is_raw = False
        self._rows = rows  # [N, ...]

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Tensor) -> Tensor:
        """Return the standardised values of these rows."""
        if isinstance(self._rows, Stored):
            return next(self._read([rows]))
        return self._standardised(self._rows.index_select(0, rows))

    def feed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the result of `take` for each batch of rows."""
        return self._read(batches) if isinstance(self._rows, Stored) else map(self.take, batches)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all standardised values in order, `size` rows at a time."""
        if isinstance(self._rows, Stored):
            return self._read(torch.split(torch.arange(len(self._rows)), size))
        return map(self._standardised, torch.split(self._rows, size))

    def _read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches from the store, which a thread reads ahead and pins.

        It uses no processes. They would start anew for every epoch, and would need shared memory, which is scarce in
        containers.
        """
        assert isinstance(self._rows, Stored)
        device = self._rows.device
        listed = list(batches)
        sizes = [len(batch) for batch in listed]
        rows = torch.cat(listed).cpu()  # one wait for the device instead of one per batch
        order: Any = torch.split(rows, sizes)
        loader = DataLoader(
            _Rows(self._rows),
            batch_sampler=order,
            collate_fn=_as_it_is,
            pin_memory=devices.is_accelerator(device),
            generator=torch.Generator(),  # the loader draws a number, which must not come from torch's global generator
        )
        for values in _ahead(iter(loader)):
            yield self._standardised(values.to(device, non_blocking=True))

    def _standardised(self, values: Tensor) -> Tensor:
        """Return floats with mean 0 and variance 1 over the training part; a missing value becomes the mean, 0."""
        if not self._is_raw:
            return values
        if values.dtype == torch.uint8:
            return values.to(self._dtype).sub_(self._mean).mul_(self._scale)
        return values.to(self._dtype).sub(self._mean).mul_(self._scale).nan_to_num_(0.0, torch.inf, -torch.inf)


class PreparedInputs:
    """The inputs of one split: one prepared tensor, or several by name."""

    def __init__(self, split: Split, splits: Splits, dtype: torch.dtype) -> None:
        inputs, mean, std = split.inputs, splits.mean, splits.std
        self.parts: PreparedTensor | dict[str, PreparedTensor]
        if isinstance(inputs, dict):
            assert isinstance(mean, dict)
            assert isinstance(std, dict)
            self.parts = {name: PreparedTensor(one, mean[name], std[name], dtype) for name, one in inputs.items()}
        else:
            assert isinstance(mean, Tensor)
            assert isinstance(std, Tensor)
            self.parts = PreparedTensor(inputs, mean, std, dtype)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())) if isinstance(self.parts, dict) else self.parts)

    def take(self, rows: Tensor) -> Batch:
        """Return the standardised inputs of these rows."""
        if isinstance(self.parts, dict):
            return {name: part.take(rows) for name, part in self.parts.items()}
        return self.parts.take(rows)

    def feed(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the result of `take` for each batch of rows."""
        return map(self.take, batches) if isinstance(self.parts, dict) else self.parts.feed(batches)

    def split(self, size: int) -> Iterator[Batch]:
        """Yield all standardised inputs in order, `size` rows at a time."""
        if not isinstance(self.parts, dict):
            return self.parts.split(size)
        columns = [part.split(size) for part in self.parts.values()]
        return (dict(zip(self.parts, values, strict=True)) for values in zip(*columns, strict=True))


class _Rows(Dataset[Tensor]):
    """Stored rows as a data set for DataLoader."""

    def __init__(self, rows: Stored) -> None:
        self._rows = rows

    def __getitems__(self, rows: Tensor) -> Tensor:
        return self._rows.take(rows)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield from an iterator that a thread reads AHEAD items in advance."""
    with ThreadPoolExecutor(1) as reader:
        due = deque(reader.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := due.popleft().result()) is not None:
            due.append(reader.submit(next, batches, None))
            yield batch


def endless_batches(splits: Splits, size: int) -> Iterator[Batch]:
    """Yield batches of standardised float32 training inputs [size, ...] on the CPU without end.

    Each pass has a new order from torch's global generator. If there are fewer than `size` rows, a batch has all of
    them.
    """
    found = prepared(splits.train, splits, torch.float32)
    size = min(size, len(found))
    while True:
        order = torch.randperm(len(found))[: len(found) // size * size]
        for rows in torch.split(order, size):
            yield each(found.take(rows.to(splits.device)), Tensor.cpu)


@lru_cache(maxsize=REMEMBERED)
def prepared(split: Split, splits: Splits, dtype: torch.dtype) -> PreparedInputs:
    """Return the inputs of a split in a number type. They are cached by the split's identity, so do not change tensors."""
    return PreparedInputs(split, splits, dtype)


def in_units(values: Tensor, splits: Splits) -> Tensor:
    """Return predictions or targets of a regression in original units [..., T], float64; those of other tasks unchanged.

    Args:
        values: standardised [..., T], or outputs [..., O] whose first T columns are predictions.
    """
    if splits.target_mean is None or splits.target_std is None:
        return values
    return values[..., : len(splits.target_mean)].double() * splits.target_std.double() + splits.target_mean.double()


def as_they_lie(batch: Batch) -> Batch:
    """Return a batch unchanged."""
    return batch


def channels_last(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] with channels last in memory, for which convolutions on a CPU are fastest.

    The following layers take the layout over from their input. Weights and optimizers are not changed.
    """
    _, channels, height, width = images.shape
    if channels == 1:  # the memory is the same, but torch decides by the strides
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def layout_of(model: nn.Module, inputs: PreparedInputs) -> Layout:
    """Return the function that lays out a model's inputs in memory, after a test with two images [B, C, H, W].

    A model may depend on the layout, for example by `view`. Such a model gets its images unchanged.
    """
    few = next(inputs.split(2))
    if isinstance(few, dict) or few.ndim != 4:
        return as_they_lie
    gains = few.device.type == "cpu" and few.dtype == torch.float32  # oneDNN's convolutions
    if not gains or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return as_they_lie
    was_training = model.training
    try:
        model.eval()(channels_last(few))
    except RuntimeError:
        return as_they_lie
    finally:
        model.train(was_training)
    return channels_last
