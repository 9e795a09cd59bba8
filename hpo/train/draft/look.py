"""Finds out how a file or a folder of data is read, by reading it."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from hpo.data.listing import is_image
from hpo.data.sheet import LABEL_NAMES
from hpo.data.tables.column import Column
from hpo.data.tables.frame import Frame, parts_of, read
from hpo.data.tokens import words_of
from hpo.errors import SpecError
from hpo.train.draft.page import Line

SIZES = (32, 48, 64, 96, 128, 160, 224)  # sides to which images are scaled
LOOKED_AT = 50  # image files whose sizes are read
TARGET_NAMES = (*LABEL_NAMES, "outcome", "targets", "output")
TABLES = (".csv", ".tsv", ".txt", ".parquet")
FEWEST_PIXELS = 64  # values of a row that may be an image
LONG_TEXT, SHORT_TEXT = 256, 16  # tokens; longer texts train slowly, and convolutions need some
MOST_TEXTS = 0.95  # share of the texts that are not cut
NUMBER_FILLED = "a number becomes the mean, beside a column that says so"
CATEGORY_FILLED = "a category becomes code 0"
WORDS = 3  # words that a text column has on average, at least


@dataclass(frozen=True, kw_only=True)
class Look:
    """How data is read, and what it then is."""

    lines: list[Line]  # of the section [data]
    source: Source


def look(path: Path, target: str | None, folder: Path) -> Look:
    """Read data and return how; SpecError or BadFile says what the data lacks, or which option decides.

    Args:
        path: a folder of images, or a file that ends in .csv, .tsv, .txt, .parquet or .npz.
        target: column of a table to predict; None: the one column with a usual name.
        folder: folder of the study file, from which relative paths start.
    """
    if not path.exists():
        raise SpecError(f"--from {path}: does not exist")
    if target is not None and path.suffix not in TABLES:
        raise SpecError(f"--target {target}: {path} is no table; its targets are found by their names; remove --target")
    if path.is_dir():
        return _taken("image_folder", _of_folder(path), path, folder, "root")
    if path.suffix == ".npz":
        return _of_archive(path, folder)
    if path.suffix in TABLES:
        return _of_table(path, target, folder)
    raise SpecError(f"--from {path}: name a folder of images, or a file that ends in .csv, .tsv, .parquet or .npz")


def _taken(name: str, options: list[Line], path: Path, folder: Path, key: str, why: str = "") -> Look:
    """Read data by a source and its options, and return how."""
    given: dict[str, Any] = {line.key: line.value for line in options}
    source = SOURCES[name](**{key: str(path)}, **given)
    from_there = os.path.relpath(path.resolve(), folder.resolve())  # as the study file names it
    return Look(lines=[Line("name", name, why), Line(key, from_there), *options], source=source)


# --- images ---------------------------------------------------------------------------------------------------------------


def _of_folder(root: Path) -> list[Line]:
    files = [file for file in sorted(root.rglob("*")) if is_image(file.name)]
    if not files:
        raise SpecError(f"--from {root}: holds no image files; name the folder whose folders are the classes")
    sides, modes = [], set()
    for file in files[:: max(1, len(files) // LOOKED_AT)]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except OSError:
            continue  # the source names it
    middle = round(statistics.median(sides)) if sides else SIZES[0]
    size = min(SIZES, key=lambda side: abs(math.log(side / middle)))
    lines = [Line("size", size, f"the images' shorter sides have {middle} pixels in the middle; larger is slower")]
    if modes and modes <= {"1", "L"}:
        lines.append(Line("colour", "grey", "all images looked at are grey"))
    return lines


def _of_archive(path: Path, folder: Path) -> Look:
    """Read an archive of arrays as images or other inputs, else as series; with several labels a row, if it has none alone."""
    first: BadFile | ValueError | None = None
    labels = [Line("task", "multilabel", "the targets are 0 and 1, several of them in a row")]
    for options in ([], labels):
        for name, why in (("npz", ""), ("series", "arrays [N, channels, steps]")):
            try:
                return _taken(name, options, path, folder, "path", why)
            except (BadFile, ValueError) as error:
                first = first or error
    assert first is not None
    raise first


# --- tables ---------------------------------------------------------------------------------------------------------------


def _of_table(path: Path, target: str | None, folder: Path) -> Look:
    frame = read(parts_of(str(path), None, None))
    columns = [Column(frame, place) for place in range(len(frame.names))]
    aim = _target(frame, target)
    others = [column for column in columns if column.index != aim.index]
    if text := _text_column(others):
        told = [Line("column", text.name, "texts of several words"), Line("target", aim.name, "the column to predict")]
        told.append(_length(text))
        left = [column.name for column in others if column is not text]
        said = f"; the columns {', '.join(left)} are left out" if left else ""
        return _taken("text", told, path, folder, "path", f"texts{said}")
    dropped = _reasons(others)
    kept = [column for column in others if column.name not in dropped]
    if others and not kept:
        raise SpecError(*(f"--from {path}: column {name}: {why}" for name, why in dropped.items()))
    options = [Line("target", aim.name, "the column to predict"), *_left_out(dropped), *_filled(kept)]
    why = "numbers and categories"
    if _may_be_pixels(others):
        side = math.isqrt(len(others))
        why = f'as images of {side}x{side} pixels instead: name = "csv", images = "{path.name}", label_column = "{aim.name}"'
    return _taken("table", options, path, folder, "path", why)


def _target(frame: Frame, wanted: str | None) -> Column:
    if wanted is not None:
        return Column(frame, frame.index(wanted, "target"))
    found = [place for place, name in enumerate(frame.names) if name.strip().casefold() in TARGET_NAMES]
    if len(found) == 1:
        return Column(frame, found[0])
    said = "several columns may be" if found else "no column has a usual name of"
    raise SpecError(f"{said} the one to predict; name it with --target; the columns are {frame.listed}")


def _text_column(columns: list[Column]) -> Column | None:
    """Return the only column of texts that hardly repeat and have several words, if there is one."""
    found = [column for column in columns if column.kind == "texts" and column.differs_everywhere]
    found = [one for one in found if statistics.mean(len(text.split()) for text in one.codes()[1]) >= WORDS]
    return found[0] if len(found) == 1 else None


def _length(column: Column) -> Line:
    """Return the option for the length of texts: of the longest one, if it is not far longer than most."""
    counts = sorted(sum(1 for _ in words_of(one, lower=True)) for one in column.texts())
    longest, most = counts[-1], counts[int(MOST_TEXTS * (len(counts) - 1))]
    if longest <= LONG_TEXT:
        return Line("length", max(SHORT_TEXT, longest), f"tokens; the longest text has {longest}")
    length = min(LONG_TEXT, max(SHORT_TEXT, most))
    return Line("length", length, f"tokens; 95 % of the texts have at most {most}, the longest one has {longest}")


def _reasons(columns: list[Column]) -> dict[str, str]:
    """Return why no model learns from a column, by the names of such columns."""
    reasons: dict[str, str] = {}
    for column in columns:
        try:
            column.refuse_unclear()
            if column.kind == "numbers":
                column.numbers()
        except BadFile as error:
            cause, _, mend = error.lines[0].removeprefix(f"{column.frame.paths[0]}").partition(": ")[2].partition(";")
            is_mendable = column.kind == "mixed" or "has a comma" in cause  # else it is left out for good
            reasons[column.name] = f"{cause} ({mend.strip()})" if is_mendable else cause
    return reasons


def _left_out(reasons: dict[str, str]) -> list[Line]:
    """Return the option that drops columns, and why."""
    if not reasons:
        return []
    return [Line("drop", list(reasons), "; ".join(f"{name}: {why}" for name, why in reasons.items()))]


def _filled(columns: list[Column]) -> list[Line]:
    """Return the option for missing values of inputs, if there are some."""
    counts = {column.name: int(column.missing.sum()) for column in columns if column.kind != "empty"}
    short = {name: count for name, count in counts.items() if count}
    if not short:
        return []
    told = ", ".join(f"{name} {count}" for name, count in list(short.items())[:5]) + (", ..." if len(short) > 5 else "")
    are_numbers = {column.kind == "numbers" for column in columns if column.name in short}
    said = [NUMBER_FILLED] * (True in are_numbers) + [CATEGORY_FILLED] * (False in are_numbers)
    return [Line("missing", "indicator", f"values are missing ({told}): {'; '.join(said)}")]


def _may_be_pixels(columns: list[Column]) -> bool:
    """Return whether each row may be a square grey image."""
    if len(columns) < FEWEST_PIXELS or math.isqrt(len(columns)) ** 2 != len(columns):
        return False
    if any(column.kind != "numbers" for column in columns):
        return False
    values = [column.numbers() for column in columns]
    return all(bool(((one >= 0) & (one <= 255) & (one % 1 == 0)).all()) for one in values)
