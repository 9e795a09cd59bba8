"""Who works on a study: a row for each process, with its clock and its versions, stamped while it lives."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.queue.ledger import Ledger
from hpo.receipt import versions
from hpo.storage import clock, sql
from hpo.storage.tables import SCHEMA, hpo_workers


def new_name() -> str:
    """Return a name that no other process has: host, process, and a random part since process ids come again."""
    return f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def register(ledger: Ledger) -> None:
    """Write this process down; again after it was recycled."""
    with sql.writing(ledger.engine) as connection:
        dialect = connection.dialect.name
        before = time.time()
        now, of_database = connection.execute(sa.select(lease_clock.now(dialect), sql.now(connection))).one()
        row = {
            "study_uid": ledger.uid,
            "worker": ledger.worker,
            "study_id": ledger.study_id,
            "host": platform.node(),
            "pid": os.getpid(),
            "started_at": now,
            "seen_at": now,
            "left_at": None,
            "clock": lease_clock.name(dialect),
            "clock_skew": (before + time.time()) / 2 - of_database,
            "booted_at": clock.started_at() if dialect == "sqlite" else None,
            "versions": json.dumps({**versions(), "schema": str(SCHEMA)}),
        }
        sql.upsert(connection, hpo_workers, row, key=["study_uid", "worker"])


def stamp(connection: sa.Connection, ledger: Ledger) -> None:
    """Say that this process lives, and on SQLite by how much its wall clock was set since it began."""
    dialect = connection.dialect.name
    told: dict[str, Any] = {"seen_at": lease_clock.now(dialect)}
    if dialect == "sqlite":
        told["clock_skew"] = clock.started_at() - sa.func.coalesce(hpo_workers.c.booted_at, clock.started_at())
    connection.execute(hpo_workers.update().where(_me(ledger)).values(**told))


def seen_lately(dialect: str, seconds: float) -> sa.ColumnElement[bool]:
    """Say of a process that it was seen within so many seconds, by a clock that this one can read."""
    by = hpo_workers.c.clock.is_not_distinct_from(lease_clock.name(dialect))
    return sa.and_(by, hpo_workers.c.seen_at > lease_clock.now(dialect) - seconds)


def anybody_else(connection: sa.Connection, ledger: Ledger) -> bool:
    """Say whether a process that has worked for a while reached the storage within the last lease: it was not away."""
    dialect, lease = connection.dialect.name, ledger.lease_seconds
    fresh = sa.select(sa.func.count()).where(
        hpo_workers.c.study_uid == ledger.uid,
        hpo_workers.c.worker != ledger.worker,
        seen_lately(dialect, lease),
        hpo_workers.c.started_at < lease_clock.now(dialect) - lease / 2,
    )
    return bool(connection.execute(fresh).scalar_one())


def unregister(ledger: Ledger) -> None:
    """Say that this process ends."""
    with sql.writing(ledger.engine) as connection:
        now = lease_clock.now(connection.dialect.name)
        connection.execute(hpo_workers.update().where(_me(ledger)).values(seen_at=now, left_at=now))


def of_another_schema(connection: sa.Connection, uid: str, lease_seconds: float) -> list[str]:
    """Return the processes of another version of the schema that are at work on a study: seen within a lease, and not left."""
    dialect, c = connection.dialect.name, hpo_workers.c
    by_wall_clock = sa.and_(c.clock.is_(None), c.seen_at > sql.now(connection) - lease_seconds)  # of schema 1
    is_here = sa.or_(seen_lately(dialect, lease_seconds), by_wall_clock)
    here = connection.execute(
        sa.select(c.worker, c.versions).where(c.study_uid == uid, c.left_at.is_(None), is_here).order_by(c.started_at)
    )
    return [worker for worker, found in here if json.loads(found).get("schema") != str(SCHEMA)]


def _me(ledger: Ledger) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_workers.c.study_uid == ledger.uid, hpo_workers.c.worker == ledger.worker)
