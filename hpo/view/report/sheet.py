"""A report as a table for other programs: a row for each trial that has begun, in CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from hpo.storage.trial_rows import TrialRow
from hpo.view.report.privacy import Privacy
from hpo.view.report.reading import StudyReport

OF_TRIAL = ("study", "trial", "state", "outcome", "steps", "seconds", "started", "ended")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet takes a text for a formula


def render(reports: Sequence[StudyReport], privacy: Privacy) -> str:
    """Return the table. A column whose name an earlier one has is named with its kind before it."""
    values = list(dict.fromkeys(name for one in reports for name in one.columns.goals.names))
    params = list(dict.fromkeys(column.name for one in reports for column in one.columns.parameters))
    rows = [row for one in reports for row in _rows(one, values, params)]
    told = io.StringIO()
    writer = csv.writer(told, lineterminator="\n")
    writer.writerow([_cell(privacy.clean(name)) for name in _heads(values, params)])
    for row in rows:
        writer.writerow([_cell(privacy.clean(cell)) for cell in row])
    return told.getvalue()


def _heads(values: Sequence[str], params: Sequence[str]) -> list[str]:
    heads = list(OF_TRIAL)
    for kind, names in (("value", values), ("param", params)):
        heads += [f"{kind}.{name}" if name in heads else name for name in names]
    return heads


def _rows(report: StudyReport, values: Sequence[str], params: Sequence[str]) -> Iterator[list[Any]]:
    columns = report.columns
    found = [*zip(columns.rows, columns.outcomes, strict=True), *((row, None) for row in columns.open)]
    for row, outcome in sorted(found, key=lambda one: one[0].number):
        if row.started is None and not row.is_finished:
            continue  # it is queued
        named = dict(zip(columns.goals.names, row.values or (), strict=False))
        given = row.external
        yield [
            report.name,
            row.number,
            row.state.name.lower(),
            outcome,
            len(row.steps),
            columns.seconds.get(row.trial_id),
            *_times(row),
            *(named.get(name) for name in values),
            *(given.get(name) for name in params),
        ]


def _times(row: TrialRow) -> list[str | None]:
    return [
        None if moment is None else datetime.isoformat(moment.replace(tzinfo=UTC), timespec="milliseconds")
        for moment in (row.started, row.completed)
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return value
