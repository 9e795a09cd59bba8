"""What trials report after an epoch, written in one statement however many trials they are, each under its own claim.

The statement locks our rows of the trials whose claims stand, writes for these, and tells which they are; so a report that
comes late can never slip in behind a take-over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue.models import Claim
from hpo.storage import sql
from hpo.storage.tables import (
    FINISHED,
    UID_KEY,
    hpo_curves,
    hpo_trials,
    intermediate_values,
    stored,
    study_user_attributes,
    trials,
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial has to say after an epoch: the value for Optuna at this step, and the raw metrics."""

    claim: Claim
    step: int
    value: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What the database says to reports."""

    lost: list[Claim]  # whose trials are in other hands by now
    finished: int | None  # trials of the study that have finished by now; None if every claim was lost


def write_values(
    connection: sa.Connection, uid: str, study_id: int, reports: Sequence[Report], *, since: int
) -> ReportResult:
    """Write what reports have for Optuna where the claim stands, and lock our rows of these trials.

    Args:
        since: a number below which all trials of the study are known to have finished; the others are counted.
    """
    if not reports:
        return ReportResult(lost=[], finished=None)
    parameters: dict[str, Any] = {"uid": uid, "uid_json": json.dumps(uid), "study_id": study_id, "since": since}
    # Of a step that is told again, the last value.
    last = {(report.claim.token, report.step): report for report in reports}
    parameters |= sql.numbered([_told(report) for report in last.values()])
    statement = _values_statement(connection.dialect.name, len(last))
    written = connection.execute(statement, parameters).all()
    held = {row.trial_id for row in written}
    # Of two claims to one trial, which a worker has that took its own lost trial up again, only the later may stand.
    latest: dict[int, int] = {}
    for report in reports:
        latest[report.claim.trial_id] = max(report.claim.attempt, latest.get(report.claim.trial_id, 0))
    standing = {token for token in latest.items() if token[0] in held}
    lost = {report.claim: None for report in reports if report.claim.token not in standing}
    return ReportResult(lost=list(lost), finished=since + written[0].finished if written else None)


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
    held = (
        sa.select(hpo_trials.c.trial_id, hpo_trials.c.attempt)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == sa.bindparam("uid"),
            hpo_trials.c.trial_id.in_(sa.select(told.c.trial_id)),
            stands(sa.bindparam("uid_json")),
            trials.c.state == TrialState.RUNNING,
        )
        .order_by(hpo_trials.c.trial_id)  # everybody locks in this order
        .with_for_update(of=[hpo_trials, trials])  # an end that another program is writing is waited for, and seen
        .cte("held")
    )
    names = [name for name in _TOLD if name != "attempt"]
    source = (
        sa.select(*(told.c[name] for name in names))
        .join(held, sa.and_(held.c.trial_id == told.c.trial_id, held.c.attempt == told.c.attempt))
        .where(sa.true())  # SQLite takes ON CONFLICT after a WHERE only
    )
    insert = sql.overwriting(dialect, intermediate_values, names, source, key=["trial_id", "step"])
    return insert.returning(intermediate_values.c.trial_id, _finished().label("finished"))


def stands(uid_json: Any) -> sa.ColumnElement[bool]:
    """Say of our row of a trial that somebody holds it: it is not settled nor given back, and its study is still there."""
    study_is_alive = sa.exists().where(
        trials.c.trial_id
        == hpo_trials.c.trial_id,  # SQLite gives the ids of a deleted study's trials to the next one's
        study_user_attributes.c.study_id == trials.c.study_id,
        study_user_attributes.c.key == UID_KEY,
        study_user_attributes.c.value_json == uid_json,
    )
    return sa.and_(hpo_trials.c.settled.is_(False), hpo_trials.c.lease_until.is_not(None), study_is_alive)


def _finished() -> Any:
    """Count the study's finished trials from the number `since` on."""
    return (
        sa.select(sa.func.count())
        .select_from(trials)
        .where(
            trials.c.study_id == sa.bindparam("study_id"),
            trials.c.number >= sa.bindparam("since"),
            trials.c.state.in_(FINISHED),
        )
        .scalar_subquery()
    )


def write_metrics(connection: sa.Connection, uid: str, reports: Sequence[Report]) -> None:
    """Write the raw metrics of reports; the caller has our rows of the trials locked."""
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
