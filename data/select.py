"""What every source can be told: which classes to take, how many images, how they are parted, and where they are kept.

These options belong to all sources, one of the user's own too; `hpo.train.build.registry` offers them beside the source's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from hpo.data.source import Source
from hpo.data.stored import Images, as_stored

Class = str | int  # by name, or by number in the source
SHOWN = 20  # names of classes in a message


def select(
    source: Source,
    *,
    classes: list[Class | list[Class]] | None = None,
    subset: Annotated[int, Ge(1)] | None = None,
    folds: Annotated[int, Ge(2)] | None = None,
    fold: Annotated[int, Ge(0)] | None = None,
    resident: bool | None = None,
) -> Source:
    """Return the source restricted to what is wanted; ValueError if it does not hold that.

    Args:
        source: as its function made it.
        classes: the classes to keep, numbered anew in this order; several in a list become one. All by default.
        subset: how many images of train and validation together to keep, stratified; the test part stays whole.
        folds: in how many parts, stratified, train and validation are cut; the test part is sealed and the same in all.
        fold: which of them, from 0, is the validation part.
        resident: whether images are kept in the device's memory, or read batch by batch from where they are stored; by
            default the size decides. The results are the same bit for bit.
    """
    if (folds is None) != (fold is None) or (folds is not None and fold is not None and fold >= folds):
        most = "folds - 1" if folds is None else folds - 1
        raise ValueError(f"folds = {folds}, fold = {fold}: give both, with fold from 0 to {most}")
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
    changes["images"], changes["labels"] = _kept(source.images, source.labels, renumbered)
    if source.test_images is not None and source.test_labels is not None:
        changes["test_images"], changes["test_labels"] = _kept(source.test_images, source.test_labels, renumbered)
    return replace(source, **changes)


def _number(source: Source, wanted: Class) -> int:
    if isinstance(wanted, int) and 0 <= wanted < source.num_classes:
        return wanted
    if wanted in source.classes:
        return source.classes.index(str(wanted))
    known = ", ".join(map(repr, source.classes[:SHOWN])) + (", ..." if len(source.classes) > SHOWN else "")
    named = f" or {known}" if known else "; this source has no names for them"
    raise ValueError(f"classes: there is no class {wanted!r}; write a number from 0 to {source.num_classes - 1}{named}")


def _names(source: Source, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
    names = source.classes or [str(number) for number in range(source.num_classes)]
    return tuple("+".join(names[number] for number in group) for group in groups)


def _kept(images: Images, labels: Tensor, renumbered: Tensor) -> tuple[Images, Tensor]:
    new = renumbered[labels]
    rows = (new >= 0).nonzero().flatten()
    return as_stored(images)[rows], new[rows]
