"""A table of recorded trials, each with its parameters and its curve, and its file.

A curve holds what the pruner saw at each report. A row is *whole* if its trial ended by itself: COMPLETE, or diverged. The
values of any other row beyond its last report are unknown.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, distribution_to_json

from hpo.errors import SpecError, StudyError
from hpo.files import atomic_write
from hpo.spec.study_file import StudySpec, as_meant
from hpo.storage.trial_rows import space_of

VERSION = 1  # of the file
SUFFIX = ".npz"
#: What reading a file raises that another program wrote, or that is damaged.
UNREADABLE = (EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
ARCHIVE = b"PK"  # the first bytes of every file that numpy has compressed


class Ending(StrEnum):
    """How a recorded trial ended."""

    COMPLETE = "complete"
    DIVERGED = "diverged"  #: its loss was not finite, or the divergence guard ended it
    CUT = "cut"  #: by a pruner or a person, or it still runs: the rest of its curve is unknown
    FAILED = "failed"  #: by an error, or it has not begun: it has no result


ENDINGS = tuple(Ending)  # their places are stored in files


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a trial came to when its parameters were trained again with another seed, on the same split."""

    value: float | None  # None if it diverged
    curve: tuple[float, ...]  # the values reported, in their order


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recorded trial."""

    number: int
    space: dict[str, BaseDistribution]  # in the order of suggestion
    params: tuple[float, ...]  # in Optuna's internal representation, in the order of `space`
    steps: tuple[int, ...]  # ascending; at which a value was reported
    curve: tuple[float, ...]  # the values reported there, as Optuna got them
    value: float | None  # the trial's value, None without one
    ending: Ending
    seconds: float  # of one epoch
    raw: tuple[float, ...] | None = None  # the raw values of the metric there; None if they are not known or the same
    again: Again | None = None  # None if it was not trained again
    stack_key: str | None = None  # rows of one key may train in one stack; None if it is not known

    @property
    def is_whole(self) -> bool:
        """Whether the trial reported values and ended by itself."""
        return bool(self.curve) and self.ending in (Ending.COMPLETE, Ending.DIVERGED)

    @property
    def told(self) -> tuple[float, ...]:
        """What the divergence guard sees: the raw values, or the curve if they are not known or the same."""
        return self.raw or self.curve

    @property
    def external(self) -> dict[str, Any]:
        """The parameters by name, as an objective sees them."""
        named = zip(self.space.items(), self.params, strict=True)
        return {name: distribution.to_external_repr(value) for (name, distribution), value in named}


@dataclass(frozen=True, kw_only=True)
class Table:
    """The recorded trials of one study, by number."""

    document: Mapping[str, Any]  # the study's spec, without how it was run, but with `failures.diverged`
    rows: tuple[Row, ...]

    @cached_property
    def spec(self) -> StudySpec:
        """The study's spec. A table from before the divergence guard has none."""
        return StudySpec.from_document(as_meant({"failures": {"diverged": {"patience": 0}}, **self.document}))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def sign(self) -> float:
        """The factor, 1 or -1, after which higher values are better."""
        return 1.0 if self.spec.direction == "maximize" else -1.0

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """The places of the whole rows."""
        return tuple(place for place, row in enumerate(self.rows) if row.is_whole)

    @cached_property
    def complete(self) -> tuple[int, ...]:
        """The places of the COMPLETE rows that have a value, best first. Of equal ones the lower number comes first."""
        found = [
            place for place, row in enumerate(self.rows) if row.ending is Ending.COMPLETE and row.value is not None
        ]
        return tuple(sorted(found, key=lambda place: -self.sign * (self.rows[place].value or 0.0)))

    @cached_property
    def again_order(self) -> tuple[int, ...]:
        """The places of the rows that were trained again, best first by what they came to then. Diverged ones are last."""

        def badness(place: int) -> float:
            again = self.rows[place].again
            return math.inf if again is None or again.value is None else -self.sign * again.value

        return tuple(sorted((place for place, row in enumerate(self.rows) if row.again is not None), key=badness))

    def trained_again(self, other: Table) -> Table:
        """Return the table with what its trials came to in another one: the first whole row there with the same parameters."""
        found: dict[str, Again] = {}
        for row in other.rows:
            if row.is_whole:
                found.setdefault(_key(row), Again(value=row.value, curve=row.curve))
        return replace(self, rows=tuple(replace(row, again=found.get(_key(row))) for row in self.rows))

    @property
    def longest(self) -> int:
        """The largest number of reports of a row."""
        return max((len(row.curve) for row in self.rows), default=0)

    @property
    def last_step(self) -> int:
        """The largest step of a row."""
        return max((row.steps[-1] for row in self.rows if row.steps), default=0)

    def count(self, ending: Ending) -> int:
        """Return the number of rows that ended so."""
        return sum(row.ending is ending for row in self.rows)

    def was_cut(self, row: Row) -> bool:
        """Return whether a row's curve was cut off: by a pruner, a person, or the study's divergence guard."""
        return row.ending is Ending.CUT or (row.ending is Ending.DIVERGED and bool(self.spec.guard.why(row.told)))

    def goal(self, share: float) -> float:
        """Return the value of the last row within the best share of the COMPLETE rows, at least one."""
        place = self.complete[max(math.ceil(share * len(self.complete)), 1) - 1]
        value = self.rows[place].value
        assert value is not None
        return value

    @cached_property
    def best(self) -> float:
        """The best value of all rows, at their ends or at any report."""
        found = [self.sign * value for row in self.rows for value in self._values(row)]
        return self.sign * max(value for value in found if math.isfinite(value))

    @staticmethod
    def _values(row: Row) -> Sequence[float]:
        return row.curve if row.value is None else (*row.curve, row.value)


def _key(row: Row) -> str:
    return repr([*zip(row.space, row.params, strict=True)])


# --- its file ---------------------------------------------------------------------------------------------------------


def save(table: Table, path: Path) -> None:
    """Write a table as compressed numpy arrays. Curves, values and seconds are rounded to 32 bits.

    Raises SpecError for a name by which `hpo replay` would not know a table, StudyError if the disk does not take the file.
    """
    if path.suffix != SUFFIX:
        raise SpecError(f"--save {path}: a table's name ends in {SUFFIX}; write --save {path}{SUFFIX}")
    try:
        with atomic_write(path) as part:
            np.savez_compressed(part, **_arrays(table))
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}; name another file with --save") from None


def _arrays(table: Table) -> dict[str, Any]:
    spaces: dict[tuple[tuple[str, str], ...], int] = {}
    place_of = [spaces.setdefault(_described(row.space), len(spaces)) for row in table.rows]
    steps = sorted({step for row in table.rows for step in row.steps})
    column = {step: place for place, step in enumerate(steps)}
    curves = np.full((len(table.rows), len(steps)), np.nan, np.float32)
    is_reported = np.zeros(curves.shape, bool)  # a reported value may be NaN
    params = np.full((len(table.rows), max((len(row.params) for row in table.rows), default=0)), np.nan)
    for place, row in enumerate(table.rows):
        at = [column[step] for step in row.steps]
        curves[place, at], is_reported[place, at] = row.curve, True
        params[place, : len(row.params)] = row.params
    keys = list(dict.fromkeys(row.stack_key for row in table.rows))
    header = {"version": VERSION, "document": table.document, "spaces": list(spaces), "stack_keys": keys}
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "numbers": np.array([row.number for row in table.rows], np.int32),
        "spaces": np.array(place_of, np.int32),
        "stack_keys": np.array([keys.index(row.stack_key) for row in table.rows], np.int32),
        "params": params,
        "steps": np.array(steps, np.int32),
        "curves": curves,
        "is_reported": is_reported,
        "values": np.array([math.nan if row.value is None else row.value for row in table.rows], np.float32),
        "endings": np.array([ENDINGS.index(row.ending) for row in table.rows], np.uint8),
        "seconds": np.array([row.seconds for row in table.rows], np.float32),
    }
    if any(row.raw for row in table.rows):
        raw = np.full(curves.shape, np.nan, np.float32)
        for place, row in enumerate(table.rows):
            raw[place, is_reported[place]] = row.told
        arrays["raw"] = raw
    return arrays | (_again_arrays(table) if table.again_order else {})


def _again_arrays(table: Table) -> dict[str, Any]:
    found = {place: row.again for place, row in enumerate(table.rows) if row.again is not None}
    curves = np.full((len(found), max(len(again.curve) for again in found.values())), np.nan, np.float32)
    for line, again in enumerate(found.values()):
        curves[line, : len(again.curve)] = again.curve
    return {
        "again": np.array([*found], np.int32),
        "again_values": np.array([math.nan if one.value is None else one.value for one in found.values()], np.float32),
        "again_lengths": np.array([len(again.curve) for again in found.values()], np.int32),
        "again_curves": curves,
    }


def load(path: Path) -> Table:
    """Read a table. Raises StudyError if the file is missing, unreadable, damaged, or not one of ours."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(bytes(arrays["header"]))
        if header["version"] == VERSION:
            return _table(header, arrays)
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file; `hpo replay STUDY --save FILE` writes one") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE as error:
        raise StudyError(f"{path}: {_why_unreadable(path, error)}; `hpo replay STUDY --save FILE` writes one") from None
    raise StudyError(f"{path}: has version {header['version']}, this hpo reads version {VERSION}; update hpo here")


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        begins = file.read(len(ARCHIVE))
    if not begins:
        return "is empty"
    is_broken = isinstance(error, EOFError | zipfile.BadZipFile | zlib.error)
    return "is damaged or cut off" if is_broken and begins == ARCHIVE else "is not a table of recorded trials"


def _table(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> Table:
    spaces = [space_of(tuple((name, text) for name, text in one)) for one in header["spaces"]]
    again = _again(arrays) if "again" in arrays else {}  # tables of before December 2026 have none
    kinds = header.get("stack_keys", [None])  # likewise
    kind_of = arrays.get("stack_keys", np.zeros(len(arrays["numbers"]), np.int32))
    rows = tuple(
        _row(arrays, place, spaces, again.get(place), kinds[kind_of[place]]) for place in range(len(arrays["numbers"]))
    )
    return Table(document=header["document"], rows=rows)


def _again(arrays: Mapping[str, Any]) -> dict[int, Again]:
    """Return what the trials came to that were trained again, by their places."""
    lines = zip(*(arrays[name] for name in ("again", "again_values", "again_lengths", "again_curves")), strict=True)
    return {
        int(place): Again(value=None if math.isnan(value) else float(value), curve=tuple(curve[:length].tolist()))
        for place, value, length, curve in lines
    }


def _described(space: Mapping[str, BaseDistribution]) -> tuple[tuple[str, str], ...]:
    return tuple((name, distribution_to_json(distribution)) for name, distribution in space.items())


def _row(
    arrays: Mapping[str, Any],
    place: int,
    spaces: Sequence[dict[str, BaseDistribution]],
    again: Again | None,
    stack_key: str | None,
) -> Row:
    space = spaces[arrays["spaces"][place]]
    is_reported = arrays["is_reported"][place]
    value = float(arrays["values"][place])
    return Row(
        number=int(arrays["numbers"][place]),
        space=space,
        params=tuple(arrays["params"][place, : len(space)].tolist()),
        steps=tuple(arrays["steps"][is_reported].tolist()),
        curve=tuple(arrays["curves"][place, is_reported].tolist()),
        value=None if math.isnan(value) else value,
        ending=ENDINGS[arrays["endings"][place]],
        seconds=float(arrays["seconds"][place]),
        raw=tuple(arrays["raw"][place, is_reported].tolist()) if "raw" in arrays else None,
        again=again,
        stack_key=stack_key,
    )
