"""Series from a CSV or Parquet file in long form: one step of one series a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hpo.data.source import Source, Task
from hpo.data.tables.column import Column
from hpo.data.tables.frame import Frame, Label
from hpo.data.tables.keys import keys_of
from hpo.data.tables.parts import source_of
from hpo.data.tables.targets import targets_of

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LongForm:
    """The columns of series in long form."""

    id: Label  # names the series of a row
    step: Label | None  # orders the rows of a series; None: their order in the file
    channels: Sequence[Label] | None  # the values; None: all columns that have no other use
    target: Label | list[Label]
    part: Label | None
    group: Label | None
    time: Label | None


def from_long_form(frame: Frame, form: LongForm, task: Task | None, positive: str | None) -> Source:
    """Return the series of a frame, float32 [N, C, T]; BadFile if they have different lengths or a value is missing."""
    place = frame.index(form.id, "id")
    by_series = Column(frame, place)
    by_series.refuse_missing("name the series of each row")
    codes, names = by_series.codes()
    _, firsts = np.unique(codes, return_index=True)  # codes are numbered in the order of the file, so are the firsts
    heads = frame.take(firsts)
    keys = keys_of(heads, part=form.part, group=form.group, time=form.time)
    aims = frame.targets(form.target)
    for one in {*aims, *(keys.columns - _places(frame, time=form.time))}:
        _refuse_changes(Column(frame, one), codes, firsts, names)
    targets = targets_of([Column(heads, aim, "target") for aim in aims], keys.in_training, task, positive)
    taken = {place, *aims, *keys.columns}
    order = _order(frame, form, codes, taken)
    channels = _channels(frame, form, taken)
    steps = _length(by_series, codes, names)
    stacked = np.stack([_values(column) for column in channels], axis=1)[order]
    series = torch.from_numpy(stacked).view(len(names), steps, len(channels)).transpose(1, 2).contiguous()
    return source_of(series, targets, keys, heads)


def _places(frame: Frame, **named: Label | None) -> set[int]:
    """Return the places of the columns that options name."""
    return {frame.index(label, option) for option, label in named.items() if label is not None}


def _refuse_changes(column: Column, series: Rows, firsts: Rows, names: Sequence[str]) -> None:
    """Raise BadFile if a column that belongs to whole series changes within one."""
    codes, _ = column.codes()
    wrong = np.flatnonzero(codes != codes[firsts[series]])
    if len(wrong):
        row = int(wrong[0])
        first = int(firsts[series[row]])
        raise column.bad(
            f"{column.shown(row)} follows {column.shown(first)} of row {column.frame.row[first]} within the series "
            f"{names[series[row]]!r}; give all rows of a series the same value",
            row,
        )


def _order(frame: Frame, form: LongForm, series: Rows, taken: set[int]) -> Rows:
    """Return the rows series by series, each in the order of its steps. The column of steps is added to `taken`."""
    if form.step is None:
        return np.argsort(series, kind="stable")
    place = frame.index(form.step, "step")
    if place in taken - _places(frame, time=form.time):
        raise frame.bad(f"step = {form.step!r}: this column has another use; name the column that orders the rows")
    taken.add(place)
    column = Column(frame, place, "key")
    steps = column.moments()
    order = np.lexsort((steps, series))
    twice = np.flatnonzero((np.diff(series[order]) == 0) & (np.diff(steps[order]) == 0))
    if len(twice):
        first, second = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        raise column.bad(
            f"step {column.shown(second)} of this series is in row {frame.row[first]} already; remove one of both",
            second,
        )
    return order


def _channels(frame: Frame, form: LongForm, taken: set[int]) -> list[Column]:
    named = frame.indices(form.channels, "channels")
    for place in named:
        if place in taken:
            raise frame.bad(f"column {frame.names[place]!r} is named by channels and by another option; remove one")
    found = [Column(frame, place, "channel") for place in named or range(len(frame.names)) if place not in taken]
    if not found:
        raise frame.bad("has no columns of values beside those that other options name; add one")
    return found


def _values(column: Column) -> npt.NDArray[np.float32]:
    column.refuse_missing("series have a value at each step, so fill it or remove the series")
    return column.numbers().astype(np.float32)


def _length(column: Column, series: Rows, names: Sequence[str]) -> int:
    """Return the number of steps of each series; BadFile if it is not the same for all."""
    counts = np.bincount(series)
    usual = int(np.bincount(counts).argmax())
    other = np.flatnonzero(counts != usual)
    if len(other):
        one = int(other[0])
        more = f", as {len(other) - 1} more are of other lengths" if len(other) > 1 else ""
        raise column.frame.bad(
            f"series {names[one]!r} has {counts[one]} steps, and most have {usual}{more}; cut or fill them to one length",
            int((series == one).argmax()),
        )
    if len(names) < 2:
        raise column.bad(f"names one series only, {names[0]!r}; name the column that tells series apart")
    return usual
