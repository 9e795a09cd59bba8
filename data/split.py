"""Which image belongs to which part: stratified by class, decided by a seed alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HELD_OUT = 0.15  # of all images that are split, for validation and again for test

# The fewest images of a class that leave at least one in every part, however the rounding falls.
FEWEST_IN_TWO_PARTS = 7
FEWEST_IN_THREE_PARTS = 8


def stratified(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of train, validation and test, 70/15/15, each int64 and sorted.

    ValueError if a class has fewer than 8 images.
    """
    _refuse_rare_classes(labels, FEWEST_IN_THREE_PARTS)
    held_out = math.ceil(HELD_OUT * len(labels))
    rest, test = _hold_out(np.arange(len(labels)), labels, held_out, seed)
    train, validation = _hold_out(rest, labels, held_out, seed)
    return torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test)


def stratified_without_test(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of train and validation, 85/15, for a source that ships its own test split.

    ValueError if a class has fewer than 7 images.
    """
    _refuse_rare_classes(labels, FEWEST_IN_TWO_PARTS)
    held_out = math.ceil(HELD_OUT * len(labels))
    train, validation = _hold_out(np.arange(len(labels)), labels, held_out, seed)
    return torch.from_numpy(train), torch.from_numpy(validation)


def _hold_out(
    indices: npt.NDArray[np.int64], labels: Tensor, count: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split  # lazily, as in `data.digits`

    strata = labels.cpu().numpy()[indices]
    rest, held = train_test_split(indices, test_size=count, stratify=strata, random_state=seed % 2**32)
    return np.sort(rest), np.sort(held)


def _refuse_rare_classes(labels: Tensor, fewest: int) -> None:
    classes, counts = torch.unique(labels, return_counts=True)
    rarest = int(counts.argmin())
    if counts[rarest] < fewest:
        raise ValueError(
            f"class {int(classes[rarest])} has {int(counts[rarest])} images, too few for every part of a stratified "
            f"split; give each class at least {fewest}, or leave it out"
        )
