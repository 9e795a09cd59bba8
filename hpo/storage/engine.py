"""The engine's settings on SQLite and on Postgres.

SQLite runs in write-ahead mode with a long busy timeout. A writing transaction takes the write lock when it begins.
Postgres gets a pool of two connections. An idle connection is pinged before use.
"""

from __future__ import annotations

import math
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL

from hpo.storage import clock
from hpo.storage.sqlite_file import SqliteFile

BUSY_SECONDS = 10.0  # how long SQLite waits for another process's write, and Postgres for a lock
CONNECT_SECONDS = 10  # how long a command waits for Postgres to answer
IDLE_SECONDS = 30.0  # Postgres ends a transaction that is idle for so long
PING_AFTER_SECONDS = 5.0  # a connection idle for so long is pinged before use
POOL_SIZE = 2  # connections of one process: for its work, and for the heartbeat thread


def arguments(url: URL, file: SqliteFile | None = None) -> dict[str, Any]:
    """Return the keyword arguments of `sqlalchemy.create_engine` for this URL.

    Args:
        url: the URL.
        file: the SQLite file of the URL, if the caller keeps one.
    """
    if url.get_backend_name() == "sqlite":
        file = file or SqliteFile(Path(url.database or ""))
        # IMMEDIATE: a transaction takes the write lock before its first write. So it never fails halfway because another
        # process has changed what it read.
        return {
            "creator": partial(file.open, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE"),
            "pool_events": [(_set_up_to_read if file.is_read_only else _set_up, "connect"), (file.check, "checkout")],
        }
    connect_args = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,  # milliseconds for which sent data may stay unacknowledged
    }
    return {
        "connect_args": connect_args,
        "pool_events": [(_set_timeouts, "connect"), (_note_use, "checkin"), (_ping, "checkout")],
        "pool_size": POOL_SIZE,
        "max_overflow": 1,  # a thread that nobody waits for any more may hold one; the heartbeat need not wait for it
        "pool_recycle": 1800,
    }


def _set_timeouts(connection: Any, record: object) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    """Limit how long a frozen or disconnected process can hold up the others."""
    connection.autocommit = True  # set by statements: poolers refuse connection options
    connection.execute(f"SET lock_timeout = {BUSY_SECONDS * 1000:.0f}")
    connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000:.0f}")
    connection.autocommit = False


def _note_use(connection: Any, record: Any) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    record.info["used_at"] = time.monotonic()


def _ping(connection: Any, record: Any, proxy: object) -> None:  # noqa: ARG001  (SQLAlchemy passes all three)
    """Check a connection that was idle. If it is broken, the pool makes another one.

    SQLAlchemy's own ping runs before every use, which would double the round trips of a report. `retry` handles a
    connection that breaks sooner.
    """
    if time.monotonic() - record.info.get("used_at", math.inf) < PING_AFTER_SECONDS:
        return
    import psycopg  # loaded already by this connection; SQLite does not need it

    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except psycopg.Error as error:
        raise sa.exc.DisconnectionError(str(error)) from error


def _set_up_to_read(connection: sqlite3.Connection, record: object) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    connection.create_function("hpo_awake", 0, clock.awake)


def _set_up(connection: sqlite3.Connection, record: object) -> None:
    _set_up_to_read(connection, record)
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'hpo_studies'").fetchone():
        connection.execute("PRAGMA journal_mode=WAL")  # stays with the file, so one without our tables is left alone
    connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last commits, but damages no file
