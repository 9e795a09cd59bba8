"""Splits of a source into train, validation and test, decided by a rule and a seed alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hpo.data.source import Source, SplitRule
from hpo.data.splitters import ByClass, ByGroup, ByQuantile, ByTime, Rows, Splitter, quantiles, refuse_narrow_classes

HELD_OUT = 0.15  # share of the split rows for validation, and again for test

# By number of parts: rows that a class needs to have at least one in each part, for any rounding.
FEWEST = {1: 1, 2: 7, 3: 8}
TOLD = 10  # most rare classes named in a message


def parted(source: Source, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of a source's train, validation and test part, each int64 and sorted.

    A shipped part is taken whole, with indices into its own rows. The other parts are split off `source.inputs`.
    Folds and a subset do not change the test part. ValueError if a class or the source has too few rows.
    """
    classes, own_validation, own_test = strata(source, source.targets), source.own_validation, source.own_test
    splitter = _splitter(source)
    everything = np.arange(len(classes))
    _refuse_few(source, everything, 3 - (own_validation is not None) - (own_test is not None))
    count = math.ceil(HELD_OUT * len(everything))
    if own_test is None:
        rest, test = splitter.hold_out(everything, count, seed)
    else:
        rest, test = everything, np.arange(len(own_test[1]))
    if source.folds is not None and source.fold is not None:
        _refuse_few_for_folds(source, rest, source.folds)
        train, validation = splitter.fold(rest, source.folds, source.fold, seed)
    elif own_validation is None:
        train, validation = splitter.hold_out(rest, count, seed)
    else:
        train, validation = rest, np.arange(len(own_validation[1]))
    if source.subset is not None:
        of_validation = classes if own_validation is None else strata(source, own_validation[1])
        train, validation = _subset(source, train, classes, validation, of_validation, source.subset, seed)
    return torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test)


def strata(source: Source, targets: Tensor) -> Tensor:
    """Return the stratum of each row, int64 [N]: its class, or 0 for a task without classes."""
    if source.task == "classification":
        return targets
    return targets[:, 0].long() if source.task == "binary" else torch.zeros(len(targets), dtype=torch.int64)


def rule_of(source: Source) -> SplitRule:
    """Return the rule that divides a source's rows: as declared, else by its groups or times, else by its task."""
    if source.split is not None:
        return source.split
    if source.groups is not None:
        return "group"
    if source.times is not None:
        return "time"
    return "stratified" if can_be_stratified(source) else "random"


def can_be_stratified(source: Source) -> bool:
    """Return whether each row has one class or one number; several labels or numbers cannot be balanced at once."""
    return source.task in ("classification", "binary") or (source.task == "regression" and source.targets.shape[1] == 1)


def _splitter(source: Source) -> Splitter:
    rule, classes = rule_of(source), strata(source, source.targets).cpu().numpy()
    if rule == "time":
        assert source.times is not None
        return ByTime(times=source.times.numpy())
    is_number = source.task == "regression" and can_be_stratified(source)
    if rule == "group":
        assert source.groups is not None
        balanced = quantiles(source.targets[:, 0].numpy(), 1) if is_number else classes
        return ByGroup(groups=source.groups.numpy(), classes=balanced)
    if rule == "stratified" and is_number:
        return ByQuantile(values=source.targets[:, 0].numpy())
    return ByClass(classes=classes if rule == "stratified" else np.zeros_like(classes))


def _refuse_few(source: Source, rows: Rows, parts: int) -> None:
    """Raise ValueError if the rows are too few for this number of parts that are to be divided."""
    rule = rule_of(source)
    has_classes = source.task in ("classification", "binary")
    if parts == 1 or rule == "time":
        return
    if rule == "group":
        assert source.groups is not None
        count = len(torch.unique(source.groups))
        if count < parts:
            raise ValueError(f'split = "group": {count} groups are too few for {parts} parts that share no group')
        if has_classes:
            refuse_narrow_classes(source.groups.numpy(), strata(source, source.targets).numpy(), parts, source.class_at)
    elif rule == "stratified" and has_classes:
        refuse_rare_classes(source, torch.from_numpy(rows), FEWEST[parts])
    elif len(rows) < FEWEST[parts]:
        raise ValueError(f"{len(rows)} rows are too few for {parts} parts; give at least {FEWEST[parts]}")


def _refuse_few_for_folds(source: Source, rest: Rows, folds: int) -> None:
    """Raise ValueError if the rows outside the test part are too few for this number of folds."""
    rule = rule_of(source)
    if rule in ("stratified", "group") and source.task in ("classification", "binary"):
        refuse_rare_classes(source, torch.from_numpy(rest), folds)
    elif len(rest) < folds:
        raise ValueError(f"folds = {folds}: train and validation have {len(rest)} rows; give at most {len(rest)} folds")


def _subset(
    source: Source, train: Rows, classes: Tensor, validation: Rows, of_validation: Tensor, count: int, seed: int
) -> tuple[Rows, Rows]:
    """Return `count` rows of train and validation together, in the proportion of the two."""
    whole = len(train) + len(validation)
    held = round(count * len(validation) / whole)
    fewest = int((classes.bincount() > 0).sum())
    if count > whole or held < fewest or count - held < fewest:
        least = math.ceil((fewest + 0.5) * whole / min(len(train), len(validation)))
        in_classes = f" in {fewest} classes" if fewest > 1 else ""
        raise ValueError(
            f"subset = {count}: train and validation have {whole} {source.unit}s{in_classes}; "
            f"give a number from {least} to {whole}, or leave it out"
        )
    return _some(train, classes, count - held, seed), _some(validation, of_validation, held, seed)


def _some(rows: Rows, classes: Tensor, count: int, seed: int) -> Rows:
    """Return `count` of the rows, stratified and sorted. A larger choice contains every smaller one."""
    shuffled = np.random.RandomState(seed % 2**32).permutation(rows)
    by_class = shuffled[np.argsort(classes.numpy()[shuffled], kind="stable")]
    _, sizes = np.unique(classes.numpy()[by_class], return_counts=True)
    # Relative place of each row in its class. The `count` first places hold the same share of each class.
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.sort(by_class[np.argsort(places, kind="stable")[:count]])


def refuse_rare_classes(source: Source, rows: Tensor, fewest: int) -> None:
    """Raise ValueError if a class has too few of these rows. It names the classes and a row of each."""
    classes = strata(source, source.targets)[rows]
    numbers, counts = torch.unique(classes, return_counts=True)
    rare = (counts < fewest).nonzero().flatten().tolist()
    if not rare:
        return
    unit, lines = source.unit, []
    for place in rare[:TOLD]:
        number, count = int(numbers[place]), int(counts[place])
        first = source.placed(int(rows[classes == number][0]))
        lines.append(
            f"class {source.named(number)} has {count} {unit}{'s' * (count > 1)} ({'first: ' * (count > 1)}{first})"
        )
    more = f", and {len(rare) - TOLD} more classes" if len(rare) > TOLD else ""
    other = "write the classes to keep into `classes`, where a list in the list makes one class of several"
    if source.task == "binary":
        other = 'write split = "random"'
    raise ValueError(
        f"{', '.join(lines)}{more}: too few for every part of a stratified split, which takes at least {fewest} of each "
        f"class; add {unit}s, or {other}"
    )


def notes_on(source: Source, train: Tensor, validation: Tensor, test: Tensor) -> tuple[str, ...]:
    """Return how the rows of a source are divided, "" for classes that are stratified, and which classes a part lacks.

    Args:
        train: the rows of each part, as `parted` returns them.
    """
    if source.own_validation is not None and source.own_test is not None:
        return ()
    return tuple(
        note for note in (_rule_note(source, train, validation, test), _gap_note(source, train, validation)) if note
    )


def _rule_note(source: Source, train: Tensor, validation: Tensor, test: Tensor) -> str:
    rule, divided = rule_of(source), {"train": train}
    divided |= {} if source.own_validation else {"validation": validation}
    divided |= {} if source.own_test else {"test": test}
    if rule == "group":
        assert source.groups is not None
        counts = ", ".join(f"{len(torch.unique(source.groups[rows]))} in {part}" for part, rows in divided.items())
        return f"split by group, none in two parts: {counts}"
    if rule == "time":
        left = len(source.targets) - sum(map(len, divided.values()))
        unused = f"; {left} {source.unit}s are not used by this fold or subset" if left else ""
        return f"split by time, the latest {source.unit}s last; split_seed has no effect on it{unused}"
    if rule == "random":
        why = "" if can_be_stratified(source) else f", since a row has {source.targets.shape[1]} targets to balance"
        return f"split at random, not stratified{why}"
    return "split stratified by quantiles of the target" if source.task == "regression" else ""


def _gap_note(source: Source, train: Tensor, validation: Tensor) -> str:
    """Return which classes a part lacks; "" if none."""
    if source.task not in ("classification", "binary") or source.own_validation is not None:
        return ""
    classes = strata(source, source.targets)
    known = set(torch.unique(classes).tolist())
    gaps = {
        part: sorted(known - set(classes[rows].tolist()))
        for part, rows in (("train", train), ("validation", validation))
    }
    return "; ".join(
        f"{part} has no {source.unit} of class {', '.join(map(source.named, missing[:TOLD]))}"
        for part, missing in gaps.items()
        if missing
    )
