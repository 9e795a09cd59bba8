"""Batches of raw inputs on the device, from tensors or from stored rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpo.data import Inputs, Stored
from hpo.train.inputs import Batch


def batches(inputs: Inputs, size: int) -> Iterator[Batch]:
    """Yield all rows in order, `size` at a time, on the device."""
    if isinstance(inputs, dict):
        columns = [torch.split(one, size) for one in inputs.values()]
        yield from (dict(zip(inputs, parts, strict=True)) for parts in zip(*columns, strict=True))
    elif isinstance(inputs, Stored):
        for rows in torch.split(torch.arange(len(inputs)), size):
            yield inputs.take(rows).to(inputs.device)
    else:
        yield from torch.split(inputs, size)


def first(inputs: Inputs, count: int) -> Batch:
    """Return the first `count` rows, or all if there are fewer."""
    return next(batches(inputs, count))


def rows(batch: Batch, which: slice) -> Batch:
    """Return some rows of a batch."""
    return {name: one[which] for name, one in batch.items()} if isinstance(batch, dict) else batch[which]


def named(batch: Batch, name: str) -> dict[str, Tensor]:
    """Return the tensors of a batch by name, in the order in which a model takes them. One tensor alone gets `name`."""
    return batch if isinstance(batch, dict) else {name: batch}
