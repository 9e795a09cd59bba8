"""What the parts of this package hand on: a source of images, and the parts of it where they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hpo.data.stored import Images, Stored

#: How a source's files and its option `classes` are read: 1 as hpo did before December 2026, 2 as since.
Reading = Literal[1, 2]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Labelled images as they are stored; a source that ships its own validation or test part carries it apart."""

    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], from 0 to num_classes - 1
    num_classes: int
    validation_images: Images | None = None  # uint8 [L, C, H, W]
    validation_labels: Tensor | None = None  # int64 [L]
    test_images: Images | None = None  # uint8 [M, C, H, W]
    test_labels: Tensor | None = None  # int64 [M]
    classes: tuple[str, ...] = ()  # their names in the order of their numbers, if they have any
    notes: tuple[str, ...] = ()  # what was made of the files and might have been meant otherwise
    place: Callable[[int], str] | None = None  # where an image lies, by its row in the store of `images`
    reading: Reading = 2
    # What `select` was told of how the source is to be parted.
    subset: int | None = None
    folds: int | None = None
    fold: int | None = None
    resident: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on tensors of a wrong type, shape or range."""
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
        """Images and labels of the validation part that the source ships, if it does."""
        return _pair(self.validation_images, self.validation_labels)

    @property
    def own_test(self) -> tuple[Images, Tensor] | None:
        """Images and labels of the test part that the source ships, if it does."""
        return _pair(self.test_images, self.test_labels)

    def named(self, number: int) -> str:
        """Return a class by its name, or by its number if it has none."""
        return repr(self.classes[number]) if self.classes else str(number)

    def placed(self, index: int) -> str:
        """Return where one of `images` lies: its file, its row in a file, or its number."""
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
    """One part of a source: its labels are on the device where it is used, its images too or in store."""

    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What a search may see: training and validation, never the test part."""

    train: Split
    validation: Split
    num_classes: int
    mean: Tensor  # float32 [C], of the training part, in raw pixel values
    std: Tensor  # float32 [C], likewise; 1 for a channel that is constant
    digest: str  # SHA-256 of both parts, as hex
    classes: tuple[str, ...] = ()  # names of the classes by number, if the source has any
    white: int = 255  # highest raw value in the training part
    notes: tuple[str, ...] = ()  # what was made of the files and might have been meant otherwise
