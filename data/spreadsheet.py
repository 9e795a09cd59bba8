"""Images from spreadsheets: one table of pixel values, a row an image, and one of labels."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from torch import Tensor

from hpo.data.cache import cached, keep
from hpo.data.files import BadFile, File, OptionalFile, existing
from hpo.data.source import Source

Edge = Annotated[int, Ge(1)]


def spreadsheets(
    *,
    images: File,
    labels: File,
    test_images: OptionalFile = None,
    test_labels: OptionalFile = None,
    shape: list[Edge] | None = None,
    channels_last: bool = False,
    header: bool = False,
    delimiter: str = ",",
) -> Source:
    """Return images read from CSV files: whole numbers from 0 to 255, one image a row, and one label a row beside them.

    They are read once for each state of the files. BadFile names the row and the column, as a spreadsheet counts them,
    and the cause.

    Args:
        images: the file of pixel values.
        labels: the file of labels, in one column, as numbers or names; classes are numbered in their order.
        test_images: a test split of its own, likewise, with the same classes.
        test_labels: its labels.
        shape: [H, W] or [C, H, W] of an image; a grey square by default.
        channels_last: whether the values of a pixel's channels stand side by side.
        header: whether the first row of each file names its columns.
        delimiter: what stands between two values.
    """
    if len(delimiter) != 1:
        raise ValueError(f'delimiter = {delimiter!r}: write one character; a tabulator is "\\t"')
    if (test_images is None) != (test_labels is None):
        raise ValueError("only one of test_images and test_labels is given; give both, or neither")
    named = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    paths = {option: existing(path, option) for option, path in named.items() if path is not None}
    states = [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in paths.values()]
    sheets = {option: Sheet(path, header=header, delimiter=delimiter) for option, path in paths.items()}
    key = [states, shape, channels_last, header, delimiter]
    return cached("csv", key, lambda folder: keep(folder, _read(sheets, shape, channels_last)))


class Sheet:
    """A CSV file, row by row."""

    def __init__(self, path: Path, *, header: bool, delimiter: str) -> None:
        self.path = path
        self._header = header
        self._delimiter = delimiter
        self._columns: list[str] = []

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (row as a spreadsheet counts, values); BadFile where a row is empty or the file is no text."""
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:
                found = enumerate(csv.reader(file, delimiter=self._delimiter, strict=True), start=1)
                if self._header:
                    self._columns = next(found, (1, []))[1]
                for row, values in found:
                    if not values:
                        raise self.bad(row, "is empty; remove it")
                    yield row, values
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadFile(f"{self.path}: is no CSV file: {error}") from error

    def bad(self, row: int, cause: str, column: int | None = None) -> BadFile:
        """Return the error that names a row, and a column from 0 if it is that one's."""
        if column is None:
            return BadFile(f"{self.path}, row {row}: {cause}")
        name = f" ({self._columns[column]})" if column < len(self._columns) else ""
        return BadFile(f"{self.path}, row {row}, column {column + 1}{name}: {cause}")


def _read(sheets: dict[str, Sheet], shape: Sequence[int] | None, channels_last: bool) -> Source:
    texts = _texts(sheets["labels"])
    classes = _in_order(set(texts.values()))
    images = _images(sheets["images"], shape, channels_last)
    source = Source(
        images=images,
        labels=_labels(sheets["labels"], texts, classes, sheets["images"], len(images)),
        num_classes=len(classes),
        classes=tuple(classes),
    )
    if "test_images" not in sheets:
        return source
    images, texts = _images(sheets["test_images"], shape, channels_last), _texts(sheets["test_labels"])
    labels = _labels(sheets["test_labels"], texts, classes, sheets["test_images"], len(images))
    return replace(source, test_images=images, test_labels=labels)


def _texts(sheet: Sheet) -> dict[int, str]:
    """Return the labels as they are written, by row."""
    found = {}
    for row, values in sheet.rows():
        if len(values) != 1:
            raise sheet.bad(row, f"has {len(values)} values; labels stand in one column alone")
        if not values[0].strip():
            raise sheet.bad(row, "has no label", column=0)
        found[row] = values[0].strip()
    return found


def _in_order(texts: set[str]) -> list[str]:
    """Return names of classes in the order of their numbers: as integers if all are, else as text."""
    try:
        return sorted(texts, key=int)
    except ValueError:
        return sorted(texts)


def _labels(sheet: Sheet, texts: dict[int, str], classes: Sequence[str], beside: Sheet, count: int) -> Tensor:
    if len(texts) != count:
        raise BadFile(f"{sheet.path}: has {len(texts)} labels beside {count} images in {beside.path}; give each one")
    numbers = {name: number for number, name in enumerate(classes)}
    for row, text in texts.items():
        if text not in numbers:
            raise sheet.bad(row, f"{text!r} is no class of the training images", column=0)
    return torch.tensor([numbers[text] for text in texts.values()])


def _images(sheet: Sheet, shape: Sequence[int] | None, channels_last: bool) -> Tensor:
    found: list[npt.NDArray[np.uint8]] = []
    for row, values in sheet.rows():
        if found and len(values) != len(found[0]):
            raise sheet.bad(row, f"has {len(values)} values, the rows above have {len(found[0])}")
        found.append(_pixels(sheet, row, values))
    if not found:
        raise BadFile(f"{sheet.path}: holds no image")
    height, width, channels = _shape(sheet, len(found[0]), shape)
    images = torch.from_numpy(np.stack(found))
    if channels_last:
        return images.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()
    return images.view(-1, channels, height, width)


def _pixels(sheet: Sheet, row: int, values: Sequence[str]) -> npt.NDArray[np.uint8]:
    try:
        numbers = np.array(list(map(float, values)))
        if ((numbers >= 0) & (numbers <= 255) & (numbers == np.trunc(numbers))).all():
            return numbers.astype(np.uint8)
    except ValueError:
        pass
    column = next(column for column, value in enumerate(values) if not _is_pixel(value))
    hint = "; does header = true fit?" if row == 1 else ""
    raise sheet.bad(row, f"{values[column]!r} is no whole number from 0 to 255{hint}", column)


def _is_pixel(value: str) -> bool:
    try:
        return 0 <= float(value) <= 255 and float(value).is_integer()
    except ValueError:
        return False


def _shape(sheet: Sheet, values: int, shape: Sequence[int] | None) -> tuple[int, int, int]:
    """Return height, width and channels of images with so many values."""
    edge = math.isqrt(values)
    if shape is None and edge * edge != values:
        raise BadFile(f"{sheet.path}: has {values} values a row, no grey square; give shape = [C, H, W]")
    wanted = [edge, edge] if shape is None else list(shape)
    if len(wanted) not in (2, 3) or math.prod(wanted) != values:
        raise BadFile(
            f"{sheet.path}: has {values} values a row, which is not shape = {wanted}; write [H, W] or [C, H, W]"
        )
    channels = wanted[0] if len(wanted) == 3 else 1
    return wanted[-2], wanted[-1], channels
