"""A table of image files and their labels, in the place of folders of classes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hpo.data.files import BadFile
from hpo.data.listing import ImageFile, Listing, image_file, is_hidden, is_image
from hpo.data.names import SPELLINGS, Part, in_order, part_of
from hpo.data.sheet import LABEL_NAMES, Column, Sheet

DELIMITERS = ",;\t"
LOOKED_AT = 20  # rows by which the column of files is found

Row = tuple[int, list[str]]  # its number as a spreadsheet counts, and its values


def tabled(root: Path, table: Path, wanted: Column | None) -> Listing:
    """Return the images that a CSV file names, with their labels, and their parts if a column holds nothing but these.

    Args:
        root: the folder below which the files lie.
        table: the CSV file, with or without a row of names.
        wanted: the column of labels, by its name or by its number from 1; the only one beside the files by default.
    """
    files = _Files(root)
    names, rows = _read(table, files)
    count = len(rows[0][1])
    of_file = max(range(count), key=lambda column: sum(files.has(values[column]) for _, values in rows[:LOOKED_AT]))
    if not any(files.has(values[of_file]) for _, values in rows[:LOOKED_AT]):
        raise BadFile(f"{table}: has no column whose values are files below {root}; name another root or another table")
    others = [column for column in range(count) if column != of_file]
    of_part = next((column for column in others if _are_parts([values[column] for _, values in rows])), None)
    of_label = _label_column(table, names, [column for column in others if column != of_part], wanted)
    listing = _listing(table, files, rows, (of_file, of_label, of_part))
    used = {of_file, of_label, of_part}
    left_out = [names[column] if names else f"number {column + 1}" for column in range(count) if column not in used]
    listing.notes += [f"columns left out: {', '.join(left_out)}"] if left_out else []
    return listing


class _Files:
    """The image files below a folder, found by what a table may call them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self._known: dict[str, set[Path]] = defaultdict(set)  # by path, by name, and both without their ending
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(names):
                if is_image(name) and not is_hidden(name):
                    self._add(Path(folder) / name)

    def _add(self, path: Path) -> None:
        self.count += 1
        within = path.relative_to(self.root)
        for called in {str(within), str(within.with_suffix("")), path.name, path.stem}:
            self._known[called].add(path)

    def has(self, called: str) -> bool:
        return bool(self._found(called))

    def one(self, called: str) -> Path | str:
        """Return the file of this name, or why there is none."""
        found = self._found(called)
        if len(found) == 1:
            return next(iter(found))
        if found:
            return f"names {called}, which is {' and '.join(sorted(map(str, found)))}"
        return f"names {called}, which is not below {self.root}"

    def _found(self, called: str) -> set[Path]:
        wanted = os.path.normpath(called.strip().replace("\\", "/"))
        exact = self.root / wanted
        found = self._known.get(wanted, set())
        return {exact} if exact in found else found or self._known.get(os.path.basename(wanted), set())


def _read(table: Path, files: _Files) -> tuple[list[str], list[Row]]:
    """Return the names of a table's columns, if its first row holds them, and all other rows."""
    try:
        with open(table, encoding="utf-8-sig") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise BadFile(f"{table}: is no CSV file: {error}") from error
    sheet = Sheet(table, header=False, delimiter=max(DELIMITERS, key=first.count))
    rows = list(sheet.rows())
    for row, values in rows:
        if len(values) != len(rows[0][1]):
            raise sheet.bad(row, f"has {len(values)} values, the rows above have {len(rows[0][1])}")
    names = [] if not rows or any(map(files.has, rows[0][1])) else [name.strip() for name in rows.pop(0)[1]]
    if not rows or len(rows[0][1]) < 2:
        raise BadFile(
            f"{table}: holds no rows of files and labels; write a file and its label in each, as in a.png,cat"
        )
    return names, rows


def _are_parts(values: Sequence[str]) -> bool:
    parts = {part_of(value) for value in values}
    return None not in parts and len(parts) > 1


def _label_column(table: Path, names: Sequence[str], others: Sequence[int], wanted: Column | None) -> int:
    if isinstance(wanted, int) and wanted - 1 in others:
        return wanted - 1
    if wanted in names:
        return names.index(str(wanted))
    if wanted is None:
        called = [column for column in others if names and names[column].casefold() in LABEL_NAMES]
        found = called if len(called) == 1 else others
        if len(found) == 1:
            return found[0]
    known = ", ".join(names[column] if names else str(column + 1) for column in others)
    said = "several columns may hold the labels" if wanted is None else f"has no column of labels {wanted!r}"
    raise BadFile(f"{table}: {said}; write label_column as one of {known}")


def _listing(table: Path, files: _Files, rows: Sequence[Row], columns: tuple[int, int, int | None]) -> Listing:
    of_file, of_label, of_part = columns
    meant = {row: _meant(values[of_label], None if of_part is None else values[of_part]) for row, values in rows}
    classes = in_order({text for text, part in meant.values() if part == "train" and _is_label(text)})
    if len(classes) < 2:
        raise BadFile(f"{table}: has {len(classes)} classes among its training images; give at least 2")
    shipped = {part for _, part in meant.values()}
    listing = Listing(classes=classes, parts={part: [] for part in SPELLINGS if part in shipped})
    taken: dict[Path, int] = {}  # in which row
    again = 0
    for row, values in rows:
        path, (text, part) = files.one(values[of_file]), meant[row]
        fault = path if isinstance(path, str) else _label_fault(text, classes)
        before = row if fault else taken.setdefault(Path(path), row)
        if before != row and meant[before] == meant[row]:
            again += 1
            continue
        if before != row:
            fault = f"names the file of row {before} with another {'part' if meant[before][0] == text else 'label'}"
        listing.parts[part].append(
            ImageFile(path=Path(f"{table}, row {row}"), label=0, fault=fault)
            if fault
            else image_file(Path(path), classes.index(text))
        )
    listing.notes += [f"rows that name an image again, each taken once: {again}"] if again else []
    unnamed = files.count - len(taken)
    listing.notes += [f"image files that the table does not name, left out: {unnamed}"] if unnamed > 0 else []
    return listing


def _meant(label: str, part: str | None) -> tuple[str, Part]:
    """Return a row's label and part."""
    return label.strip(), (part_of(part) if part is not None else None) or "train"


def _label_fault(text: str, classes: Sequence[str]) -> str:
    if not _is_label(text):
        return "has no label"
    return "" if text in classes else f"{text!r} is no class of the training images"


def _is_label(text: str) -> bool:
    return bool(text) and text.casefold() != "nan"
