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
from hpo.data.inputs import selected
from hpo.data.names import whole_number
from hpo.data.source import Reading, Source, SplitRule
from hpo.data.split import can_be_stratified

Class = str | int  # name or number of a class
SHOWN = 20  # most names of classes in a message


def select(
    source: Source,
    *,
    classes: list[Class | list[Class]] | None = None,
    split: SplitRule | None = None,
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
        split: how rows are divided: stratified by class or by quantiles of a single number; at random; by group, so that
            no group is in two parts; or by time, the latest rows for test and those before them for validation (default:
            by the groups or times that the data names, else stratified, else at random if a row has several targets).
        subset: number of rows of train and validation together to keep, stratified by class. The test part stays whole.
        folds: number of folds of train and validation, made as `split` says. The test part is the same for all folds. By
            time each fold trains on what lies before its validation part.
        fold: which fold is the validation part, from 0.
        resident: whether inputs are kept in the device's memory, or read batch by batch from their store (default: by
            size). Results are the same bit for bit. Tables, tokens and named tensors are always kept in memory.
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
    source = replace(source, split=split, subset=subset, folds=folds, fold=fold, resident=resident)
    _refuse_rule(source)
    return source


def _refuse_rule(source: Source) -> None:
    """Raise ValueError if the data cannot be divided as `split` says, or names two ways without it."""
    said = f'split = "{source.split}"'
    if source.split is None:
        if source.groups is not None and source.times is not None:
            raise ValueError('the data names groups and times; write split = "group" or split = "time"')
        return
    if source.own_validation is not None and source.own_test is not None:
        raise ValueError(
            f"{said}: the data has a validation and a test part of its own, so nothing is split; remove it"
        )
    if source.split == "group" and source.groups is None:
        raise ValueError(
            f"{said}: the data names no groups; a table or npz takes `group`, image_folder `group_column`, "
            "a Source of your own `groups`"
        )
    if source.split == "time" and source.times is None:
        raise ValueError(f"{said}: the data names no times; a table or npz takes `time`, a Source of your own `times`")
    if source.split == "stratified" and not can_be_stratified(source):
        count = source.targets.shape[1]
        raise ValueError(f'{said}: a row has {count} targets, which cannot be balanced at once; write split = "random"')


def _of_classes(source: Source, wanted: Sequence[Sequence[Class]]) -> Source:
    groups = [[_number(source, one) for one in group] for group in wanted]
    listed = [number for group in groups for number in group]
    if not all(groups) or len(set(listed)) < len(listed) or len(groups) < 2:
        raise ValueError(f"classes = {list(wanted)}: name at least 2, each once, and none empty")
    renumbered = torch.full((source.num_classes,), -1)
    for new, group in enumerate(groups):
        renumbered[group] = new
    changes: dict[str, Any] = {"num_classes": len(groups), "classes": _names(source, groups)}
    for prefix in ("", "validation_", "test_"):
        if getattr(source, f"{prefix}targets") is not None:
            changes |= _kept(source, prefix, renumbered)
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


def _kept(source: Source, prefix: str, renumbered: Tensor) -> dict[str, Any]:
    """Return the fields of a part with the rows of the kept classes."""
    targets = renumbered[getattr(source, f"{prefix}targets")]
    rows = (targets >= 0).nonzero().flatten()
    kept: dict[str, Any] = {
        f"{prefix}inputs": selected(getattr(source, f"{prefix}inputs"), rows),
        f"{prefix}targets": targets[rows],
    }
    keys = {name: getattr(source, name, None) for name in (f"{prefix}groups", f"{prefix}times")}
    if not prefix and isinstance(source.inputs, dict):  # else the inputs know their rows in the store
        kept["place"] = lambda row: source.placed(int(rows[row]))
    return kept | {name: key[rows] for name, key in keys.items() if key is not None}
