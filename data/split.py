"""Splits of a source into train, validation and test: stratified by class, decided by a seed alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpo.data import stratify
from hpo.data.source import Source

HELD_OUT = 0.15  # share of the split images for validation, and again for test

# By number of parts: images that a class needs to have at least one in each part, for any rounding.
FEWEST = {1: 1, 2: 7, 3: 8}
TOLD = 10  # most rare classes named in a message


def parted(source: Source, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of a source's train, validation and test part, each int64 and sorted.

    A shipped part is taken whole, with indices into its own images. The other parts are split off `source.inputs`.
    Folds and a subset do not change the test part. ValueError if a class or the source has too few images.
    """
    labels, own_validation, own_test = strata(source, source.targets), source.own_validation, source.own_test
    everything = torch.arange(len(labels))
    refuse_rare_classes(source, everything, FEWEST[3 - (own_validation is not None) - (own_test is not None)])
    if own_validation is None and own_test is None:
        train, validation, test = stratified(labels, seed)
    elif own_validation is None:
        train, validation = held_out(labels, seed)
    elif own_test is None:
        train, test = held_out(labels, seed)
    else:
        train = everything
    if own_test is not None:
        test = torch.arange(len(own_test[1]))
    if own_validation is not None:
        validation = torch.arange(len(own_validation[1]))
    if source.folds is not None and source.fold is not None:
        train, validation = _fold(torch.cat([train, validation]), source, source.folds, source.fold, seed)
    if source.subset is not None:
        validation_labels = labels if own_validation is None else strata(source, own_validation[1])
        train, validation = _subset(train, labels, validation, validation_labels, source.subset, seed)
    return train, validation, test


def strata(source: Source, targets: Tensor) -> Tensor:
    """Return the stratum of each row, int64 [N]: its class, or 0 for a task without classes."""
    if source.task == "classification":
        return targets
    return targets[:, 0].long() if source.task == "binary" else torch.zeros(len(targets), dtype=torch.int64)


def stratified(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of a 70/15/15 split into train, validation and test, each int64 and sorted."""
    count = math.ceil(HELD_OUT * len(labels))
    rest, test = _hold_out(np.arange(len(labels)), labels, count, seed)
    train, validation = _hold_out(rest, labels, count, seed)
    return torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test)


def held_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of an 85/15 split into train and one other part, for a source that ships the third."""
    rest, held = _hold_out(np.arange(len(labels)), labels, math.ceil(HELD_OUT * len(labels)), seed)
    return torch.from_numpy(rest), torch.from_numpy(held)


def _fold(rest: Tensor, source: Source, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return train (all other folds) and validation (this fold) of the images outside the test part."""
    indices = np.sort(rest.numpy())
    refuse_rare_classes(source, torch.from_numpy(indices), folds)
    train, validation = stratify.fold(strata(source, source.targets).numpy()[indices], folds, fold, seed % 2**32)
    return torch.from_numpy(indices[train]), torch.from_numpy(indices[validation])


def _subset(
    train: Tensor, labels: Tensor, validation: Tensor, validation_labels: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return `count` images of train and validation together, in the proportion of the two."""
    whole = len(train) + len(validation)
    of_validation = round(count * len(validation) / whole)
    fewest = int((labels.bincount() > 0).sum())
    if count > whole or of_validation < fewest or count - of_validation < fewest:
        least = math.ceil((fewest + 0.5) * whole / min(len(train), len(validation)))
        raise ValueError(
            f"subset = {count}: train and validation have {whole} images in {fewest} classes; "
            f"give a number from {least} to {whole}, or leave it out"
        )
    return _some(train, labels, count - of_validation, seed), _some(validation, validation_labels, of_validation, seed)


def _some(indices: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the indices, stratified and sorted. A larger choice contains every smaller one."""
    shuffled = np.random.RandomState(seed % 2**32).permutation(indices.numpy())
    by_class = shuffled[np.argsort(labels.numpy()[shuffled], kind="stable")]
    _, sizes = np.unique(labels.numpy()[by_class], return_counts=True)
    # Relative place of each image in its class. The `count` first places hold the same share of each class.
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return torch.from_numpy(np.sort(by_class[np.argsort(places, kind="stable")[:count]]))


def _hold_out(
    indices: npt.NDArray[np.int64], labels: Tensor, count: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rest, held = stratify.held_out(labels.cpu().numpy()[indices], count, seed % 2**32)
    return indices[rest], indices[held]


def refuse_rare_classes(source: Source, rows: Tensor, fewest: int) -> None:
    """Raise ValueError if a class has too few images among these rows. It names the classes and an image of each."""
    labels = strata(source, source.targets)[rows]
    classes, counts = torch.unique(labels, return_counts=True)
    rare = (counts < fewest).nonzero().flatten().tolist()
    if not rare:
        return
    lines = []
    for place in rare[:TOLD]:
        number, count = int(classes[place]), int(counts[place])
        first = source.placed(int(rows[labels == number][0]))
        lines.append(
            f"class {source.named(number)} has {count} image{'s' * (count > 1)} ({'first: ' * (count > 1)}{first})"
        )
    more = f", and {len(rare) - TOLD} more classes" if len(rare) > TOLD else ""
    raise ValueError(
        f"{', '.join(lines)}{more}: too few for every part of a stratified split, which takes at least {fewest} of each "
        "class; add images, or write the classes to keep into `classes`, where a list in the list makes one class of several"
    )
