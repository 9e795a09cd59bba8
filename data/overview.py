"""Overview of a source: the number of images of each class in each part, and example images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.data.files import BadFile
from hpo.data.inputs import CATEGORIES, NUMBERS, selected, some
from hpo.data.leaks import Leak, leaks
from hpo.data.names import Part
from hpo.data.source import Source, Split, SplitRule, Splits
from hpo.data.split import parted, rule_of, strata
from hpo.data.stored import chunks
from hpo.data.tokens import PADDING

EXAMPLES = 12  # most classes with an example image
COLUMN_KINDS = {NUMBERS: "numeric", CATEGORIES: "categorical"}
PARTS: tuple[Part, ...] = ("train", "validation", "test")
ROWS, COLUMNS = 6, 12  # size of an example in characters, which are about twice as high as wide
SHEET_CLASSES, SHEET_IMAGES = 100, 8  # contact sheet: most rows, images per row
SHEET_EDGE = 32  # contact sheet: smallest side of an image in pixels


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Parts, classes and examples. The targets of the test part are counted, and its rows compared with others by digests."""

    inputs: str  # what a row is, as "rows of 10 features"
    targets: str  # what is predicted, as "3 classes"
    rows: dict[Part, int]
    classes: list[str]  # names of classes or labels, or numbers if there are no names; none for a regression
    counts: dict[Part, list[int]]  # rows of each class, or with each label
    shipped: list[Part]  # parts that the source ships; the others were split off
    notes: list[str]  # how ambiguous files were read, and how rows are divided
    padding: float  # share of the steps of training rows that are padding; 0 for other inputs than tokens
    unit: str  # what a row is called: image or row
    split: SplitRule  # how rows are divided
    leaks: list[Leak]  # what two parts share
    examples: list[list[list[float]]]  # one per class: brightness from 0 to 1, ROWS x COLUMNS


def overview(source: Source, splits: Splits, *, split_seed: int) -> Overview:
    """Return the overview of a source and its splits at this seed."""
    of_validation, of_test = source.own_validation, source.own_test
    rows: dict[Part, Tensor] = dict(zip(PARTS, parted(source, split_seed), strict=True))
    targets = {
        "train": source.targets[rows["train"]],
        "validation": (of_validation[1] if of_validation else source.targets)[rows["validation"]],
        "test": (of_test[1] if of_test else source.targets)[rows["test"]],
    }
    classes = _names(source)
    shown = range(min(EXAMPLES, len(classes)) if splits.kind == "image" and source.task == "classification" else 0)
    first = [_first(splits.train, number, 1) for number in shown]
    return Overview(
        inputs=_inputs_text(source),
        targets=_targets_text(source, classes),
        rows={part: len(of_part) for part, of_part in rows.items()},
        classes=classes,
        counts={part: _counts(source, targets[part], len(classes)) for part in PARTS},
        shipped=[part for part, own in (("validation", of_validation), ("test", of_test)) if own],  # type: ignore[misc]
        notes=list(splits.notes),
        padding=_padding(source, rows["train"]),
        unit=source.unit,
        split=rule_of(source),
        leaks=leaks(source, split_seed),
        examples=[_brightness(_shares(images, splits)) for images in first],
    )


def _padding(source: Source, rows: Tensor) -> float:
    """Return the share of padding in these rows of tokens, 0 for other inputs."""
    if source.kind != "tokens":
        return 0.0
    codes = some(selected(source.inputs, rows))
    return sum(int((chunk == PADDING).sum()) for chunk in chunks(codes)) / max(1, codes.shape.numel())


def _names(source: Source) -> list[str]:
    """Return the names of the classes or labels whose rows are counted."""
    if source.task == "binary":
        return list(source.classes) or ["false", "true"]
    count = {"classification": source.num_classes, "multilabel": source.outputs}.get(source.task, 0)
    return list(source.classes[:count]) or [str(number) for number in range(count)]


def _counts(source: Source, targets: Tensor, classes: int) -> list[int]:
    """Return the number of rows of each class, or with each label."""
    if source.task == "multilabel":
        return [int(count) for count in targets.sum(0)]
    return strata(source, targets).bincount(minlength=classes).tolist() if classes else []


def _inputs_text(source: Source) -> str:
    """Return what a row is, in the plural."""
    if isinstance(source.inputs, dict):
        if source.kind == "table":
            words = [f"{one.shape[1]} {COLUMN_KINDS[name]}" for name, one in source.inputs.items()]
            return f"rows of {' and '.join(words)} columns"
        return "rows of " + " and ".join(f"{name} {list(one.shape[1:])}" for name, one in source.inputs.items())
    shape = list(source.inputs.shape[1:])
    return {
        "image": f"images {shape} as [channels, height, width]",
        "series": f"series {shape} as [channels, steps]",
        "features": f"rows of {shape[0]} feature{'s' * (shape[0] > 1)}",
        "tokens": f"rows of {shape[0]} token{'s' * (shape[0] > 1)}",
    }[source.kind]


def _targets_text(source: Source, classes: Sequence[str]) -> str:
    """Return what is predicted."""
    if source.task == "regression":
        count = source.outputs
        return f"{count} number{'s' * (count > 1)} to predict"
    return f"{len(classes)} {'labels' if source.task == 'multilabel' else 'classes'}"


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
        blank = torch.zeros((SHEET_IMAGES - len(found), channels, *sides))
        rows.append(torch.cat([_shares(found, splits), blank]))
    images = torch.cat(rows)
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


def _shares(images: Tensor, splits: Splits) -> Tensor:
    """Return values from 0, black, to 1: two standard deviations below and above the mean, if images are measured."""
    if images.dtype == torch.uint8:
        return images.float() / max(1, splits.white)
    assert isinstance(splits.mean, Tensor)
    assert isinstance(splits.std, Tensor)
    mean, std = (one.cpu().view(-1, 1, 1) for one in (splits.mean, splits.std))
    return ((images - mean) / (4 * std) + 0.5).clamp(0, 1)


def _brightness(images: Tensor) -> list[list[float]]:
    """Return the first image in grey, ROWS x COLUMNS; black if there is no image."""
    if not len(images):
        return [[0.0] * COLUMNS] * ROWS
    colours = images[:1, :3] if images.shape[1] >= 3 else images[:1, :1]
    grey = colours.mean(1, keepdim=True)
    found: list[list[float]] = F.adaptive_avg_pool2d(grey, (ROWS, COLUMNS))[0, 0].tolist()
    return found
