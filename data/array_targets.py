"""The targets in an archive of arrays: classes, flags or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.archive import Archive, Array
from hpo.data.files import BadFile
from hpo.data.floats import MOST_WHOLE, first_beyond, lost_digits, said_of
from hpo.data.names import Part, in_order, is_label
from hpo.data.source import Task
from hpo.data.tasks import MOST_CLASSES, positive_of

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayTargets:
    """The targets of each part, and what a source says about them."""

    values: Mapping[Part, Tensor]
    task: Task
    classes: tuple[str, ...] = ()  # by class number; of a binary target the negative and the positive one
    notes: tuple[str, ...] = ()

    @property
    def about_source(self) -> dict[str, Any]:
        """The arguments of a `Source` that do not depend on a part."""
        count = len(self.classes) if self.task == "classification" else 0
        return {"task": self.task, "num_classes": count, "classes": self.classes}


def targets_of(archive: Archive, task: Task | None, positive: str | None) -> ArrayTargets:
    """Return the targets of all parts; BadFile, which names the array and the place, if they do not fit the task.

    Args:
        archive: the arrays.
        task: the task; None: regression for real numbers, else classification.
        positive: the label of a binary target that counts as positive; None: found from the two labels.
    """
    parts = [part for part in PARTS if archive.has(part)]
    found: Task = task or ("regression" if _are_real(archive) else "classification")
    if positive is not None and found != "binary":
        raise ValueError(f'positive = {positive!r} goes with task = "binary", and this is {found}; remove it')
    if found == "regression":
        return ArrayTargets(values={part: _reals(archive, part) for part in parts}, task=found)
    if found == "multilabel":
        return ArrayTargets(values={part: _flags(archive, part) for part in parts}, task=found)
    order = _order_of(archive)
    numbers = {part: _numbers(archive, part, order) for part in parts}
    classes = tuple(order)
    if len(classes) == 1:
        raise archive.bad("train", "labels", f"is {classes[0]} everywhere, so there is nothing to predict")
    if found == "classification":
        return ArrayTargets(values=numbers, task=found, classes=classes)
    try:
        number = positive_of(classes, positive)
    except ValueError as error:
        raise archive.bad("train", "labels", str(error)) from error
    flags = {part: (one == number)[:, None] for part, one in numbers.items()}
    return ArrayTargets(values=flags, task=found, classes=(classes[1 - number], classes[number]))


def _are_real(archive: Archive) -> bool:
    """Return whether the training targets are numbers to predict: many real ones, and no shares of classes."""
    values = archive.arrays["train", "labels"]
    if archive.reading == 1 or values.dtype.kind != "f" or values.ndim not in (1, 2) or not values.size:
        return False
    different = np.unique(values[np.isfinite(values)])
    if (different == np.trunc(different)).all() or len(different) <= MOST_CLASSES:
        return False
    is_share = values.ndim == 2 and values.shape[1] > 1 and np.allclose(values.sum(1), 1) and (values >= 0).all()
    return not is_share


def _reals(archive: Archive, part: Part) -> Tensor:
    """Return a part's targets of a regression, float32 [N, T]."""
    values, rows = archive.arrays[part, "labels"], len(archive.arrays[part, "images"])
    if values.dtype.kind not in "biuf" or values.ndim not in (1, 2) or len(values) != rows or not values.size:
        said = f"is {values.dtype} {list(values.shape)} beside {rows} {archive.names[part, 'images']}"
        raise archive.bad(part, "labels", f"{said}; give numbers [N] or [N, T]")
    table = values.reshape(rows, -1).astype(np.float64)
    wrong = np.flatnonzero(np.isnan(table))
    place = first_beyond(table)
    if len(wrong) or place is not None:
        row, column = divmod(int(wrong[0]) if place is None else place, table.shape[1])
        cause = "is nan; leave the row out" if place is None else f"{said_of(float(table[row, column]))}"
        raise archive.bad(part, "labels", cause, *((row,) if values.ndim == 1 else (row, column)))
    for number, column_values in enumerate(table.T if part == "train" else ()):
        said = f"column {number} " if table.shape[1] > 1 else ""
        if (column_values == column_values[0]).all():
            raise archive.bad(
                part, "labels", f"{said}is {column_values[0]:g} everywhere, so there is nothing to predict"
            )
        if why := lost_digits(column_values):
            raise archive.bad(part, "labels", f"{said}{why}")
    return torch.from_numpy(table.astype(np.float32))


def _flags(archive: Archive, part: Part) -> Tensor:
    """Return a part's flags, bool [N, L]."""
    values, rows = archive.arrays[part, "labels"], len(archive.arrays[part, "images"])
    if values.dtype.kind not in "biuf" or values.ndim != 2 or len(values) != rows or not values.size:
        said = f"is {values.dtype} {list(values.shape)} beside {rows} {archive.names[part, 'images']}"
        raise archive.bad(part, "labels", f"{said}; a multilabel target is 0 and 1, [N, L]")
    wrong = np.argwhere((values != 0) & (values != 1))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise archive.bad(part, "labels", f"is {values[place]}; a multilabel target is 0 and 1", *place)
    for number, column in enumerate(values.T if part == "train" else ()):
        if (column == column[0]).all():
            raise archive.bad(
                part, "labels", f"column {number} is {int(column[0])} everywhere, so there is nothing to predict"
            )
    return torch.from_numpy(values == 1)


def _order_of(archive: Archive) -> dict[str, int]:
    """Return the number of each class by its name."""
    names = [str(value) for value in np.unique(_labels(archive, "train")).tolist()]
    return {name: number for number, name in enumerate(names if archive.reading == 1 else in_order(names))}


def _numbers(archive: Archive, part: Part, classes: Mapping[str, int]) -> Tensor:
    """Return a part's class numbers, int64 [N]."""
    labels = _labels(archive, part)
    values, inverse = np.unique(labels, return_inverse=True)
    numbers = np.array([classes.get(str(value), -1) for value in values.tolist()])
    found = numbers[inverse]
    if (found < 0).any():
        row = int((found < 0).argmax())
        raise archive.bad(part, "labels", f"is {labels[row]}, which is not a class of the training images", row)
    return torch.from_numpy(found.astype(np.int64))


def _labels(archive: Archive, part: Part) -> Array:
    """Return a part's labels [N], as integers or texts."""
    values, images = archive.arrays[part, "labels"], archive.arrays[part, "images"]
    name = archive.names[part, "labels"]
    if values.dtype == object:
        values = _plain(archive, name, values)
    if values.ndim == 2 and values.shape[1] > 1 and len(values) == len(images):
        values = _from_one_hot(archive, name, values)
    if values.size == len(images) and values.ndim:
        values = values.reshape(-1)
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    elif values.dtype.kind == "f":
        values = _whole(archive, name, values)
    elif values.dtype.kind == "S":
        values = _decoded(archive, name, values)
    if values.dtype.kind not in "iuU" or values.shape != images.shape[:1]:
        at_the_end = values.ndim == 1 and images.ndim > 2 and len(values) == images.shape[-1]
        mend = (
            f"the last side of {archive.names[part, 'images']} counts the images; bring it to the front by np.moveaxis"
            if at_the_end
            else "give each a whole number or a text"
        )
        raise BadFile(
            f"{archive.path}: {name} is {values.dtype} {list(values.shape)} beside {len(images)} "
            f"{archive.names[part, 'images']}; {mend}"
        )
    if values.dtype.kind == "U":
        texts = np.char.strip(values)
        for row, text in enumerate(texts.tolist()):
            if not (text if archive.reading == 1 else is_label(text)):
                raise BadFile(f"{archive.path}: {name}[{row}] has no label")
        return values if archive.reading == 1 else texts
    return values


def _decoded(archive: Archive, name: str, values: Array) -> Array:
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{archive.path}: {name} holds bytes that are not UTF-8 ({error}); save them as texts") from error


def _plain(archive: Archive, name: str, values: Array) -> Array:
    """Return labels that are Python objects as an array of texts or of numbers."""
    listed = values.reshape(-1).tolist()
    kind = next((kind for kind in (str, bytes) if isinstance(listed[0], kind)), (int, float))
    if all(isinstance(value, kind) for value in listed):
        return np.array(listed).reshape(values.shape)
    row = next(row for row, value in enumerate(listed) if not isinstance(value, kind))
    raise BadFile(
        f"{archive.path}: {name}[{row}] is {listed[row]!r}, of type {type(listed[row]).__name__}; "
        "give all labels as texts, or all as whole numbers"
    )


def _whole(archive: Archive, name: str, values: Array) -> Array:
    is_whole = (np.abs(values.astype(np.float64)) < MOST_WHOLE) & (values == np.trunc(values))  # False for nan
    odd = np.flatnonzero(~is_whole.reshape(-1))
    if len(odd):
        raise BadFile(
            f"{archive.path}: {name}[{odd[0]}] is {values.reshape(-1)[odd[0]]}; give each a whole number or a text, "
            'or write task = "regression"'
        )
    return values.astype(np.int64)


def _from_one_hot(archive: Archive, name: str, values: Array) -> Array:
    is_one = values == 1 if values.dtype.kind in "iufb" else np.zeros(values.shape, dtype=bool)
    odd = np.flatnonzero((is_one.sum(1) != 1) | ((values != 0) != is_one).any(1))
    if len(odd):
        raise BadFile(
            f"{archive.path}: {name} is {list(values.shape)}, but row {odd[0]} is not zeros with a single 1; "
            'give each image one label, or write task = "multilabel" or "regression"'
        )
    found: Array = is_one.argmax(1)
    return found
