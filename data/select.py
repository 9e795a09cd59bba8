"""Options of every source: classes to keep, number of rows, how they are split, and where they are kept.

`hpo.train.build.registry` offers them beside the source's own options, for a user's own source too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from hpo.data.channels import refuse_implausible
from hpo.data.inputs import Inputs, selected
from hpo.data.names import whole_number
from hpo.data.source import Reading, Source

Class = str | int  # name or number of a class
SHOWN = 20  # most names of classes in a message


def select(
    source: Source,
    *,
    classes: list[Class | list[Class]] | None = None,
    subset: Annotated[int, Ge(1)] | None = None,
    folds: Annotated[int, Ge(2)] | None = None,
    fold: Annotated[int, Ge(0)] | None = None,
    resident: bool | None = None,
    reading: Reading | None = None,
    split_seed: Annotated[int, Ge(0)] = 0,  # noqa: ARG001 (checked here; a study passes it to `load` and `load_test`)
) -> Source:
    """Return the source restricted by these options; ValueError if the source and the options do not fit.

    Args:
        source: the source as its function made it.
        classes: classes to keep, by name or number (default: all). They are numbered anew in this order. A list in the
            list makes one class of several. A number is a label of the data. If no class has a number as its name, it
            is the position among the classes, from 0.
        subset: number of rows of train and validation together to keep, stratified. The test part stays whole.
        folds: number of stratified folds of train and validation. The test part is the same for all folds.
        fold: which fold is the validation part, from 0.
        resident: whether inputs are kept in the device's memory, or read batch by batch from their store (default: by
            size). Results are the same bit for bit.
        reading: 1 takes each number in `classes` as a position, as hpo did before December 2026.
        split_seed: decides which rows are for training, validation and test, and the folds and the subset. The study's
            seed does not. In studies of before December 2026 it does.
    """
    if (folds is None) != (fold is None) or (folds is not None and fold is not None and fold >= folds):
        most = "folds - 1" if folds is None else folds - 1
        raise ValueError(f"folds = {folds}, fold = {fold}: give both, with fold from 0 to {most}")
    if folds is not None and source.own_validation is not None:
        raise ValueError(
            f"folds = {folds}: the data has a validation part of its own; remove folds and fold, "
            "or give the training part alone"
        )
    if reading is not None:
        source = replace(source, reading=reading)
    if source.reading != 1 and source.kind == "image" and not isinstance(source.inputs, dict):
        refuse_implausible(source.inputs.shape[1:])
    if classes is not None and source.task != "classification":
        raise ValueError(f"classes = {classes}: the task is {source.task}, which has no classes; remove it")
    if classes is not None:
        source = _of_classes(source, [one if isinstance(one, list) else [one] for one in classes])
    return replace(source, subset=subset, folds=folds, fold=fold, resident=resident)


def _of_classes(source: Source, wanted: Sequence[Sequence[Class]]) -> Source:
    groups = [[_number(source, one) for one in group] for group in wanted]
    listed = [number for group in groups for number in group]
    if not all(groups) or len(set(listed)) < len(listed) or len(groups) < 2:
        raise ValueError(f"classes = {list(wanted)}: name at least 2, each once, and none empty")
    renumbered = torch.full((source.num_classes,), -1)
    for new, group in enumerate(groups):
        renumbered[group] = new
    changes: dict[str, Any] = {"num_classes": len(groups), "classes": _names(source, groups)}
    changes["inputs"], changes["targets"] = _kept(source.inputs, source.targets, renumbered)
    for part, own in (("validation", source.own_validation), ("test", source.own_test)):
        if own is not None:
            changes[f"{part}_inputs"], changes[f"{part}_targets"] = _kept(*own, renumbered)
    return replace(source, **changes)


def _number(source: Source, wanted: Class) -> int:
    if isinstance(wanted, int):
        found = _positions(source) if source.reading == 1 else _labels(source, wanted)
        if wanted in found:
            return found[wanted]
    if wanted in source.classes:
        return source.classes.index(str(wanted))
    known = ", ".join(map(repr, source.classes[:SHOWN])) + (", ..." if len(source.classes) > SHOWN else "")
    if source.reading != 1 and source.classes and all(whole_number(name) is not None for name in source.classes):
        raise ValueError(f"classes: there is no class {wanted!r}; the labels are {known}")
    named = f" or {known}" if known else "; this source has no names for them"
    raise ValueError(f"classes: there is no class {wanted!r}; write a number from 0 to {source.num_classes - 1}{named}")


def _positions(source: Source) -> dict[int, int]:
    return {number: number for number in range(source.num_classes)}


def _labels(source: Source, wanted: int) -> dict[int, int]:
    """Return class numbers by label; ValueError if the wanted label is ambiguous."""
    values = [whole_number(name) for name in source.classes]
    if all(value is None for value in values):
        _refuse_another_reading(source, wanted)
        return _positions(source)
    meant = [name for name, value in zip(source.classes, values, strict=True) if value == wanted]
    if None in values or len(meant) > 1:
        why = f"it may be {' or '.join(map(repr, meant))}" if len(meant) > 1 else "only some of the names are numbers"
        raise ValueError(f"classes: {wanted} can be read in two ways, since {why}; write the class's name in quotes")
    return {value: number for number, value in enumerate(values) if value is not None}


def _refuse_another_reading(source: Source, position: int) -> None:
    """Raise ValueError if the number occurs in names of other classes than the one at this position."""
    meant = [name for name in source.classes if position in map(int, re.findall("[0-9]+", name))]
    at = source.classes[position : position + 1]
    if at and meant and tuple(meant) != at:
        raise ValueError(
            f"classes: {position} can be read in two ways: the class at this position, from 0, is {at[0]!r}, and "
            f"{' and '.join(map(repr, meant[:SHOWN]))} holds the number in its name; write the class's name in quotes"
        )


def _names(source: Source, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
    names = source.classes or [str(number) for number in range(source.num_classes)]
    return tuple("+".join(names[number] for number in group) for group in groups)


def _kept(inputs: Inputs, targets: Tensor, renumbered: Tensor) -> tuple[Inputs, Tensor]:
    new = renumbered[targets]
    rows = (new >= 0).nonzero().flatten()
    return selected(inputs, rows), new[rows]
