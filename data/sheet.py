"""CSV files, read row by row. Errors name row and column as a spreadsheet counts them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from hpo.data.files import BadFile

#: Usual names of a column of labels, in lower case.
LABEL_NAMES = ("label", "labels", "class", "target", "category", "y")
Column = str | int  # name of a column, or its number from 1


class Sheet:
    """A CSV file."""

    def __init__(self, path: Path, *, header: bool, delimiter: str) -> None:
        self.path = path
        self.header = header
        self._delimiter = delimiter
        self.columns: list[str] = []  # names, once the header was read

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (row number as a spreadsheet counts, values); BadFile for an empty row or a file that is not CSV."""
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:
                found = enumerate(csv.reader(file, delimiter=self._delimiter, strict=True), start=1)
                if self.header:
                    self.columns = next(found, (1, []))[1]
                for row, values in found:
                    if not values:
                        raise self.bad(row, "is empty; remove it")
                    yield row, values
        except UnicodeDecodeError as error:
            raise no_utf8(self.path, error) from error
        except csv.Error as error:
            raise BadFile(f"{self.path}: cannot be read as CSV: {error}") from error

    def bad(self, row: int, cause: str, column: int | None = None) -> BadFile:
        """Return an error that names a row, and a column if one is given.

        Args:
            row: row number as a spreadsheet counts, from 1.
            cause: what is wrong, and the mend.
            column: column number, from 0.
        """
        if column is None:
            return BadFile(f"{self.path}, row {row}: {cause}")
        name = f" ({self.columns[column]})" if column < len(self.columns) else ""
        return BadFile(f"{self.path}, row {row}, column {column + 1}{name}: {cause}")

    def label_column(self, wanted: Column | None) -> int:
        """Return the column of labels, from 0: the wanted one, else the one with a usual name; BadFile if unclear."""
        _, first = next(self.rows(), (0, self.columns))
        count, named = len(first), [name.strip() for name in self.columns]
        if isinstance(wanted, int) and 1 <= wanted <= count:
            return wanted - 1
        if wanted in named:
            return named.index(str(wanted))
        if wanted is None:
            found = [column for column, name in enumerate(named) if name.casefold() in LABEL_NAMES]
            if len(found) == 1:
                return found[0]
        shown = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        known = f"its columns are {shown}" if named else "with header = true its first row names them"
        said = "does not say which column holds the labels" if wanted is None else f"has no column {wanted!r}"
        raise BadFile(f"{self.path}: {said}; write label_column as a name or as a number from 1 to {count}; {known}")


def no_utf8(path: Path, error: UnicodeDecodeError) -> BadFile:
    """Return the error for a table in another encoding, as for example Excel saves it."""
    return BadFile(f'{path}: is not UTF-8 text ({error.reason}); save it as UTF-8, which Excel calls "CSV UTF-8"')
