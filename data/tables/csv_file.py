"""A CSV file whose values all stay texts. Errors name the row as a spreadsheet counts."""

from __future__ import annotations

from csv import reader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpo.data.files import BadFile
from hpo.data.sheet import no_utf8

DELIMITERS = ",;\t|"
LARGEST_BLOCK = 2**30
Rows = npt.NDArray[np.int64]


def read_csv(path: Path, header: bool, delimiter: str | None) -> tuple[Any, Rows]:
    """Return the columns of a CSV file as texts, and the row numbers. Rows without any value are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if delimiter is not None and len(delimiter) != 1:
        raise ValueError(f'delimiter = {delimiter!r}: write one character; a tabulator is "\\t"')
    table = _texts(path, delimiter)
    top = [str(column[0]).strip() if len(table) else "" for column in table.columns]
    if header and top and all(map(_is_number, top)):
        raise BadFile(
            f"{path}, row 1: holds numbers, not names of columns; write header = false, or a row of names above"
        )
    numbers = [str(number) for number in range(1, table.num_columns + 1)]
    table = table.rename_columns(
        [name or number for name, number in zip(top, numbers, strict=True)] if header else numbers
    )
    is_empty = np.ones(len(table), dtype=bool)
    for column in table.columns:
        is_empty &= pc.equal(pc.utf8_trim_whitespace(column), "").to_numpy(zero_copy_only=False).astype(bool)
    is_empty[: int(header)] = True
    kept = np.flatnonzero(~is_empty)
    return table.take(pa.array(kept)), kept + 1


def _texts(path: Path, delimiter: str | None) -> Any:
    """Return all rows of a CSV file as a pyarrow.Table of texts; BadFile, which names the row, for uneven rows."""
    import pyarrow as pa
    from pyarrow import csv

    marks = _refuse_other_encodings(path)
    delimiter = delimiter or _delimiter(path)
    as_texts = {f"f{number}": pa.string() for number in range(_width(path, delimiter))}  # by pyarrow's own names
    block = min(path.stat().st_size + 1, LARGEST_BLOCK)  # a value may not be longer than a block
    uneven: list[Any] = []  # rows with more or fewer values than the first

    def refuse(row: Any) -> str:
        uneven.append(row)
        return "error"

    try:
        found = csv.read_csv(
            path,
            csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=block),
            csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=refuse
            ),
            csv.ConvertOptions(column_types=as_texts, strings_can_be_null=False),
        )
    except (pa.ArrowException, OSError) as error:
        raise (
            _bad_row(path, uneven[0], marks)
            if uneven
            else BadFile(f"{path}: cannot be read as CSV: {in_one_line(error)}")
        ) from error
    _refuse_open_quote(path, found, marks)
    return found


def _bad_row(path: Path, row: Any, marks: int) -> BadFile:
    """Return the error for a row with another number of values than the first."""
    if "\n" in row.text.rstrip("\r\n") and marks % 2:
        return _open_quote(path, row.number)
    values = f"{row.actual_columns} value{'s' * (row.actual_columns != 1)}"
    return BadFile(
        f"{path}, row {row.number}: has {values}, the rows above have {row.expected_columns}; is another delimiter meant?"
    )


def _delimiter(path: Path) -> str:
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
    return max(DELIMITERS, key=first.count)


def _width(path: Path, delimiter: str) -> int:
    """Return the number of values in the first row of a CSV file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return len(next(reader(file, delimiter=delimiter), []))


def _refuse_other_encodings(path: Path) -> int:
    """Return the number of quotation marks in a file; BadFile if it is not UTF-8."""
    marks = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            for line in file:
                marks += line.count('"')
        except UnicodeDecodeError as error:
            raise no_utf8(path, error) from error
    return marks


def _refuse_open_quote(path: Path, table: Any, marks: int) -> None:
    """Raise BadFile for a quotation mark that is not closed, so that a value swallows the rows below it.

    Then the number of marks is odd. A value such as 5" makes it odd too, but it holds no end of a line.
    """
    import pyarrow.compute as pc

    ends = [np.flatnonzero(pc.match_substring(column, "\n").to_numpy().astype(bool)) for column in table.columns]
    if marks % 2 and any(map(len, ends)):
        row = min(int(one[0]) for one in ends if len(one))
        raise _open_quote(path, row + 1)


def _open_quote(path: Path, row: int) -> BadFile:
    return BadFile(
        f"{path}, row {row}: a quotation mark is not closed, so the value goes on in the next rows; close it"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def in_one_line(error: Exception) -> str:
    """Return the message of an error without its line breaks."""
    return " ".join(str(error).split())
