"""Reads a study's trials into a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.lab.table import Ending, Row, Table
from hpo.spec.failures import Kind
from hpo.spec.metrics import OWN_METRIC
from hpo.spec.study_file import FORMAT
from hpo.storage.optuna_private import id_of
from hpo.storage.tables import CONSTRAINTS
from hpo.storage.trial_rows import TrialRow
from hpo.study.plain import PlainStudy
from hpo.study.query import changes, recorded
from hpo.study.query.changes import Cursor
from hpo.study.query.trial_columns import SECONDS
from hpo.study.study import Study


def record(study: Study | PlainStudy) -> Table:
    """Return the table of a study's trials, as they are now. Nothing is written or locked.

    Raises StudyError for several objectives, for constraints, and if no trial has a result and a curve. A study that Optuna
    made is refused, too, if one of its complete trials reported nothing at a step of the others.
    """
    if isinstance(study, PlainStudy):
        return _record_plain(study)
    if study.goals.are_several or study.goals.bounds:
        what = "several objectives" if study.goals.are_several else "constraints"
        raise StudyError(f"study {study.name!r} has {what}; a replay supports one objective without constraints")
    found = study.storage.optuna.rows(study.study_id)
    with study.storage.engine.connect() as connection:
        pages = changes.since(connection, study, Cursor())
        outcomes = {row.trial_id: row.outcome for page in pages for row in (*page.final, *page.pending)}
        ids, spec = [row.trial_id for row in found], study.spec
        seconds = recorded.raw_curve(connection, study, ids, SECONDS)
        metric = f"validation_{spec.metric}" if spec.is_declared else OWN_METRIC
        raw = recorded.raw_curve(connection, study, ids, metric)
        stack_keys = recorded.stack_keys(connection, study)
    guard = {"failures": {"diverged": spec.failures.diverged.model_dump()}}
    table = Table(
        document={"format": spec.format, **spec.identity, **guard},
        rows=tuple(
            replace(
                _row(row, outcomes.get(row.trial_id), seconds[row.trial_id], tuple(raw[row.trial_id])),
                stack_key=stack_keys.get(row.trial_id),
            )
            for row in found
        ),
    )
    check(table, f"study {study.name!r}")
    return table


def check(table: Table, what: str) -> None:
    """Raise StudyError if a table cannot be replayed: no trial is complete, or none reported a value."""
    if not table.complete:
        raise StudyError(f"{what}: has no complete trial; a replay needs trials that trained to their end")
    if not table.whole:
        raise StudyError(f"{what}: has no curves: no complete trial reported a value at a step; a replay needs them")


def _record_plain(study: PlainStudy) -> Table:
    """Return the table of a study that Optuna made. What it was searched with is not known."""
    what = f"study {study.name!r}"
    found = study.storage.optuna.rows(id_of(study.optuna))
    if study.goals.are_several or any(key.startswith(CONSTRAINTS) for row in found for key in row.system_attributes):
        kind = "several objectives" if study.goals.are_several else "constraints"
        raise StudyError(f"{what} has {kind}; a replay supports one objective without constraints")
    rows = tuple(_row(row, None, [_seconds(row)], ()) for row in found)
    (direction,) = study.goals.directions.values()
    document = {"format": FORMAT, "name": study.name, "objective": "an objective of Optuna", "direction": direction}
    table = Table(document=document, rows=rows)
    check(table, what)
    _refuse_gaps(table, what)
    return table


def _refuse_gaps(table: Table, what: str) -> None:
    """Raise StudyError if a complete trial did not report at a step, up to its last one, at which another trial did."""
    complete = [table.rows[place] for place in table.complete]
    steps = sorted({step for row in complete for step in row.steps})
    for row in sorted(complete, key=lambda row: row.number):
        reached = [step for step in steps if step <= row.steps[-1]] if row.steps else steps
        if missing := sorted({*reached} - {*row.steps}):
            raise StudyError(
                f"{what}: trial {row.number} reported no value at step {missing[0]}, and others did; a replay needs a value at "
                "every step"
            )


def _seconds(row: TrialRow) -> float:
    """Return the seconds from a trial's begin to its end, over its reports."""
    if row.started is None or row.completed is None or not row.curve:
        return 0.0
    return (row.completed - row.started).total_seconds() / len(row.curve)


def _row(row: TrialRow, outcome: str | None, seconds: list[float], raw: tuple[float, ...]) -> Row:
    return Row(
        number=row.number,
        space=row.space,
        params=row.params,
        steps=tuple(row.steps),
        curve=tuple(row.curve),
        value=row.values[0] if row.values else None,
        ending=_ending(row, outcome),
        seconds=sum(seconds) / len(seconds) if seconds and sum(seconds) > 0 else 1.0,
        raw=raw if _differs(raw, row.curve) else None,
    )


def _differs(raw: Sequence[float], curve: Sequence[float]) -> bool:
    """Return whether the divergence guard sees other values than the pruner. A raw value that is not finite is stored as NaN."""
    if len(raw) != len(curve):
        return False
    return any(a != b and (math.isfinite(a) or math.isfinite(b)) for a, b in zip(raw, curve, strict=True))


def _ending(row: TrialRow, outcome: Any) -> Ending:
    if row.state == TrialState.COMPLETE:
        return Ending.COMPLETE
    if row.state == TrialState.PRUNED and outcome == Kind.DIVERGED:
        return Ending.DIVERGED
    return Ending.CUT if row.curve and row.state != TrialState.FAIL else Ending.FAILED
