"""The target columns of a table: the task that they stand for, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.files import BadFile
from hpo.data.names import in_order, whole_number
from hpo.data.source import Task
from hpo.data.tables.column import FEW, Codes, Column, Mask
from hpo.data.tasks import MOST_CLASSES, positive_of

FLAGS = ("false", "true")


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The targets of all rows, and what a source says about them."""

    values: Tensor  # of the type and shape that the task wants
    task: Task
    classes: tuple[str, ...] = ()  # by class number; of a binary target the negative and the positive one; label names
    names: tuple[str, ...]  # of the columns
    notes: tuple[str, ...] = ()  # how the task was found

    @property
    def about_source(self) -> dict[str, Any]:
        """The arguments of a `Source` that do not depend on a part."""
        return {
            "task": self.task,
            "num_classes": len(self.classes) if self.task == "classification" else 0,
            "classes": self.classes,
            "target_names": self.names if self.task == "regression" else (),
        }


def targets_of(columns: Sequence[Column], in_training: Mask, task: Task | None, positive: str | None) -> Targets:
    """Return the targets in these columns; BadFile if they are missing, constant, identifiers, or do not fit the task.

    Args:
        columns: the target columns.
        in_training: bool [N], rows of the training part, or of the parts that are still to be split off.
        task: the task; None: found from the values.
        positive: the value of a binary target that counts as positive; None: found from the two values.
    """
    for column in columns:
        column.refuse_missing("give each row a target, or remove the row")
    found, notes = (task, ()) if task else _task(columns)
    if positive is not None and found != "binary":
        raise columns[0].bad(f'positive = {positive!r} goes with task = "binary", and this is {found}; remove it')
    if found in ("classification", "binary") and len(columns) > 1:
        listed = ", ".join(column.name for column in columns)
        raise columns[0].bad(
            f'task = "{found}" has one target column, here are {listed}; name one, or write another task'
        )
    names = tuple(column.name for column in columns)
    if found == "regression":
        numbers = np.stack([_numbers(column, in_training) for column in columns], axis=1)
        return Targets(values=torch.from_numpy(numbers.astype(np.float32)), task=found, names=names, notes=notes)
    if found == "multilabel":
        flags = np.stack([_flags(column, in_training) for column in columns], axis=1)
        return Targets(values=torch.from_numpy(flags), task=found, classes=names, names=names, notes=notes)
    numbered, classes = _classes(columns[0], in_training)
    if found == "classification":
        return Targets(values=torch.from_numpy(numbered), task=found, classes=classes, names=names, notes=notes)
    number = _positive(columns[0], classes, positive)
    values = torch.from_numpy(numbered == number)[:, None]
    ordered = (classes[1 - number], classes[number])
    return Targets(values=values, task="binary", classes=ordered, names=names, notes=notes)


def _task(columns: Sequence[Column]) -> tuple[Task, tuple[str, ...]]:
    """Return the task that the columns stand for, and a note if another one is as plausible."""
    for column in columns:
        column.refuse_dates()
        if column.kind == "other":
            raise column.bad(f"holds values of type {column.values.type}; give numbers or texts")
    if len(columns) > 1:
        if all(_has_flags(column) for column in columns):
            return "multilabel", ()
        other = next((column for column in columns if column.kind != "numbers"), None)
        if other is not None:
            raise other.bad(
                'holds texts; several target columns are numbers for task = "regression", or 0 and 1 for task = "multilabel"'
            )
        return "regression", ()
    column = columns[0]
    if column.kind != "numbers":
        return "classification", ()
    values = column.numbers()
    different = np.unique(values)
    if len(different) > MOST_CLASSES:
        return "regression", ()
    said = f"target {column.name} has {len(different)} different"
    if (different != np.trunc(different)).any():
        return "regression", (f'{said} numbers, read as numbers; task = "classification" reads them as classes',)
    note = f'{said} whole numbers, read as classes; task = "regression" reads them as numbers'
    return "classification", () if len(different) == 2 else (note,)


def _numbers(column: Column, in_training: Mask) -> Any:
    """Return the numbers of a target column."""
    values = column.numbers()
    _refuse_a_constant(column, in_training, len(np.unique(values[in_training])))
    if column.counts_rows:
        raise _identifier(column, "numbers the rows")
    return values


def _has_flags(column: Column) -> bool:
    """Return whether the values are 0 and 1, or false and true."""
    names = column.codes()[1]
    return all(name.casefold() in FLAGS for name in names) or all(map(_is_bit, names))


def _is_bit(name: str) -> bool:
    return whole_number(name) in (0, 1)


def _flags(column: Column, in_training: Mask) -> Mask:
    """Return the values of a column of a multilabel target."""
    codes, names = column.codes()
    if not _has_flags(column):
        wrong = next((name for name in names if not _is_bit(name) and name.casefold() not in FLAGS), names[0])
        row = int((codes == names.index(wrong)).argmax())
        raise column.bad(f"{wrong!r} is not one of 0 and 1, or false and true, which a multilabel target holds", row)
    _refuse_a_constant(column, in_training, len(np.unique(codes[in_training])))
    is_on = np.array([name.casefold() == "true" or whole_number(name) == 1 for name in names])
    found: Mask = is_on[codes]
    return found


def _classes(column: Column, in_training: Mask) -> tuple[Codes, tuple[str, ...]]:
    """Return the class number of each row, and the classes of the training rows in their order."""
    column.refuse_dates()
    codes, names = column.codes()
    known = {names[code] for code in np.unique(codes[in_training])}
    _refuse_a_constant(column, in_training, len(known))
    rows = int(in_training.sum())
    if len(known) > FEW and 2 * len(known) > rows:
        raise _identifier(column, f"has {len(known)} different values in {rows} rows")
    classes = in_order(known)
    number = {name: place for place, name in enumerate(classes)}
    new = np.array([number.get(name, -1) for name in names])
    found = new[codes]
    if (found < 0).any():
        row = int((found < 0).argmax())
        raise column.bad(
            f"{names[codes[row]]!r} is not a class of the training rows; correct it, or move such rows", row
        )
    return found.astype(np.int64), tuple(classes)


def _positive(column: Column, classes: Sequence[str], positive: str | None) -> int:
    try:
        return positive_of(classes, positive)
    except ValueError as error:
        raise column.bad(str(error)) from error


def _refuse_a_constant(column: Column, in_training: Mask, different: int) -> None:
    if different == 1:
        value = column.shown(int(in_training.argmax()))
        raise column.bad(f"is {value} in all training rows, so there is nothing to predict; name another target")


def _identifier(column: Column, why: str) -> BadFile:
    return column.bad(f"{why}, like an identifier; name the column that is to be predicted as target")
