"""Columns of a table that decide which rows belong together: parts, groups and times. They are no inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpo.data.files import BadFile
from hpo.data.names import SPELLINGS, Part, part_of
from hpo.data.tables.column import Column
from hpo.data.tables.frame import Frame, Label


@dataclass(frozen=True, kw_only=True, eq=False)
class Keys:
    """The parts, groups and times of rows."""

    parts: npt.NDArray[np.str_]  # [N], "train", "validation" or "test"
    groups: npt.NDArray[np.int64] | None  # [N], number of a row's group
    times: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None  # [N], to sort by
    columns: frozenset[int]  # places of the columns that they come from

    @cached_property
    def rows(self) -> Mapping[Part, npt.NDArray[np.int64]]:
        """The rows of each part that there is."""
        found = {part: np.flatnonzero(self.parts == part) for part in SPELLINGS}
        return {part: rows for part, rows in found.items() if len(rows)}

    @property
    def in_training(self) -> npt.NDArray[np.bool_]:
        """Which rows are of the training part, bool [N]."""
        found: npt.NDArray[np.bool_] = self.parts == "train"
        return found

    @property
    def group_numbers(self) -> Tensor | None:
        """The groups of the training part, int64 [N]."""
        return None if self.groups is None else torch.from_numpy(self.groups[self.in_training])

    def moments(self, part: Part) -> Tensor | None:
        """Return the times of a part, int64 or float64 [N]."""
        return None if self.times is None else torch.from_numpy(self.times[self.rows[part]])


def keys_of(frame: Frame, *, part: Label | None, group: Label | None, time: Label | None) -> Keys:
    """Return the parts, groups and times of the rows; BadFile if one is missing, or if a group lies in two parts."""
    named = {"part": part, "group": group, "time": time}
    places = {option: frame.index(label, option) for option, label in named.items() if label is not None}
    if len(set(places.values())) < len(places):
        raise frame.bad(f"{' and '.join(places)} name the same column; name a different one for each")
    columns = {option: Column(frame, place, "key") for option, place in places.items()}
    if "part" in columns and len(frame.paths) > 1:
        raise frame.bad(f"part = {part!r} and files of their own for parts are given; give one of both")
    parts = _parts(columns["part"]) if "part" in columns else frame.part_of_file
    groups = _groups(columns["group"], parts) if "group" in columns else None
    times = columns["time"].moments() if "time" in columns else None
    return Keys(parts=parts, groups=groups, times=times, columns=frozenset(places.values()))


def _parts(column: Column) -> npt.NDArray[np.str_]:
    column.refuse_missing("write train, validation or test")
    codes, names = column.codes()
    parts = [part_of(name) for name in names]
    if None in parts:
        row = int((codes == parts.index(None)).argmax())
        raise column.bad(f"{column.shown(row)} is not the name of a part; write train, validation or test", row)
    if "train" not in parts:
        raise column.bad("names no training part; write train for the rows to learn from")
    if len(set(parts)) == 1:
        raise column.bad("names one part only; name a column with train, and validation or test, or leave part out")
    found: npt.NDArray[np.str_] = np.array(parts, dtype=str)[codes]
    return found


def _groups(column: Column, parts: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    column.refuse_missing("give each row its group")
    codes, names = column.codes()
    _, first = np.unique(codes, return_index=True)
    other = np.flatnonzero(parts != parts[first[codes]])
    if len(other):
        raise _in_two_parts(column, int(first[codes[other[0]]]), int(other[0]), parts)
    if len(names) < 2:
        raise column.bad(f"is {column.shown(0)} in all rows; name a column with several groups")
    return codes


def _in_two_parts(column: Column, first: int, second: int, parts: npt.NDArray[np.str_]) -> BadFile:
    frame = column.frame
    where = f"row {frame.row[first]}" if frame.file[first] == frame.file[second] else frame.place(first)
    return column.bad(
        f"group {column.shown(second)} is in the {parts[second]} part here, and in the {parts[first]} part in {where}; "
        "give each group one part",
        second,
    )
