"""The worker processes of a study: one row each, with its clock and its versions, stamped while the process lives."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.receipt import versions
from hpo.storage import clock, sql
from hpo.storage.tables import SCHEMA, hpo_workers, missing

if TYPE_CHECKING:
    from hpo.queue.ledger import Ledger


#: Each process stamps its row and reaps so often per lease. An expired lease is noticed within a sixth of a lease.
TICKS_PER_LEASE = 6
LAUNCHER = "launcher:"  # the names of processes that do not train begin with it


def new_name() -> str:
    """Return a name that no other process has: host, process id, and a random part because process ids are reused."""
    return f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def register(ledger: Ledger) -> None:
    """Write this process's row. A process that has restarted itself keeps the time of its first start."""
    place = _place(ledger)
    with sql.writing(ledger.engine) as connection:
        dialect = connection.dialect.name
        clock_name = lease_clock.name(dialect)
        before = time.time()
        now, of_database = connection.execute(sa.select(lease_clock.now(dialect), sql.now(connection))).one()
        began = sa.select(hpo_workers.c.started_at).where(
            _me(ledger), hpo_workers.c.clock.is_not_distinct_from(clock_name)
        )
        row = {
            "study_uid": ledger.uid,
            "worker": ledger.worker,
            "study_id": ledger.study_id,
            "host": platform.node(),
            "pid": os.getpid(),
            "started_at": connection.execute(began).scalar_one_or_none() or now,
            "seen_at": now,
            "left_at": None,
            "clock": clock_name,
            "clock_skew": (before + time.time()) / 2 - of_database,
            "booted_at": clock.started_at() if dialect == "sqlite" else None,
            "versions": json.dumps({**versions(), "schema": str(SCHEMA)}),
            **place,
        }
        sql.upsert(connection, hpo_workers, row, key=["study_uid", "worker"])


def _place(ledger: Ledger) -> dict[str, Any]:
    """Return the columns that say where this process works, without those that the database lacks."""
    post = ledger.post
    found = {
        "launch": post and post.launch,
        "slot": post and post.slot,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    known = {key: value for key, value in found.items() if value is not None}
    lacking = {column.name for column in missing(ledger.engine)} if known else set()
    return {key: value for key, value in known.items() if key not in lacking}


def stamp(connection: sa.Connection, ledger: Ledger) -> None:
    """Record that this process lives, and on SQLite by how much its wall clock was set since it registered."""
    dialect = connection.dialect.name
    told: dict[str, Any] = {"seen_at": lease_clock.now(dialect)}
    if dialect == "sqlite":
        told["clock_skew"] = clock.started_at() - sa.func.coalesce(hpo_workers.c.booted_at, clock.started_at())
    connection.execute(hpo_workers.update().where(_me(ledger)).values(**told))


def seen_lately(dialect: str, seconds: float) -> sa.ColumnElement[bool]:
    """Return the condition that a process was seen within so many seconds, by a clock that this process can read."""
    by = hpo_workers.c.clock.is_not_distinct_from(lease_clock.name(dialect))
    return sa.and_(by, hpo_workers.c.seen_at > lease_clock.now(dialect) - seconds)


def anybody_else(connection: sa.Connection, ledger: Ledger) -> bool:
    """Return whether another process reached the storage within the last lease. Then there was no outage.

    It must have registered at least half a lease ago.
    """
    dialect, lease = connection.dialect.name, ledger.lease_seconds
    fresh = sa.select(sa.func.count()).where(
        hpo_workers.c.study_uid == ledger.uid,
        hpo_workers.c.worker != ledger.worker,
        seen_lately(dialect, lease),
        hpo_workers.c.started_at < lease_clock.now(dialect) - lease / 2,
    )
    return bool(connection.execute(fresh).scalar_one())


def unregister(ledger: Ledger) -> None:
    """Record that this process ends."""
    with sql.writing(ledger.engine) as connection:
        now = lease_clock.now(connection.dialect.name)
        connection.execute(hpo_workers.update().where(_me(ledger)).values(seen_at=now, left_at=now))


def of_another_schema(connection: sa.Connection, uid: str, lease_seconds: float) -> list[str]:
    """Return the names of the processes that work on a study with another schema."""
    here = at_work(connection, uid, lease_seconds)
    return [worker for worker, found in here.items() if json.loads(found).get("schema") != str(SCHEMA)]


def at_work(connection: sa.Connection, uid: str, lease_seconds: float) -> dict[str, str]:
    """Return the versions of the processes that work on a study, by name. They were seen within a lease and have not left."""
    dialect, c = connection.dialect.name, hpo_workers.c
    by_wall_clock = sa.and_(c.clock.is_(None), c.seen_at > sql.now(connection) - lease_seconds)  # schema 1
    is_here = sa.or_(seen_lately(dialect, lease_seconds), by_wall_clock)
    here = connection.execute(
        sa.select(c.worker, c.versions).where(c.study_uid == uid, c.left_at.is_(None), is_here).order_by(c.started_at)
    )
    return {row.worker: row.versions for row in here}


def _me(ledger: Ledger) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_workers.c.study_uid == ledger.uid, hpo_workers.c.worker == ledger.worker)
