"""The workers of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock, workers
from hpo.queue.workers import LAUNCHER
from hpo.storage import clock
from hpo.storage.tables import hpo_workers, missing
from hpo.study.study import Study


def living_workers(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return the rows of the workers that were seen within one lease and have not left."""
    columns = hpo_workers.c  # not those that an old database may lack
    return connection.execute(
        sa.select(
            columns.worker, columns.host, columns.pid, columns.booted_at, columns.clock_skew, columns.versions
        ).where(
            hpo_workers.c.study_uid == study.uid,
            hpo_workers.c.left_at.is_(None),
            workers.seen_lately(connection.dialect.name, study.spec.recovery.lease_seconds),
        )
    ).all()


def hosts(connection: sa.Connection, study: Study) -> list[str]:
    """Return the hosts of all workers that a study has had."""
    found = sa.select(hpo_workers.c.host).where(hpo_workers.c.study_uid == study.uid).distinct()
    return list(connection.execute(found).scalars())


def last_seen(connection: sa.Connection, study: Study) -> tuple[int, float | None]:
    """Return how many workers a study has had, and when one was last seen, by whichever clock."""
    seen = sa.select(sa.func.count(), sa.func.max(hpo_workers.c.seen_at)).where(hpo_workers.c.study_uid == study.uid)
    count, latest = connection.execute(seen).one()
    return count, latest


def workers_since_boot(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return (worker, booted_at) of all workers, living or not, that started on this machine since it booted."""
    columns = hpo_workers.c
    return connection.execute(
        sa.select(columns.worker, columns.booted_at).where(
            columns.study_uid == study.uid, columns.clock == clock.name(), columns.booted_at.is_not(None)
        )
    ).all()


def living_at_posts(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return the workers that were seen within one lease and have not left: where each works, and how long ago it was seen.

    An old database may lack the columns of a launch. They are empty then.
    """
    dialect, columns = connection.dialect.name, hpo_workers.c
    lacking = {column.name for column in missing(study.storage.engine)}
    places = [
        sa.null().label(name) if name in lacking else columns[name].label(name) for name in ("launch", "slot", "gpus")
    ]
    now = lease_clock.now(dialect)
    found = sa.select(
        columns.worker, columns.host, columns.pid, (now - columns.seen_at).label("silent"), *places
    ).where(
        columns.study_uid == study.uid,
        columns.left_at.is_(None),
        ~columns.worker.startswith(LAUNCHER),
        workers.seen_lately(dialect, study.spec.recovery.lease_seconds),
    )
    return connection.execute(found.order_by(columns.started_at, columns.worker)).all()
