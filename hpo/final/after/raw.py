"""Batches of raw images on the device, from a tensor or from stored images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpo.data import Inputs, Stored
from hpo.data.stored import Rows
from hpo.errors import StudyError


def rows_of(inputs: Inputs) -> Rows:
    """Return the inputs of a model that takes one tensor; StudyError for several tensors."""
    if isinstance(inputs, dict):
        raise StudyError(
            f"the model takes several tensors ({', '.join(inputs)}); `hpo after` needs a model of one tensor"
        )
    return inputs


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
