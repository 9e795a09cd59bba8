"""Reads a study's trials into a table."""

from __future__ import annotations

from typing import Any

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.lab.table import Ending, Row, Table
from hpo.spec.failures import Kind
from hpo.spec.metrics import OWN_METRIC
from hpo.storage.trial_rows import TrialRow
from hpo.study import query
from hpo.study.query import SECONDS, Cursor
from hpo.study.study import Study


def record(study: Study) -> Table:
    """Return the table of a study's trials, as they are now. Nothing is written or locked.

    Raises StudyError for several objectives, for constraints, and if no trial has a result and a curve.
    """
    if study.goals.are_several or study.goals.bounds:
        what = "several objectives" if study.goals.are_several else "constraints"
        raise StudyError(f"study {study.name!r} has {what}; a replay supports one objective without constraints")
    found = study.storage.optuna.rows(study.study_id)
    with study.storage.engine.connect() as connection:
        pages = query.since(connection, study, Cursor())
        outcomes = {row.trial_id: row.outcome for page in pages for row in (*page.final, *page.pending)}
        ids, spec = [row.trial_id for row in found], study.spec
        seconds = query.raw_curve(connection, study, ids, SECONDS)
        metric = f"validation_{spec.metric}" if spec.is_declared else OWN_METRIC
        raw = query.raw_curve(connection, study, ids, metric)
    guard = {"failures": {"diverged": spec.failures.diverged.model_dump()}}
    table = Table(
        document={"format": spec.format, **spec.identity, **guard},
        rows=tuple(
            _row(row, outcomes.get(row.trial_id), seconds[row.trial_id], tuple(raw[row.trial_id])) for row in found
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


def _row(row: TrialRow, outcome: str | None, seconds: list[float], raw: tuple[float, ...]) -> Row:
    differs = len(raw) == len(row.curve) and any(a != b and a == a for a, b in zip(raw, row.curve, strict=True))
    return Row(
        number=row.number,
        space=row.space,
        params=row.params,
        steps=tuple(row.steps),
        curve=tuple(row.curve),
        value=row.values[0] if row.values else None,
        ending=_ending(row, outcome),
        seconds=sum(seconds) / len(seconds) if seconds and sum(seconds) > 0 else 1.0,
        raw=raw if differs else None,
    )


def _ending(row: TrialRow, outcome: Any) -> Ending:
    if row.state == TrialState.COMPLETE:
        return Ending.COMPLETE
    if row.state == TrialState.PRUNED and outcome == Kind.DIVERGED:
        return Ending.DIVERGED
    return Ending.CUT if row.curve and row.state != TrialState.FAIL else Ending.FAILED
