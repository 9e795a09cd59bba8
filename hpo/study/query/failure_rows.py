"""The failures of trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from hpo.spec.failures import Verdict
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    hpo_failures,
)
from hpo.study.study import Study


def failed_attempts(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, int]:
    """Return {trial id: number of its attempts that failed}, without trials that never failed."""
    of_trial = hpo_failures.c.trial_id
    counted = sa.select(of_trial, sa.func.count(sa.distinct(hpo_failures.c.attempt)).label("times")).group_by(of_trial)
    return {
        row.trial_id: row.times
        for chunk in chunks(ids)
        for row in connection.execute(counted.where(hpo_failures.c.study_uid == study.uid, of_trial.in_(chunk)))
    }


def failures_of(connection: sa.Connection, study: Study, trial_id: int) -> Sequence[Any]:
    """Return the recorded failures of a trial, in the order of its attempts."""
    return connection.execute(
        sa.select(hpo_failures)
        .where(hpo_failures.c.study_uid == study.uid, hpo_failures.c.trial_id == trial_id)
        .order_by(hpo_failures.c.attempt, hpo_failures.c.failed_at)
    ).all()


def count_failures(connection: sa.Connection, study: Study) -> int:
    """Count the recorded failures by the table's key alone. An unchanged count means that there is nothing new to read.

    The rows are many and long, and no index leads to the new ones: a worker may record a failure of a trial that ended
    long ago. The count is enough. Each failure has a row of its own, and no row is deleted. A failure that is sent
    again, because the answer was lost, overwrites its row with the same content.
    """
    of_study = sa.select(sa.func.count()).where(hpo_failures.c.study_uid == study.uid)
    return int(connection.execute(of_study).scalar_one())


def failures_by_kind(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return a row for each recorded kind of failure: its count, how many were retried, and the latest message."""
    kind, latest = hpo_failures.c.kind, [hpo_failures.c.failed_at.desc(), hpo_failures.c.trial_id.desc()]
    retried = sa.case((hpo_failures.c.verdict == Verdict.RETRY, 1), else_=0)
    found = (
        sa.select(
            kind,
            hpo_failures.c.message,
            sa.func.count().over(partition_by=kind).label("times"),
            sa.func.sum(retried).over(partition_by=kind).label("retried"),
            sa.func.row_number().over(partition_by=kind, order_by=latest).label("place"),
        )
        .where(hpo_failures.c.study_uid == study.uid)
        .subquery()
    )
    return connection.execute(sa.select(found).where(found.c.place == 1)).all()
