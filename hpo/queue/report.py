"""What trials report after an epoch. One statement writes the reports of any number of trials, each under its own claim.

The statement locks both rows of each trial whose claim stands, writes for these trials, and returns which they are. So
no report can be written late, after another worker has claimed the trial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.queue.models import Claim
from hpo.queue.rows import locked
from hpo.storage import sql
from hpo.storage.tables import (
    OPEN,
    hpo_curves,
    hpo_trials,
    intermediate_values,
    stored,
    trials,
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial reports after an epoch: the value for Optuna at this step, and the raw metrics."""

    claim: Claim
    step: int
    value: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What the database answers to reports."""

    lost: list[Claim]  # claims that no longer stand; nothing was written for them
    finished: int | None  # how many trials of the study have finished; None if every claim is lost


def write_values(connection: sa.Connection, uid: str, study_id: int, reports: Sequence[Report]) -> ReportResult:
    """Write the values for Optuna where the claims stand, and lock both rows of these trials."""
    if not reports:
        return ReportResult(lost=[], finished=None)
    parameters: dict[str, Any] = {"uid": uid, "uid_json": json.dumps(uid), "study_id": study_id}
    # If a step is reported twice, its last value is written.
    last = {(report.claim.token, report.step): report for report in reports}
    parameters |= sql.numbered([_told(report) for report in last.values()])
    statement = _values_statement(connection.dialect.name, len(last))
    written = connection.execute(statement, parameters).all()
    held = {row.trial_id for row in written}
    # A worker that claimed its own lost trial again has two claims to it. Only the later one can stand.
    latest: dict[int, int] = {}
    for report in reports:
        latest[report.claim.trial_id] = max(report.claim.attempt, latest.get(report.claim.trial_id, 0))
    standing = {token for token in latest.items() if token[0] in held}
    lost = {report.claim: None for report in reports if report.claim.token not in standing}
    return ReportResult(lost=list(lost), finished=written[0].finished if written else None)


def _told(report: Report) -> dict[str, Any]:
    value, kind = stored(report.value)
    claim, step = report.claim, report.step
    return dict(zip(_TOLD, (claim.trial_id, claim.attempt, step, value, kind), strict=True))


_TOLD: dict[str, sa.types.TypeEngine[Any]] = {
    "trial_id": sa.Integer(),
    "attempt": sa.Integer(),
    "step": sa.Integer(),
    "intermediate_value": sa.Double(),
    "intermediate_value_type": intermediate_values.c.intermediate_value_type.type,
}


@cache
def _values_statement(dialect: str, count: int) -> Any:
    told = sql.told(dialect, _TOLD, count)
    reported = hpo_trials.c.trial_id.in_(sa.select(told.c.trial_id))
    held = locked(sa.select(hpo_trials.c.trial_id, hpo_trials.c.attempt).where(reported))
    names = [name for name in _TOLD if name != "attempt"]
    source = (
        sa.select(*(told.c[name] for name in names))
        .join(held, sa.and_(held.c.trial_id == told.c.trial_id, held.c.attempt == told.c.attempt))
        .where(sa.true())  # SQLite accepts ON CONFLICT only after a WHERE
    )
    insert = sql.overwriting(dialect, intermediate_values, names, source, key=["trial_id", "step"])
    return insert.returning(intermediate_values.c.trial_id, _finished().label("finished"))


def _finished() -> Any:
    """Count the study's finished trials: all but the open ones. Numbers have no gaps, so the last one tells how many there are.

    Both are read from an index, so the cost does not grow with the finished trials.
    """
    of_study = trials.c.study_id == sa.bindparam("study_id")
    open_ones = sa.or_(*(trials.c.state == state for state in OPEN))  # SQLAlchemy writes out an IN at every call
    last = sa.select(sa.func.max(trials.c.number)).where(of_study).scalar_subquery()
    unfinished = sa.select(sa.func.count()).select_from(trials).where(of_study, open_ones).scalar_subquery()
    return last + sa.literal_column("1") - unfinished


def write_metrics(connection: sa.Connection, uid: str, reports: Sequence[Report]) -> None:
    """Write the raw metrics of reports. The caller has locked our rows of the trials."""
    rows = [
        {
            "study_uid": uid,
            "trial_id": report.claim.trial_id,
            "epoch": report.step,
            "metric": metric,
            "value": None if math.isnan(number) else number,
        }
        for report in reports
        for metric, number in report.metrics.items()
    ]
    if rows:
        sql.upsert(connection, hpo_curves, *rows, key=["study_uid", "trial_id", "epoch", "metric"])
