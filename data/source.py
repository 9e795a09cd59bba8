"""The types of this package: a source of labelled images, and the splits made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hpo.data.stored import Images, Stored

#: How a source's files and its option `classes` are read: 1 as before December 2026, 2 as since.
Reading = Literal[1, 2]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Labelled images as they are stored. A shipped validation or test part has its own tensors."""

    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], from 0 to num_classes - 1
    num_classes: int
    validation_images: Images | None = None  # uint8 [L, C, H, W]
    validation_labels: Tensor | None = None  # int64 [L]
    test_images: Images | None = None  # uint8 [M, C, H, W]
    test_labels: Tensor | None = None  # int64 [M]
    classes: tuple[str, ...] = ()  # names by class number, if there are names
    notes: tuple[str, ...] = ()  # how ambiguous files were read
    place: Callable[[int], str] | None = None  # file or row of an image, by its row in the store of `images`
    reading: Reading = 2
    # Options of `select` for the split.
    subset: int | None = None
    folds: int | None = None
    fold: int | None = None
    resident: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for tensors of a wrong type, shape or range."""
        if self.num_classes < 2:
            raise ValueError(f"num_classes = {self.num_classes}: a source needs at least 2 classes")
        if len(self.classes) not in (0, self.num_classes):
            raise ValueError(f"{len(self.classes)} names of classes for {self.num_classes} classes; give one for each")
        _check("images", self.images, "labels", self.labels, self.num_classes)
        self._check_own("validation", self.validation_images, self.validation_labels)
        self._check_own("test", self.test_images, self.test_labels)

    def _check_own(self, part: str, images: Images | None, labels: Tensor | None) -> None:
        if (images is None) != (labels is None):
            raise ValueError(f"only one of {part}_images and {part}_labels is given; give both, or neither")
        if images is None or labels is None:
            return
        _check(f"{part}_images", images, f"{part}_labels", labels, self.num_classes)
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"{part}_images have shape {list(images.shape[1:])}, images "
                f"{list(self.images.shape[1:])}; bring both to one shape [C, H, W]"
            )

    @property
    def own_validation(self) -> tuple[Images, Tensor] | None:
        """Images and labels of the shipped validation part, or None."""
        return _pair(self.validation_images, self.validation_labels)

    @property
    def own_test(self) -> tuple[Images, Tensor] | None:
        """Images and labels of the shipped test part, or None."""
        return _pair(self.test_images, self.test_labels)

    def named(self, number: int) -> str:
        """Return a class's name in quotes, or its number if classes have no names."""
        return repr(self.classes[number]) if self.classes else str(number)

    def placed(self, index: int) -> str:
        """Return the place of one of `images`: its file, its row in a file, or its number."""
        row = int(self.images.rows[index]) if isinstance(self.images, Stored) else index
        return self.place(row) if self.place else f"image {row}"


def _pair(images: Images | None, labels: Tensor | None) -> tuple[Images, Tensor] | None:
    return None if images is None or labels is None else (images, labels)


def _check(images_name: str, images: Images, labels_name: str, labels: Tensor, num_classes: int) -> None:
    if images.dtype != torch.uint8:
        raise ValueError(f"{images_name} are {images.dtype}; give raw pixels as torch.uint8")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{images_name} have shape {list(images.shape)}; give [N, C, H, W], none of them 0")
    if labels.dtype != torch.int64:
        raise ValueError(f"{labels_name} are {labels.dtype}; give class numbers as torch.int64")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_name} have shape {list(labels.shape)} beside {images.shape[0]} {images_name}; "
            "give one for each image"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"{labels_name} run from {lowest} to {highest}; with num_classes = {num_classes} "
            f"they must lie in 0..{num_classes - 1}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One part of a source. Its labels are on the device where they are used, its images too or in their store."""

    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What a search may see: the training and the validation split, never the test split."""

    train: Split
    validation: Split
    num_classes: int
    mean: Tensor  # float32 [C], of the training split, in raw pixel values
    std: Tensor  # float32 [C], of the training split, in raw pixel values; 1 for a constant channel
    digest: str  # SHA-256 of both splits, as hex
    classes: tuple[str, ...] = ()  # names by class number, if there are names
    white: int = 255  # highest raw value in the training split
    notes: tuple[str, ...] = ()  # how ambiguous files were read
    test_count: int = 0  # number of images in the test split, which is not here
