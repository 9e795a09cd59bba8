"""Tables of numbers and categories from CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from hpo.data.files import File, OptionalFile
from hpo.data.inputs import CATEGORIES, NUMBERS
from hpo.data.source import Source, Task
from hpo.data.tables.column import Column
from hpo.data.tables.encoding import Missing, fit_table
from hpo.data.tables.frame import Frame, Label, parts_of, read
from hpo.data.tables.keys import Keys, keys_of
from hpo.data.tables.parts import source_of
from hpo.data.tables.targets import targets_of


def table(
    *,
    path: File,
    target: Label | list[Label],
    validation: OptionalFile = None,
    test: OptionalFile = None,
    drop: list[Label] | None = None,
    numeric: list[Label] | None = None,
    categorical: list[Label] | None = None,
    task: Task | None = None,
    positive: str | None = None,
    missing: Missing = "refuse",
    missing_values: list[str] | None = None,
    part: Label | None = None,
    group: Label | None = None,
    time: Label | None = None,
    header: bool = True,
    delimiter: str | None = None,
) -> Source:
    """Return numbers and categories from a CSV or Parquet file, one example a row.

    A column is numeric if all its values are numbers, and categorical if none is. A mixture, dates, infinities, columns without
    values, row numbers and texts that hardly repeat are refused, with the mend. Numbers are standardised by the training part.
    Categories are those of the training part; one that it lacks is code 0. Columns are named, or numbered from 1. BadFile names
    row and column.

    Args:
        path: file, CSV or by its ending `.parquet`.
        target: column to predict, or a list of several.
        validation: file of the validation part, with the same columns.
        test: file of the test part, with the same columns.
        drop: columns to leave out.
        numeric: columns of numbers, checked as such.
        categorical: columns of categories, such as numbers that are names.
        task: classification, binary, multilabel or regression. By default one column of texts, or of at most 20 different
            whole numbers, means classification; several columns of 0 and 1 mean multilabel; other numbers mean regression.
        positive: the value of a binary target that counts as positive (default: 1, true, yes or positive).
        missing: what is done with missing values of inputs: refuse them; make numbers the mean or the median of the training
            part; or the mean, beside a column of 0 and 1 (indicator). A missing category is code 0. Targets are never filled.
        missing_values: texts that stand for a missing value, in any case (default: empty, NA, N/A, NaN, null and none).
        part: column with train, validation and test, which become the parts. It is no input.
        group: column of groups, such as patients, for a split by group. It is no input.
        time: column of dates or numbers, for a split by time. It is no input.
        header: whether the first row of a CSV file names the columns.
        delimiter: character between two values (default: the most frequent of comma, semicolon, tabulator and bar).
    """
    frame = read(parts_of(path, validation, test), header=header, delimiter=delimiter, missing=missing_values)
    keys = keys_of(frame, part=part, group=group, time=time)
    aims = frame.targets(target)
    targets = targets_of([Column(frame, place, "target") for place in aims], keys.in_training, task, positive)
    numbers, categories = _inputs(frame, keys, aims, drop, numeric, categorical)
    if missing == "refuse":
        for column in (*numbers, *categories):
            column.refuse_missing('remove the row, or write missing = "mean", "median" or "indicator"')
    found: dict[str, torch.Tensor] = {}
    if numbers:
        stacked = np.stack([column.numbers().astype(np.float32) for column in numbers], axis=1)
        found[NUMBERS] = torch.from_numpy(stacked)
    encoded = [column.codes() for column in categories]
    if encoded:
        found[CATEGORIES] = torch.from_numpy(np.stack([codes + 1 for codes, _ in encoded], axis=1))
    fit = partial(
        fit_table,
        numbers=[column.name for column in numbers],
        categories=[column.name for column in categories],
        texts=[texts for _, texts in encoded],
        missing=missing,
    )
    return source_of(found, targets, keys, frame, fit=fit)


def _inputs(
    frame: Frame,
    keys: Keys,
    targets: Sequence[int],
    drop: Sequence[Label] | None,
    numeric: Sequence[Label] | None,
    categorical: Sequence[Label] | None,
) -> tuple[list[Column], list[Column]]:
    """Return the columns of numbers and those of categories; BadFile for a column that is neither."""
    dropped = frame.indices(drop, "drop")
    uses = {"target": targets, "part, group or time": sorted(keys.columns), "drop": dropped}
    declared = {"numeric": frame.indices(numeric, "numeric"), "categorical": frame.indices(categorical, "categorical")}
    _refuse_two_uses(frame, uses | declared)
    taken = {place for places in uses.values() for place in places}
    numbers: list[Column] = []
    categories: list[Column] = []
    for place in range(len(frame.names)):
        column = Column(frame, place)
        if place in taken:
            continue
        if not any(place in places for places in declared.values()):
            column.refuse_unclear()
        is_numeric = place in declared["numeric"] or (column.kind == "numbers" and place not in declared["categorical"])
        (numbers if is_numeric else categories).append(column)
    if not numbers and not categories:
        raise frame.bad("has no columns beside the target and those left out; name fewer of them")
    return numbers, categories


def _refuse_two_uses(frame: Frame, uses: dict[str, Sequence[int]]) -> None:
    known: dict[int, str] = {}
    for option, places in uses.items():
        for place in places:
            if place in known:
                raise frame.bad(f"column {frame.names[place]!r} is named by {known[place]} and by {option}; remove one")
            known[place] = option
