"""Images from CSV files of pixel values, one image per row, with labels in a column or in a second file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from torch import Tensor

from hpo.data.cache import cached, keep
from hpo.data.files import BadFile, File, OptionalFile, existing_file
from hpo.data.listing import endings
from hpo.data.names import Part, in_order, is_label
from hpo.data.sheet import Column, Sheet
from hpo.data.source import Reading, Source

Edge = Annotated[int, Ge(1)]
FEW = 8  # pixels in a row that may count up by chance
PREFIXES: dict[Part, str] = {"train": "", "validation": "validation_", "test": "test_"}  # of option names


def spreadsheets(
    *,
    images: File,
    labels: OptionalFile = None,
    validation_images: OptionalFile = None,
    validation_labels: OptionalFile = None,
    test_images: OptionalFile = None,
    test_labels: OptionalFile = None,
    label_column: Column | None = None,
    shape: list[Edge] | None = None,
    channels_last: bool = False,
    header: bool = False,
    delimiter: str = ",",
    reading: Reading = 2,
) -> Source:
    """Return images from CSV files of whole numbers from 0 to 255, one image per row.

    The label is in the row, or in a second file. Files are read again when their sizes or modification times change.
    BadFile names the cause, and row and column as a spreadsheet counts them.

    Args:
        images: file of pixel values.
        labels: file of labels, as numbers or names (default: a column of the file of pixel values). Classes are numbered
            by sorted label.
        validation_images: file of pixel values of the validation part, with the same classes.
        validation_labels: file of labels of the validation part.
        test_images: file of pixel values of the test part, with the same classes.
        test_labels: file of labels of the test part.
        label_column: column of labels, by name or by number from 1. By default it is the column with a usual name such as
            label or class, or the only column of a file of labels.
        shape: [H, W] or [C, H, W] of an image (default: a grey square).
        channels_last: whether a row has the values of all channels of one pixel side by side.
        header: whether the first row of each file holds the names of the columns.
        delimiter: character between two values.
        reading: 1 reads as hpo did before December 2026: classes named 2.0 and 10.0 are sorted as texts, not as
            numbers.
    """
    if len(delimiter) != 1:
        raise ValueError(f'delimiter = {delimiter!r}: write one character; a tabulator is "\\t"')
    named = {
        "images": images,
        "labels": labels,
        "validation_images": validation_images,
        "validation_labels": validation_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }
    for part in ("validation", "test"):
        lone = (named[f"{part}_images"] is None) != (named[f"{part}_labels"] is None)
        if lone and (labels is not None or named[f"{part}_images"] is None):
            raise ValueError(f"only one of {part}_images and {part}_labels is given; give both, or neither")
    paths = {option: existing_file(path, option) for option, path in named.items() if path is not None}
    states = [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in paths.values()]
    sheets = {option: Sheet(path, header=header, delimiter=delimiter) for option, path in paths.items()}
    tables = {
        part: Table(images=sheets[f"{prefix}images"], labels=sheets.get(f"{prefix}labels"), wanted=label_column)
        for part, prefix in PREFIXES.items()
        if f"{prefix}images" in sheets
    }
    key = [states, list(paths), label_column, shape, channels_last, header, delimiter, reading]
    source = cached("csv", key, lambda folder: keep(folder, _read(tables, shape, channels_last, reading)))
    place = paths["images"]
    return replace(source, place=lambda row: f"{place}, row {row + 1 + header}", reading=reading)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The sheet of a part's images, and the sheet of its labels if that is another."""

    images: Sheet
    labels: Sheet | None
    wanted: Column | None  # the option `label_column`

    def column(self) -> int:
        """Return the column of labels in its sheet, from 0."""
        alone = self.labels is not None and self.wanted is None
        return 0 if alone else (self.labels or self.images).label_column(self.wanted)

    def texts(self) -> dict[int, str]:
        """Return the labels as texts, by row; BadFile if a row has none."""
        sheet, column = self.labels or self.images, self.column()
        alone = self.labels is not None and self.wanted is None
        found: dict[int, str] = {}
        for row, values in sheet.rows():
            if alone and len(values) != 1:
                raise sheet.bad(
                    row, f"has {len(values)} values; a file of labels has one column; else write label_column"
                )
            text = values[column].strip() if column < len(values) else ""
            if not is_label(text):
                raise sheet.bad(row, "has no label", column)
            found[row] = text
        return found

    def numbers(self, texts: Mapping[int, str], classes: Sequence[str], count: int) -> Tensor:
        """Return the class numbers of `count` images, int64 [count]; BadFile for an unknown class or a wrong count."""
        sheet = self.labels or self.images
        if len(texts) != count:
            raise BadFile(
                f"{sheet.path}: has {len(texts)} labels for {count} images in {self.images.path}; give each image one"
            )
        known = {name: number for number, name in enumerate(classes)}
        for row, text in texts.items():
            if text not in known:
                raise sheet.bad(row, f"{text!r} is not a class of the training images", self.column())
        return torch.tensor([known[text] for text in texts.values()])

    def pixels(self, shape: Sequence[int] | None, channels_last: bool) -> Tensor:
        """Return the images, uint8 [N, C, H, W]."""
        sheet = self.images
        labels = None if self.labels else self.column()
        found: list[npt.NDArray[np.uint8]] = []
        for row, values in sheet.rows():
            found.append(_pixels(sheet, row, values, labels))
            if row == 1 and _counts(found[0]):
                raise sheet.bad(row, "counts the columns, as pandas writes their names; write header = true")
            if len(found[-1]) != len(found[0]):
                raise sheet.bad(row, f"has {len(found[-1])} values, the rows above have {len(found[0])}")
        if not found:
            raise BadFile(f"{sheet.path}: holds no image")
        height, width, channels = _shape(sheet, len(found[0]), shape)
        images = torch.from_numpy(np.stack(found))
        if channels_last:
            return images.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return images.view(-1, channels, height, width)


def _read(tables: Mapping[Part, Table], shape: Sequence[int] | None, channels_last: bool, reading: Reading) -> Source:
    texts = {part: table.texts() for part, table in tables.items()}
    names = set(texts["train"].values())
    classes = _in_order_before(names) if reading == 1 else in_order(names)
    images = {part: table.pixels(shape, channels_last) for part, table in tables.items()}
    labels = {part: table.numbers(texts[part], classes, len(images[part])) for part, table in tables.items()}
    return Source(
        inputs=images["train"],
        targets=labels["train"],
        num_classes=len(classes),
        classes=tuple(classes),
        validation_inputs=images.get("validation"),
        validation_targets=labels.get("validation"),
        test_inputs=images.get("test"),
        test_targets=labels.get("test"),
    )


def _in_order_before(texts: set[str]) -> list[str]:
    """Return names of classes in the order of format 1: as integers if all are integers, else as texts."""
    try:
        return sorted(texts, key=int)
    except ValueError:
        return sorted(texts)


def _pixels(sheet: Sheet, row: int, values: Sequence[str], labels: int | None) -> npt.NDArray[np.uint8]:
    """Return the pixels of a row without its column of labels."""
    columns = [column for column in range(len(values)) if column != labels]
    try:
        numbers = np.array([float(values[column]) for column in columns])
        if ((numbers >= 0) & (numbers <= 255) & (numbers == np.trunc(numbers))).all():
            return numbers.astype(np.uint8)
    except ValueError:
        pass
    column = next(column for column in columns if not _is_pixel(values[column]))
    hint = "; does header = true fit?" if row == 1 else ""
    if other := next((one for one in ";\t" if one in values[column]), None):
        hint = f"; does delimiter = {json.dumps(other)} fit?"
    if values[column].casefold().endswith(endings()):
        hint = f'; for a table of files write name = "image_folder", with their folder as root and labels = {sheet.path.name!r}'
    raise sheet.bad(row, f"{values[column]!r} is not a whole number from 0 to 255{hint}", column)


def _counts(pixels: npt.NDArray[np.uint8]) -> bool:
    """Return whether the values of a row are 0, 1, 2, ... or 1, 2, 3, ..., and too many for chance."""
    return len(pixels) > FEW and pixels[0] <= 1 and bool((np.diff(pixels.astype(int)) == 1).all())


def _is_pixel(value: str) -> bool:
    try:
        return 0 <= float(value) <= 255 and float(value).is_integer()
    except ValueError:
        return False


def _shape(sheet: Sheet, values: int, shape: Sequence[int] | None) -> tuple[int, int, int]:
    """Return height, width and channels of images with this number of values."""
    edge = math.isqrt(values)
    if shape is None and edge * edge != values:
        raise BadFile(f"{sheet.path}: has {values} values per row, which is not a grey square; give shape = [C, H, W]")
    wanted = [edge, edge] if shape is None else list(shape)
    if len(wanted) not in (2, 3) or math.prod(wanted) != values:
        raise BadFile(
            f"{sheet.path}: has {values} values per row, which is not shape = {wanted}; write [H, W] or [C, H, W]"
        )
    channels = wanted[0] if len(wanted) == 3 else 1
    return wanted[-2], wanted[-1], channels
