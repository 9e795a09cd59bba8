"""The rows of CSV and Parquet files, as columns. Errors name the file, and row and column as a spreadsheet counts them.

Every value of a CSV file stays a text here. What a column holds is decided by `column`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpo.data.files import BadFile, existing_file
from hpo.data.names import Part
from hpo.data.tables.csv_file import in_one_line, read_csv

Label = str | int  # name of a column, or its number from 1
Rows = npt.NDArray[np.int64]

PARQUET = (".parquet", ".pq")
#: Texts that stand for a missing value, without their case.
MISSING = ("", "na", "n/a", "nan", "null", "none")
SHOWN = 12  # most columns named in a message


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """Rows of one file or of several files with the same columns."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]  # of the columns
    numbers: tuple[int, ...]  # of the columns in the first file, from 1
    arrays: tuple[Any, ...]  # pyarrow.Array of each column
    file: Rows  # [N], which file a row is from
    row: Rows  # [N], its number in the file, as a spreadsheet counts
    given_parts: tuple[Part, ...]  # of each file
    missing: frozenset[str]  # texts that stand for a missing value, in lower case

    def __len__(self) -> int:
        return len(self.row)

    def place(self, row: int) -> str:
        """Return the place of a row: its file and its number there."""
        return f"{self.paths[self.file[row]]}, row {self.row[row]}"

    def bad(self, cause: str, row: int | None = None, column: int | None = None) -> BadFile:
        """Return an error that names a file, a row and a column, as far as they are given.

        Args:
            cause: what is wrong, and the mend.
            row: place among all rows, from 0.
            column: place among the columns, from 0.
        """
        where = str(self.paths[0]) if row is None else self.place(row)
        of_column = "" if column is None else f", column {self.numbers[column]} ({self.names[column]})"
        return BadFile(f"{where}{of_column}: {cause}")

    def index(self, wanted: Label, option: str) -> int:
        """Return the place of a column; BadFile, which names the columns, if there is none.

        Args:
            wanted: its name, or its number from 1.
            option: the option that names it, for the message.
        """
        if wanted in self.names:
            return self.names.index(str(wanted))
        if isinstance(wanted, int) and wanted in self.numbers:
            return self.numbers.index(wanted)
        close = get_close_matches(str(wanted), self.names, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else f"; its columns are {self.listed}"
        raise self.bad(f"{option} = {wanted!r}: there is no such column{meant}")

    def targets(self, wanted: Label | list[Label]) -> list[int]:
        """Return the places of the columns to predict; BadFile if one is missing, or if none is named."""
        if wanted == []:
            raise self.bad(f"target = []: name the column to predict; its columns are {self.listed}")
        return self.indices(wanted if isinstance(wanted, list) else [wanted], "target")

    def indices(self, wanted: Sequence[Label] | None, option: str) -> list[int]:
        """Return the places of columns; BadFile if one is missing or named twice."""
        found = [self.index(one, option) for one in wanted or ()]
        for place in found:
            if found.count(place) > 1:
                raise self.bad(f"{option} names the column {self.names[place]!r} twice; remove one")
        return found

    def take(self, rows: Rows) -> Frame:
        """Return these rows."""
        import pyarrow as pa

        arrays = tuple(array.take(pa.array(rows)) for array in self.arrays)
        return replace(self, arrays=arrays, file=self.file[rows], row=self.row[rows])

    @property
    def listed(self) -> str:
        """The names of the columns, for a message."""
        more = f", ... ({len(self.names)} in all)" if len(self.names) > SHOWN else ""
        return ", ".join(self.names[:SHOWN]) + more

    @cached_property
    def part_of_file(self) -> npt.NDArray[np.str_]:
        """The part of each row by its file, [N]."""
        return np.array(self.given_parts)[self.file]


def parts_of(path: str, validation: str | None, test: str | None) -> dict[Part, Path]:
    """Return the file of each part, as options name them; BadFile if one does not exist."""
    named: dict[Part, tuple[str, str | None]] = {
        "train": ("path", path),
        "validation": ("validation", validation),
        "test": ("test", test),
    }
    return {part: existing_file(name, option) for part, (option, name) in named.items() if name is not None}


def read(
    paths: dict[Part, Path], *, header: bool = True, delimiter: str | None = None, missing: Sequence[str] | None = None
) -> Frame:
    """Return the rows of the files of the parts, one after the other; BadFile if a file cannot be read.

    Args:
        paths: a CSV or Parquet file of each part.
        header: whether the first row of a CSV file names the columns. Without names their numbers are the names.
        delimiter: character between two values of a CSV file (default: the most frequent in the first row).
        missing: texts that stand for a missing value (default: `MISSING`), whatever their case.
    """
    import pyarrow as pa  # here, since only tables need it

    tables: list[Any] = []
    rows: list[Rows] = []
    for path in paths.values():
        table, numbers = _parquet(path) if is_parquet(path) else read_csv(path, header, delimiter)
        _refuse_unclear_names(path, table.column_names)
        if not len(table):
            raise BadFile(f"{path}: holds no rows")
        tables.append(table if not tables else _as_first(path, table, tables[0]))
        rows.append(numbers)
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadFile(f"{list(paths.values())[-1]}: its columns have other types than those before: {error}") from error
    return Frame(
        paths=tuple(paths.values()),
        names=tuple(whole.column_names),
        numbers=tuple(range(1, whole.num_columns + 1)),
        arrays=tuple(column.combine_chunks() for column in whole.columns),
        file=np.repeat(np.arange(len(rows)), [len(one) for one in rows]),
        row=np.concatenate(rows),
        given_parts=tuple(paths),
        missing=frozenset(text.strip().casefold() for text in (MISSING if missing is None else missing)),
    )


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its ending."""
    return path.suffix.casefold() in PARQUET


def _parquet(path: Path) -> tuple[Any, Rows]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{path}: cannot be read as Parquet: {in_one_line(error)}") from error
    return table, np.arange(1, len(table) + 1)


def _refuse_unclear_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise BadFile(f"{path}: {names.count(name)} columns are named {name!r}; give each column a name of its own")


def _as_first(path: Path, table: Any, first: Any) -> Any:
    """Return a table with its columns in the order of the first one; BadFile if they are others."""
    for name in first.column_names:
        if name not in table.column_names:
            raise BadFile(f"{path}: has no column {name!r}, which the training file has; give both the same columns")
    for name in table.column_names:
        if name not in first.column_names:
            raise BadFile(f"{path}: has a column {name!r}, which the training file lacks; give both the same columns")
    return table.select(first.column_names)
