"""The engine's settings on SQLite and on Postgres.

SQLite runs in write-ahead mode with a long busy timeout. A writing transaction takes the write lock when it begins.
Postgres gets a pool of two connections. An idle connection is pinged before use.

A pooler such as pgbouncer gives each transaction whichever server connection is free. A prepared statement or a setting
of one connection is then met by another process, or by nobody. So behind a pooler nothing is prepared. The time limits
are set by each writing transaction for itself, unless the role or the database has them already.
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
LIMITS = {  # milliseconds; how long a frozen or disconnected process can hold up the others
    "lock_timeout": int(BUSY_SECONDS * 1000),
    "idle_in_transaction_session_timeout": int(IDLE_SECONDS * 1000),
}
IS_POOLED, LACKS_LIMITS = "is_pooled", "lacks_limits"  # keys in a connection's `info`
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
        # A claim counts after it has the study's lock. With the default of some databases it would count as before it.
        "isolation_level": "READ COMMITTED",
        "pool_events": [(_set_up_server, "connect"), (_note_use, "checkin"), (_ping, "checkout")],
        "pool_size": POOL_SIZE,
        "max_overflow": 1,  # a thread that nobody waits for any more may hold one; the heartbeat need not wait for it
        "pool_recycle": 1800,
    }


def _set_up_server(connection: Any, record: Any) -> None:
    """Set the time limits once, or find a pooler and note what its transactions lack."""
    connection.autocommit = True  # set by statements: poolers refuse connection options
    (process,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    record.info[IS_POOLED] = is_pooled = process != connection.info.backend_pid  # a pooler invents the latter
    record.info[LACKS_LIMITS] = False
    if is_pooled:
        connection.prepare_threshold = None
        defaults = f"SELECT reset_val::bigint FROM pg_settings WHERE name IN {tuple(LIMITS)}"
        record.info[LACKS_LIMITS] = not all(value for (value,) in connection.execute(defaults))
    else:
        connection.execute(_limits("SET"))
    connection.autocommit = False


def limit_transaction(connection: sa.Connection) -> None:
    """Set the time limits for this transaction if its connection to Postgres lacks them."""
    if connection.info.get(LACKS_LIMITS):
        connection.exec_driver_sql(_limits("SET LOCAL"))


def _limits(verb: str) -> str:
    return "; ".join(f"{verb} {name} = {value}" for name, value in LIMITS.items())


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
