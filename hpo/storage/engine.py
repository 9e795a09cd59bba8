"""How we connect: the settings of an engine on SQLite and on Postgres.

SQLite runs in write-ahead mode with a long busy timeout, and each of its writing transactions takes the write lock when
it begins; Postgres gets a pool of two that are pinged before use if they were idle.
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

BUSY_SECONDS = 10.0  # how long a SQLite statement waits for another process's write, a Postgres one for a lock
CONNECT_SECONDS = 10  # how long a command waits for Postgres to answer
IDLE_SECONDS = 30.0  # after which Postgres ends a transaction whose process does nothing
PING_AFTER_SECONDS = 5.0  # without use
POOL_SIZE = 2  # connections of one process at most: of what it does, and of the thread that keeps its lease


def arguments(url: URL, file: SqliteFile | None = None) -> dict[str, Any]:
    """Return what `sqlalchemy.create_engine` is given for this URL.

    Args:
        file: that of a URL of SQLite's, if the caller keeps it.
    """
    if url.get_backend_name() == "sqlite":
        file = file or SqliteFile(Path(url.database or ""))
        # IMMEDIATE: a transaction takes the write lock before its first write, so it never fails half way for having
        # read something that another process changed since.
        return {
            "creator": partial(file.open, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE"),
            "pool_events": [(_set_up, "connect"), (file.check, "checkout")],
        }
    connect_args = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,  # milliseconds that what was sent may stay unanswered by the other machine
    }
    return {
        "connect_args": connect_args,
        "pool_events": [(_set_timeouts, "connect"), (_note_use, "checkin"), (_ping, "checkout")],
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "pool_recycle": 1800,
    }


def _set_timeouts(connection: Any, record: object) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    """Let no process that is frozen amid a transaction, or cut off, hold up the others for long."""
    connection.autocommit = True  # by statements, not by the connection's options, which poolers refuse
    connection.execute(f"SET lock_timeout = {BUSY_SECONDS * 1000:.0f}")
    connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000:.0f}")
    connection.autocommit = False


def _note_use(connection: Any, record: Any) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    record.info["used_at"] = time.monotonic()


def _ping(connection: Any, record: Any, proxy: object) -> None:  # noqa: ARG001  (SQLAlchemy passes all three)
    """Ask a connection that was idle for a while whether it still stands; the pool makes another one if it does not.

    Not before every use, as SQLAlchemy's own ping does: that would double the round trips of a report. What breaks within
    the while is retried by `retry`.
    """
    if time.monotonic() - record.info.get("used_at", math.inf) < PING_AFTER_SECONDS:
        return
    import psycopg  # loaded by whoever has opened this connection; on SQLite it need not be

    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except psycopg.Error as error:
        raise sa.exc.DisconnectionError(str(error)) from error


def _set_up(connection: sqlite3.Connection, record: object) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    connection.create_function("hpo_awake", 0, clock.awake)
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'hpo_studies'").fetchone():
        connection.execute("PRAGMA journal_mode=WAL")  # stays with the file: one that only Optuna uses is left as it is
    connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may take the last commits, never the file
