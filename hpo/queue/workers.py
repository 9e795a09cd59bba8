"""Who works on a study: a row for each process, with its clock and its versions, stamped while it lives."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid

import sqlalchemy as sa

from hpo.queue.ledger import Ledger
from hpo.receipt import versions
from hpo.storage import sql
from hpo.storage.tables import hpo_workers


def new_name() -> str:
    """Return a name that no other process has: host, process, and a random part since process ids come again."""
    return f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def register(ledger: Ledger) -> None:
    """Write this process down; again after it was recycled."""
    with sql.writing(ledger.engine) as connection:
        before = time.time()
        now = float(connection.execute(sa.select(sql.now(connection))).scalar_one())
        skew = (before + time.time()) / 2 - now
        row = {
            "study_uid": ledger.uid,
            "worker": ledger.worker,
            "study_id": ledger.study_id,
            "host": platform.node(),
            "pid": os.getpid(),
            "started_at": now,
            "seen_at": now,
            "left_at": None,
            "clock_skew": skew,
            "versions": json.dumps(versions()),
        }
        sql.upsert(connection, hpo_workers, row, key=["study_uid", "worker"])


def stamp(connection: sa.Connection, ledger: Ledger) -> None:
    """Say that this process lives."""
    connection.execute(hpo_workers.update().where(_me(ledger)).values(seen_at=sql.now(connection)))


def anybody_else(connection: sa.Connection, ledger: Ledger) -> bool:
    """Say whether a process that has worked for a while reached the storage within the last lease: it was not away."""
    now, lease = sql.now(connection), ledger.lease_seconds
    fresh = sa.select(sa.func.count()).where(
        hpo_workers.c.study_uid == ledger.uid,
        hpo_workers.c.worker != ledger.worker,
        hpo_workers.c.seen_at > now - lease,
        hpo_workers.c.started_at < now - lease / 2,
    )
    return bool(connection.execute(fresh).scalar_one())


def unregister(ledger: Ledger) -> None:
    """Say that this process ends."""
    with sql.writing(ledger.engine) as connection:
        now = sql.now(connection)
        connection.execute(hpo_workers.update().where(_me(ledger)).values(seen_at=now, left_at=now))


def _me(ledger: Ledger) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_workers.c.study_uid == ledger.uid, hpo_workers.c.worker == ledger.worker)
