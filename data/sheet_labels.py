"""Labels in columns of CSV files: classes, flags or numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.files import BadFile
from hpo.data.floats import lost_digits, said_of
from hpo.data.names import Part, in_order, is_label
from hpo.data.sheet import Column, Sheet
from hpo.data.source import Reading, Task
from hpo.data.tasks import MOST_CLASSES, positive_of

FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How labels are read."""

    task: Task | None  # None: classification, unless labels are plainly numbers to predict
    positive: str | None  # the label of a binary target that counts as positive
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a part's images."""

    sheet: Sheet
    alone: bool  # whether the sheet holds nothing but labels, unless `wanted` says which columns they are
    wanted: Column | list[Column] | None  # the option `label_column`

    @cached_property
    def columns(self) -> list[int]:
        """The columns of labels, from 0."""
        if self.alone and self.wanted is None:
            return list(range(len(next(self.sheet.rows(), (0, [""]))[1])))
        wanted = self.wanted if isinstance(self.wanted, list) else [self.wanted]
        return [self.sheet.label_column(one) for one in wanted]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns, or their numbers from 1."""
        named = self.sheet.columns
        return tuple(named[one].strip() if one < len(named) else str(one + 1) for one in self.columns)

    def texts(self) -> dict[int, str]:
        """Return the labels of one column as texts, by row; BadFile if a row has none."""
        sheet, alone, column = self.sheet, self.alone and self.wanted is None, self.columns[0]
        if isinstance(self.wanted, list) and len(self.wanted) != 1:
            raise BadFile(f"{sheet.path}: label_column names {len(self.wanted)} columns; classes stand in one")
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

    def numbers(self, texts: Mapping[int, str], classes: Sequence[str]) -> Tensor:
        """Return the class numbers, int64 [N]; BadFile for an unknown class."""
        known = {name: number for number, name in enumerate(classes)}
        for row, text in texts.items():
            if text not in known:
                raise self.sheet.bad(row, f"{text!r} is not a class of the training images", self.columns[0])
        return torch.tensor([known[text] for text in texts.values()])

    def reals(self) -> Tensor:
        """Return the labels as numbers, float32 [N, T]; BadFile, which names row and column, for another value."""
        found = self._converted(_real)
        for number, column in zip(self.columns, found.T, strict=True):
            if why := lost_digits(column):
                raise self.sheet.bad(1 + self.sheet.header, why, number)
        return torch.from_numpy(found.astype(np.float32))

    def flags(self) -> Tensor:
        """Return the labels as flags, bool [N, L]; BadFile, which names row and column, for another value."""
        return torch.from_numpy(self._converted(_flag) == 1)

    def _converted(self, convert: Callable[[str], float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        rows = []
        for row, values in self.sheet.rows():
            if len(values) <= max(self.columns) or (
                self.alone and self.wanted is None and len(values) != len(self.columns)
            ):
                raise self.sheet.bad(row, f"has {len(values)} values, the rows above have {len(self.columns)}")
            for column in self.columns:
                try:
                    rows.append(convert(values[column].strip()))
                except ValueError as error:
                    raise self.sheet.bad(row, str(error), column) from None
        return np.array(rows).reshape(-1, len(self.columns))

    def refuse_constants(self, targets: Tensor) -> None:
        """Raise BadFile if a column of labels has one value only."""
        for number, column in zip(self.columns, targets.T, strict=True):
            if bool((column == column[0]).all()):
                raise self.sheet.bad(
                    1 + self.sheet.header,
                    f"is {column[0].item():g} in all rows, so there is nothing to predict",
                    number,
                )


def _real(text: str) -> float:
    if not is_label(text):
        raise ValueError("has no label; leave the image out")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number, which a regression predicts") from None
    if why := said_of(value):
        raise ValueError(f"{text} {why}")
    return value


def _flag(text: str) -> float:
    if text.casefold() not in FLAGS:
        raise ValueError(f"{text!r} is not one of 0 and 1, which a multilabel task predicts")
    return FLAGS[text.casefold()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """The labels of all parts, and what a source says about them."""

    targets: Mapping[Part, Tensor]
    about_source: Mapping[str, Any]  # the arguments of a `Source` that do not depend on a part


def labelled(labels: Mapping[Part, Labels], labelling: Labelling) -> Labelled:
    """Return the labels of all parts; BadFile, which names row and column, if they do not fit the task."""
    task: Task = labelling.task or "classification"
    of_training = labels["train"]
    if labelling.positive is not None and task != "binary":
        raise ValueError(f'positive = {labelling.positive!r} goes with task = "binary", and this is {task}; remove it')
    if task in ("regression", "multilabel"):
        targets = {part: one.reals() if task == "regression" else one.flags() for part, one in labels.items()}
        of_training.refuse_constants(targets["train"].float())
        names = {"target_names" if task == "regression" else "classes": of_training.names}
        return Labelled(targets=targets, about_source={"task": task, **names})
    texts = {part: one.texts() for part, one in labels.items()}
    different = set(texts["train"].values())
    classes = _in_order_before(different) if labelling.reading == 1 else in_order(different)
    numbers = {part: labels[part].numbers(texts[part], classes) for part in labels}
    if task == "classification":
        if labelling.task is None and labelling.reading != 1:
            _refuse_numbers_to_predict(of_training, classes, len(texts["train"]))
        about = {"num_classes": len(classes), "classes": tuple(classes)}
        return Labelled(targets=numbers, about_source=about)
    try:
        number = positive_of(classes, labelling.positive)
    except ValueError as error:
        raise of_training.sheet.bad(1 + of_training.sheet.header, str(error), of_training.columns[0]) from error
    flags = {part: (one == number)[:, None] for part, one in numbers.items()}
    return Labelled(targets=flags, about_source={"task": task, "classes": (classes[1 - number], classes[number])})


def _refuse_numbers_to_predict(labels: Labels, classes: Sequence[str], rows: int) -> None:
    """Raise BadFile if most rows have a class of their own, and the names of classes are real numbers."""
    if len(classes) <= MOST_CLASSES or 2 * len(classes) < rows:
        return
    try:
        values = [float(name) for name in classes]
    except ValueError:
        return
    if not all(map(float.is_integer, values)):
        raise BadFile(
            f"{labels.sheet.path}: has {len(classes)} different real numbers as labels of {rows} images; write task = "
            '"regression" to predict them, or task = "classification"'
        )


def _in_order_before(texts: set[str]) -> list[str]:
    """Return names of classes in the order of format 1: as integers if all are integers, else as texts."""
    try:
        return sorted(texts, key=int)
    except ValueError:
        return sorted(texts)
