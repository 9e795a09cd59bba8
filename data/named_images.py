"""A table of image files and their labels, used instead of folders of classes."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from hpo.data.files import BadFile
from hpo.data.listing import ImageFile, Listing, Walk, image_file, is_hidden, is_image
from hpo.data.names import SPELLINGS, Part, in_order, is_label, part_of
from hpo.data.sheet import LABEL_NAMES, Column, Sheet, no_utf8

DELIMITERS = ",;\t"
LOOKED_AT = 200  # rows from which the column of files is found

Row = tuple[int, list[str]]  # row number as a spreadsheet counts, values


def tabled(root: Path, table: Path, wanted: Column | None, group: Column | None = None) -> Listing:
    """Return the images that a CSV file names, with their labels, and with their parts if a column holds names of parts.

    BadFile if a column cannot be identified.

    Args:
        root: folder of the image files.
        table: CSV file, with or without a header.
        wanted: column of labels, by name or by number from 1; None: by its usual name, else the only column left.
        group: column of groups, by name or by number from 1; None if the table has none.
    """
    files = _Files(root)
    names, rows = _read(table, files)
    shown = [name or f"number {column + 1}" for column, name in enumerate(names or [""] * len(rows[0][1]))]
    told = _told(names, wanted)
    of_file = _file_column(table, shown, files, rows[:LOOKED_AT], told)
    of_group = None if group is None else _group_column(table, names, shown, group, {of_file, told})
    others = [column for column in range(len(shown)) if column not in (of_file, of_group)]
    of_part = next(
        (column for column in others if column != told and _are_parts([values[column] for _, values in rows])), None
    )
    of_label = _label_column(table, names, [column for column in others if column != of_part], told, wanted)
    listing = _listing(table, files, rows, (of_file, of_label, of_part, of_group))
    left_out = [shown[column] for column in others if column not in (of_label, of_part)]
    listing.notes += [f"columns left out: {', '.join(left_out)}"] if left_out else []
    return listing


class _Files:
    """The image files below a folder, found by the names that a table may use for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._above = Path(os.path.abspath(root))
        self.count = 0
        self._by_path: dict[str, set[Path]] = defaultdict(set)  # by path below the root, with and without ending
        self._by_name: dict[str, set[Path]] = defaultdict(set)  # by file name, with and without ending
        for file in Walk().below(root):
            self.count += 1
            within = file.path.relative_to(root)
            for known, called in ((self._by_path, within), (self._by_name, Path(within.name))):
                known[_composed(called)].add(file.path)
                known[_composed(called.with_suffix(""))].add(file.path)

    def has(self, called: str) -> bool:
        return bool(self.found(called))

    def one(self, called: str) -> Path | str:
        """Return the file of this name, or a text that says why there is not exactly one."""
        found = self.found(called)
        if len(found) == 1:
            return next(iter(found))
        if found:
            return f"names {called}, which is {' and '.join(sorted(map(str, found)))}"
        return f"names {called}, which is not below {self.root}"

    def found(self, called: str) -> set[Path]:
        """Return the files of this name: a path below the root, a path through a folder of the root's name, or a file name."""
        written = called.strip().replace("\\", "/")
        wanted = Path(os.path.normpath(written))
        if wanted.is_relative_to(self._above):
            wanted = wanted.relative_to(self._above)
        parts = wanted.parts
        if found := self._at(wanted) or (self._by_name.get(_composed(wanted)) if "/" not in written else None):
            return found
        ways = [number for number in range(1, len(parts)) if parts[number - 1] == self._above.name]
        return set().union(*(self._at(Path(*parts[number:])) for number in ways))

    def _at(self, within: Path) -> set[Path]:
        """Return the files of a path below the root, even if the walk reached them by another link."""
        exact, found = self.root / within, self._by_path.get(_composed(within), set())
        is_linked = not within.is_absolute() and not any(map(is_hidden, within.parts)) and is_image(within.name)
        return {exact} if exact in found or (is_linked and exact.is_file()) else found


def _composed(path: Path) -> str:
    """Return a path in Unicode's composed form (NFC): macOS writes e and an accent where others write one letter."""
    return unicodedata.normalize("NFC", str(path))


def _read(table: Path, files: _Files) -> tuple[list[str], list[Row]]:
    """Return the names of a table's columns, if it has a header, and its other rows."""
    try:
        with open(table, encoding="utf-8-sig") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise no_utf8(table, error) from error
    sheet = Sheet(table, header=False, delimiter=max(DELIMITERS, key=first.count))
    rows = list(sheet.rows())
    for row, values in rows:
        if len(values) != len(rows[0][1]):
            raise sheet.bad(row, f"has {len(values)} values, the rows above have {len(rows[0][1])}")
    first_names_files = rows and any(files.has(value) or is_image(value.strip()) for value in rows[0][1])
    names = [] if not rows or first_names_files else [name.strip() for name in rows.pop(0)[1]]
    if not rows or len(rows[0][1]) < 2:
        raise BadFile(
            f"{table}: holds no rows of files and labels; write a file and its label in each, as in a.png,cat"
        )
    return names, rows


def _are_parts(values: Sequence[str]) -> bool:
    parts = {part_of(value) for value in values}
    return None not in parts and len(parts) > 1


def _told(names: Sequence[str], wanted: Column | None) -> int | None:
    """Return the wanted column of labels, else the one with a usual name, else None."""
    if isinstance(wanted, int):
        return wanted - 1
    called = [
        n for n, name in enumerate(names) if (name.casefold() in LABEL_NAMES if wanted is None else name == wanted)
    ]
    return called[0] if len(called) == 1 else None


def _file_column(table: Path, shown: Sequence[str], files: _Files, rows: Sequence[Row], told: int | None) -> int:
    """Return the column that names most files, with their endings if a column has any; BadFile if another may be meant."""
    found: dict[int, tuple[int, int]] = {}  # number of named files, with their ending and in all
    for column in range(len(shown)):
        named = [value for value in {values[column].strip() for _, values in rows} if files.has(value)]
        if named and column != told:
            found[column] = sum(map(is_image, named)), len(named)
    if not found:
        raise BadFile(
            f"{table}: has no column whose values are files below {files.root}; name another root or another table"
        )
    best = max(found, key=lambda column: found[column])
    kind = 0 if found[best][0] else 1
    for column, counts in found.items():
        if column == best or 2 * counts[kind] < found[best][kind]:
            continue
        if any(files.found(values[column]) != files.found(values[best]) for _, values in rows):
            first, second = (shown[one] for one in sorted((best, column)))
            raise BadFile(
                f"{table}: the columns {first} and {second} name different files below {files.root}; remove "
                "one, write the names of the files with their ending, or write label_column if one holds the labels"
            )
    return best


def _group_column(
    table: Path, names: Sequence[str], shown: Sequence[str], wanted: Column, taken: Container[int | None]
) -> int:
    """Return the column of groups; BadFile if there is none of that name or number, or it holds files or labels."""
    found = wanted - 1 if isinstance(wanted, int) else names.index(wanted) if wanted in names else -1
    if not 0 <= found < len(shown) or found in taken:
        said = "holds the files or the labels" if found in taken else "is not a column of the table"
        raise BadFile(f"{table}: group_column = {wanted!r}: {said}; write one of {', '.join(shown)}")
    return found


def _label_column(
    table: Path, names: Sequence[str], others: Sequence[int], told: int | None, wanted: Column | None
) -> int:
    if told is not None and told in others:
        return told
    if wanted is None and len(others) == 1:
        return others[0]
    if not others:
        raise BadFile(f"{table}: holds files and parts, but no labels; add a column of labels, or name another table")
    known = ", ".join(names[column] if names and names[column] else str(column + 1) for column in others)
    said = "several columns may hold the labels" if wanted is None else f"has no column of labels {wanted!r}"
    raise BadFile(f"{table}: {said}; write label_column as one of {known}")


def _listing(
    table: Path, files: _Files, rows: Sequence[Row], columns: tuple[int, int, int | None, int | None]
) -> Listing:
    of_file, of_label, of_part, of_group = columns
    meant = {row: _meant(values[of_label], None if of_part is None else values[of_part]) for row, values in rows}
    named = {} if of_group is None else {row: values[of_group].strip() for row, values in rows}
    classes = in_order({text for text, part in meant.values() if part == "train" and is_label(text)})
    if len(classes) < 2:
        raise BadFile(f"{table}: has {len(classes)} classes among its training images; give at least 2")
    shipped = {part for _, part in meant.values()}
    listing = Listing(classes=classes, parts={part: [] for part in SPELLINGS if part in shipped})
    taken: dict[str, int] = {}  # row by real path of a file, so links do not count twice
    again = 0
    groups: dict[str, int] = {}  # number by name
    for row, values in rows:
        path, (text, part) = files.one(values[of_file]), meant[row]
        fault = path if isinstance(path, str) else _label_fault(text, classes)
        before = row if fault else taken.setdefault(os.path.realpath(path), row)
        if before != row:
            what = "label" if meant[before][0] != text else "part" if meant[before][1] != part else "group"
            if meant[before] == meant[row] and named.get(before) == named.get(row):
                again += 1
                continue
            fault = f"names the file of row {before} with another {what}"
        if named:
            name = named[row]
            fault = fault or ("" if is_label(name) else "has no group")
            listing.groups.setdefault(part, []).append(groups.setdefault(name, len(groups)))
        listing.parts[part].append(
            ImageFile(path=Path(f"{table}, row {row}"), label=0, fault=fault)
            if fault
            else image_file(Path(path), classes.index(text))
        )
    listing.notes += [f"rows that name an image again, left out: {again}"] if again else []
    unnamed = files.count - len(taken)
    listing.notes += [f"image files that the table does not name, left out: {unnamed}"] if unnamed > 0 else []
    return listing


def _meant(label: str, part: str | None) -> tuple[str, Part]:
    """Return a row's label and part; the training part if the table has no column of parts."""
    return label.strip(), (part_of(part) if part is not None else None) or "train"


def _label_fault(text: str, classes: Sequence[str]) -> str:
    if not is_label(text):
        return "has no label"
    return "" if text in classes else f"{text!r} is not a class of the training images"
