"""Which image belongs to which part: stratified by class, decided by a seed alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpo.data.source import Source

HELD_OUT = 0.15  # of all images that are split, for validation and again for test

# The fewest images of a class that leave at least one in every part, however the rounding falls.
FEWEST_IN_TWO_PARTS = 7
FEWEST_IN_THREE_PARTS = 8


def parted(source: Source, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of a source's train, validation and test part, each int64 and sorted.

    Folds and a subset are taken from what is not test, which is the same without them. The test part is empty if the
    source ships its own. ValueError if a class or the whole has too few images.
    """
    if source.test_labels is None:
        train, validation, test = stratified(source.labels, seed)
    else:
        train, validation = stratified_without_test(source.labels, seed)
        test = torch.empty(0, dtype=torch.int64)
    if source.folds is not None and source.fold is not None:
        train, validation = _fold(torch.cat([train, validation]), source.labels, source.folds, source.fold, seed)
    if source.subset is not None:
        train, validation = _subset(train, validation, source.labels, source.subset, seed)
    return train, validation, test


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


def _fold(rest: Tensor, labels: Tensor, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return train and validation: all folds but one of what is not test, and that one."""
    from sklearn.model_selection import StratifiedKFold  # lazily, as in `data.digits`

    indices = np.sort(rest.numpy())
    strata = labels.numpy()[indices]
    _refuse_rare_classes(torch.from_numpy(strata), folds)
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32).split(indices, strata)
    train, validation = list(parts)[fold]
    return torch.from_numpy(indices[train]), torch.from_numpy(indices[validation])


def _subset(train: Tensor, validation: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return so many images of both parts together, in the proportion of the parts."""
    whole = len(train) + len(validation)
    of_validation = round(count * len(validation) / whole)
    fewest = int((labels.bincount() > 0).sum())
    if count > whole or of_validation < fewest:
        least = math.ceil((fewest + 0.5) * whole / len(validation))
        raise ValueError(
            f"subset = {count}: train and validation have {whole} images in {fewest} classes; "
            f"give a number from {least} to {whole}, or leave it out"
        )
    return _some(train, labels, count - of_validation, seed), _some(validation, labels, of_validation, seed)


def _some(indices: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """Return so many of the indices, sorted and stratified; a larger choice holds every smaller one."""
    shuffled = np.random.RandomState(seed % 2**32).permutation(indices.numpy())
    by_class = shuffled[np.argsort(labels.numpy()[shuffled], kind="stable")]
    _, sizes = np.unique(labels.numpy()[by_class], return_counts=True)
    # Each image's place in its class, as a share of it: the first so many are as much of every class.
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return torch.from_numpy(np.sort(by_class[np.argsort(places, kind="stable")[:count]]))


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
