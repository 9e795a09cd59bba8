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
from hpo.data.names import Part
from hpo.data.sheet import Column, Sheet
from hpo.data.sheet_labels import Labelling, Labels, labelled
from hpo.data.source import Reading, Source, Task

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
    label_column: Column | list[Column] | None = None,
    task: Task | None = None,
    positive: str | None = None,
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
            label or class, or the only column of a file of labels. A regression or a multilabel task may have a list of
            columns, by default all columns of a file of labels.
        task: classification, binary, multilabel (labels of 0 and 1) or regression (labels are numbers, such as the places of
            key points in pixels). Default: classification.
        positive: the label of a binary target that counts as positive (default: 1, true, yes or positive).
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
        part: Table(
            images=sheets[f"{prefix}images"],
            labels=Labels(
                sheet=sheets.get(f"{prefix}labels", sheets[f"{prefix}images"]),
                alone=f"{prefix}labels" in sheets,
                wanted=label_column,
            ),
        )
        for part, prefix in PREFIXES.items()
        if f"{prefix}images" in sheets
    }
    labelling = Labelling(task=task, positive=positive, reading=reading)
    key = [states, list(paths), label_column, shape, channels_last, header, delimiter, reading]
    key += [task, positive] if task else []  # entries of classification keep their keys
    source = cached("csv", key, lambda folder: keep(folder, _read(tables, shape, channels_last, labelling)))
    place = paths["images"]
    return replace(source, place=lambda row: f"{place}, row {row + 1 + header}", reading=reading)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The sheet of a part's images, and its labels."""

    images: Sheet
    labels: Labels

    def pixels(self, shape: Sequence[int] | None, channels_last: bool) -> Tensor:
        """Return the images, uint8 [N, C, H, W]."""
        sheet = self.images
        labels = [] if self.labels.sheet is not sheet else self.labels.columns
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


def _read(
    tables: Mapping[Part, Table], shape: Sequence[int] | None, channels_last: bool, labelling: Labelling
) -> Source:
    found = labelled({part: table.labels for part, table in tables.items()}, labelling)
    tensors: dict[str, Tensor] = {}
    for part, table in tables.items():
        pixels, targets = table.pixels(shape, channels_last), found.targets[part]
        if len(targets) != len(pixels):
            raise BadFile(
                f"{table.labels.sheet.path}: has {len(targets)} labels for {len(pixels)} images in {table.images.path}; "
                "give each image one"
            )
        tensors |= {f"{PREFIXES[part]}inputs": pixels, f"{PREFIXES[part]}targets": targets}
    return Source(**tensors, **found.about_source)  # type: ignore[arg-type]


def _pixels(sheet: Sheet, row: int, values: Sequence[str], labels: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the pixels of a row without its columns of labels."""
    columns = [column for column in range(len(values)) if column not in labels]
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
