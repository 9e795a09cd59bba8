"""What the parts of this package hand on: a source of images, and the parts of it where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.data.stored import Images


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Labelled images as they are stored; a source that ships its own test split carries it apart."""

    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], from 0 to num_classes - 1
    num_classes: int
    test_images: Images | None = None  # uint8 [M, C, H, W]
    test_labels: Tensor | None = None  # int64 [M]
    classes: tuple[str, ...] = ()  # their names in the order of their numbers, if they have any
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
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("only one of test_images and test_labels is given; give both, or neither")
        if self.test_images is not None and self.test_labels is not None:
            _check("test_images", self.test_images, "test_labels", self.test_labels, self.num_classes)
            if self.test_images.shape[1:] != self.images.shape[1:]:
                raise ValueError(
                    f"test_images have shape {list(self.test_images.shape[1:])}, images "
                    f"{list(self.images.shape[1:])}; bring both to one shape [C, H, W]"
                )


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
