"""Overview of a source: the number of images of each class in each part, and example images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.data.files import BadFile
from hpo.data.inputs import some
from hpo.data.leaks import Leak, leaks
from hpo.data.names import Part
from hpo.data.source import Source, Split, SplitRule, Splits
from hpo.data.split import parted, rule_of, strata

EXAMPLES = 12  # most classes with an example image
ROWS, COLUMNS = 6, 12  # size of an example in characters, which are about twice as high as wide
SHEET_CLASSES, SHEET_IMAGES = 100, 8  # contact sheet: most rows, images per row
SHEET_EDGE = 32  # contact sheet: smallest side of an image in pixels


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Parts, classes and examples. The targets of the test part are counted, and its rows compared with others by digests."""

    shape: list[int]  # [C, H, W]
    classes: list[str]  # names, or numbers if there are no names
    counts: dict[Part, list[int]]  # images per class
    shipped: list[Part]  # parts that the source ships; the others were split off
    notes: list[str]  # how ambiguous files were read, and how rows are divided
    unit: str  # what a row is called: image or row
    split: SplitRule  # how rows are divided
    leaks: list[Leak]  # what two parts share
    examples: list[list[list[float]]]  # one per class: brightness from 0 to 1, ROWS x COLUMNS


def overview(source: Source, splits: Splits, *, split_seed: int) -> Overview:
    """Return the overview of a source and its splits at this seed."""
    train, validation, test = parted(source, split_seed)
    of_validation, of_test = source.own_validation, source.own_test
    labels: dict[Part, Tensor] = {
        "train": strata(source, source.targets)[train],
        "validation": strata(source, of_validation[1] if of_validation else source.targets)[validation],
        "test": strata(source, of_test[1] if of_test else source.targets)[test],
    }
    classes = _names(source)
    shown = range(min(EXAMPLES, len(classes)) if splits.kind == "image" and source.task == "classification" else 0)
    first = [_first(splits.train, number, 1) for number in shown]
    return Overview(
        shape=list(some(splits.train.inputs).shape[1:]),
        classes=classes,
        counts={part: found.bincount(minlength=len(classes)).tolist() for part, found in labels.items()},
        shipped=[part for part, own in (("validation", of_validation), ("test", of_test)) if own],  # type: ignore[misc]
        notes=list(splits.notes),
        unit=source.unit,
        split=rule_of(source),
        leaks=leaks(source, split_seed),
        examples=[_brightness(images, splits.white) for images in first],
    )


def _names(source: Source) -> list[str]:
    """Return the names of the strata whose rows are counted."""
    if source.task == "classification":
        return list(source.classes) or [str(number) for number in range(source.num_classes)]
    return ["false", "true"] if source.task == "binary" else ["all rows"]


def contact_sheet(splits: Splits, path: Path) -> None:
    """Write a PNG file with a row of training images for each class; BadFile if it cannot be written.

    It shows at most 100 classes, 8 images of each.
    """
    from torchvision.utils import make_grid, save_image  # here, since nothing else needs it

    if splits.kind != "image" or splits.task != "classification":
        raise BadFile(f"{path}: a contact sheet shows images of classes; this data has none")
    channels, *sides = some(splits.train.inputs).shape[1:]
    rows = []
    for number in range(min(SHEET_CLASSES, splits.num_classes)):
        found = _first(splits.train, number, SHEET_IMAGES)
        blank = torch.zeros((SHEET_IMAGES - len(found), channels, *sides), dtype=torch.uint8)
        rows.append(torch.cat([found, blank]))
    images = torch.cat(rows).float() / max(1, splits.white)
    shown = images[:, :3] if channels >= 3 else images[:, :1]
    larger = max(1, -(-SHEET_EDGE // min(sides)))
    try:
        save_image(make_grid(F.interpolate(shown, scale_factor=larger), nrow=SHEET_IMAGES), path, format="png")
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}") from error


def _first(split: Split, number: int, count: int) -> Tensor:
    """Return the first `count` images of a class on the CPU, fewer if it has fewer."""
    rows = (split.targets == number).nonzero().flatten()[:count].cpu()
    inputs = some(split.inputs)
    return inputs[rows].cpu() if isinstance(inputs, Tensor) else inputs.take(rows)


def _brightness(images: Tensor, white: int) -> list[list[float]]:
    """Return the first image in grey, ROWS x COLUMNS; black if there is no image."""
    if not len(images):
        return [[0.0] * COLUMNS] * ROWS
    colours = images[:1, :3] if images.shape[1] >= 3 else images[:1, :1]
    grey = colours.float().mean(1, keepdim=True) / max(1, white)
    found: list[list[float]] = F.adaptive_avg_pool2d(grey, (ROWS, COLUMNS))[0, 0].tolist()
    return found
