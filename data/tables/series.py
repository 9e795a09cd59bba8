"""Series from NumPy archives, or from CSV and Parquet files in long form."""

from __future__ import annotations

from typing import Any

from hpo.data.arrays import npz
from hpo.data.files import BadFile, File, existing_file
from hpo.data.source import Source, Task
from hpo.data.tables.frame import Label, parts_of, read
from hpo.data.tables.long_form import LongForm, from_long_form

ARCHIVE = ".npz"


def series(
    *,
    path: File,
    inputs: str | None = None,
    targets: str | None = None,
    channels_last: bool = False,
    id: Label | None = None,
    step: Label | None = None,
    channels: list[Label] | None = None,
    target: Label | list[Label] | None = None,
    task: Task | None = None,
    positive: str | None = None,
    missing_values: list[str] | None = None,
    part: Label | None = None,
    group: Label | None = None,
    time: Label | None = None,
    header: bool = True,
    delimiter: str | None = None,
) -> Source:
    """Return series of one length, with one or several channels, such as spectra or the signals of sensors.

    A NumPy archive holds arrays [N, C, T] or [N, T]. A CSV or Parquet file holds one step of one series a row. Channels are
    standardised by the training part. BadFile names array and place, or row and column.

    Args:
        path: file `.npz`, `.csv` or `.parquet`.
        inputs: array of series in an archive (default: by its usual name, such as x or inputs).
        targets: array of targets in an archive (default: by its usual name, such as y or targets).
        channels_last: whether the series in an archive are [N, T, C].
        id: column that tells which series a row belongs to. It is needed for a CSV or Parquet file.
        step: column that orders the rows of a series, as numbers or dates (default: their order in the file).
        channels: columns of values (default: all columns without another use).
        target: column to predict, with one value in each series, or a list of several. It is needed for a CSV or Parquet file.
        task: classification, binary, multilabel or regression (default: by the values of the target).
        positive: the value of a binary target that counts as positive (default: 1, true, yes or positive).
        missing_values: texts that stand for a missing value (default: empty, NA, N/A, NaN, null and none). Series have none.
        part: column with train, validation and test, which become the parts.
        group: column or array of groups, such as patients, for a split by group.
        time: column or array of dates or numbers, for a split by time. A series has the time of its first row in the file.
        header: whether the first row of a CSV file names the columns.
        delimiter: character between two values (default: the most frequent of comma, semicolon, tabulator and bar).
    """
    file = existing_file(path, "path")
    named: dict[str, Any] = {
        "id": id,
        "step": step,
        "channels": channels,
        "target": target,
        "part": part,
        "missing_values": missing_values,
        "delimiter": delimiter,
    }
    if file.suffix.casefold() == ARCHIVE:
        _refuse(named, "for CSV and Parquet files, and this is an archive of arrays")
        keys: dict[str, Any] = {"group": group, "time": time}
        for option, array in keys.items():
            if isinstance(array, int):
                raise ValueError(f"{option} = {array}: write the name of an array, since this is an archive of arrays")
        return npz(
            path=path,
            images=inputs or "images",
            labels=targets or "labels",
            channels_last=channels_last or None,
            holds="series",
            task=task,
            positive=positive,
            **keys,
        )
    _refuse({"inputs": inputs, "targets": targets, "channels_last": channels_last or None}, "for archives of arrays")
    if id is None or target is None:
        lacking = "id" if id is None else "target"
        raise BadFile(f"{path}: is a table, so write {lacking} = the name of {NEEDED[lacking]}")
    form = LongForm(
        id=id,
        step=step,
        channels=channels,
        target=target,
        part=part,
        group=group,
        time=time,
    )
    frame = read(parts_of(path, None, None), header=header, delimiter=delimiter, missing=missing_values)
    return from_long_form(frame, form, task, positive)


NEEDED = {"id": "the column that tells series apart", "target": "the column to predict"}


def _refuse(given: dict[str, Any], why: str) -> None:
    """Raise ValueError if an option is given that the file has no use for."""
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option} is {why}; remove it")
