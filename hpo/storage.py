"""A storage URL turned into one engine, shared by Optuna's RDBStorage and our own statements.

SQLite runs in write-ahead mode with a long busy timeout, and each of its writing transactions takes the write lock when
it begins; Postgres gets a pool of two that is pinged before use. Passwords are cut out of everything that is shown.
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from hpo import tables
from hpo.errors import StorageError

Made = TypeVar("Made")
FAILURES = (
    sa.exc.SQLAlchemyError,
    optuna.exceptions.StorageInternalError,
)  # what a failing storage raises, ours or Optuna's
BUSY_SECONDS = 60.0  # how long a SQLite statement waits for another process's write
PROBE_SECONDS = 5.0  # how long a command waits for a locked database before it says so
CREATION_TRIES = 8  # to make the tables, against other processes that do the same
CONNECT_SECONDS = 10  # how long a command waits for Postgres to answer


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage: one engine, and Optuna's storage (with its cache) on it."""

    url: URL
    engine: sa.Engine
    optuna: optuna.storages.BaseStorage

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return redacted(self.url)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def parse(text: str) -> URL:
    """Return the URL made absolute and with the driver we use; StorageError if it is none that we know."""
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except Exception:
        raise StorageError(
            f"storage: {_hidden(text)!r} is no database URL; use sqlite:///studies.db or postgresql://USER@HOST/DATABASE"
        ) from None
    if url.host and "@" in url.host:
        raise StorageError("storage: the password holds an @, which ends it; write it as %40")
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StorageError(
            f"storage: {backend!r} is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        )
    if url.database in (None, "", ":memory:"):
        raise StorageError("storage: a SQLite database in memory cannot be shared by workers; use sqlite:///studies.db")
    assert url.database is not None
    if url.query or not url.database.isprintable():
        raise StorageError(f"storage: {redacted(url)!r} has more to it than a file; use sqlite:///FILE")
    return url.set(drivername="sqlite", database=str(Path(url.database).absolute()))


def redacted(url: URL) -> str:
    """Return the URL with *** for its password."""
    secret = {key: "***" for key in url.query if "pass" in key}
    return url.update_query_dict(secret).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def plain(url: URL) -> str:
    """Return the URL with its password, for another process's environment; never for a log."""
    return url.render_as_string(hide_password=False)


def _hidden(text: str) -> str:
    """Return a text that did not parse as a URL without what stands between ':' and '@'."""
    text = re.sub(r"(?i)(pass\w*\s*=\s*)('[^']*'|[^\s&]+)", r"\1***", text)
    head, at, tail = text.rpartition("@")
    return f"{head.rpartition(':')[0]}:***@{tail}" if at else text


def connect(text: str, *, create: bool = False, patience: float | None = None) -> Storage:
    """Open a storage; StorageError, without the password, if it is missing, locked, unreachable or not Optuna's.

    Args:
        create: make the SQLite file and the tables, Optuna's and ours, if they are not there; else that is an error.
        patience: how many seconds to wait for a locked SQLite file; a person's, if not given.
    """
    url = parse(text)
    _probe(url, create=create, patience=PROBE_SECONDS if patience is None else patience)
    try:
        backend = _creating(
            lambda: optuna.storages.RDBStorage(
                plain(url), engine_kwargs=_engine_arguments(url), skip_table_creation=not create
            )
        )
        if create:
            _creating(lambda: tables.create(backend.engine))
    except RuntimeError as error:  # Optuna's check of the schema's version
        raise StorageError(f"storage {redacted(url)}: {error}") from None
    except FAILURES as error:
        raise StorageError(f"storage {redacted(url)}: {cause(error)}") from None
    return Storage(url=url, engine=backend.engine, optuna=optuna.storages.get_storage(backend))


def _creating(make: Callable[[], Made]) -> Made:
    """Make tables where they are missing; a process that makes them at the same moment is waited for, not failed on."""
    for _ in range(CREATION_TRIES - 1):
        try:
            return make()
        except (sa.exc.OperationalError, sa.exc.IntegrityError, sa.exc.ProgrammingError):
            time.sleep(random.uniform(0.05, 0.3))
    return make()


def _engine_arguments(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        # IMMEDIATE: a transaction takes the write lock before its first write, so it never fails half way for having
        # read something that another process changed since.
        connect_args: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": "IMMEDIATE"}
        return {"connect_args": connect_args, "pool_events": [(_set_pragmas, "connect")]}
    connect_args = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    return {
        "connect_args": connect_args,
        "pool_size": 2,
        "max_overflow": 0,
        "pool_pre_ping": True,
        "pool_recycle": 1800,
    }


def _set_pragmas(connection: sqlite3.Connection, record: object) -> None:  # noqa: ARG001  (SQLAlchemy passes both)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may take the last commits, never the file


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that will write: on SQLite it holds the write lock from its first statement on."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection
        connection.commit()


def now(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return the database's own clock as an SQL expression: seconds since 1970, with fractions."""
    if connection.dialect.name == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Float)
    return sa.literal_column("extract(epoch from clock_timestamp())::double precision", sa.Float)


def _probe(url: URL, *, create: bool, patience: float) -> None:
    """Fail early and clearly: before anything is written."""
    if url.get_backend_name() == "sqlite":
        _probe_sqlite(url, create=create, patience=patience)
    else:
        _probe_postgres(url, create=create)


def _probe_sqlite(url: URL, *, create: bool, patience: float) -> None:
    file = Path(url.database or "")
    if not file.exists():
        if not create:
            raise StorageError(
                f"storage {redacted(url)}: no such file; `hpo run` makes it, or name another with --storage"
            )
        if not file.parent.is_dir():
            raise StorageError(f"storage {redacted(url)}: there is no folder {file.parent}; make it first")
        return
    try:
        connection = sqlite3.connect(file, timeout=patience, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            has_tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchone()
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageError(f"storage {redacted(url)}: {error}{_sqlite_mend(error, patience)}") from None
    if not has_tables and not create:
        raise StorageError(
            f"storage {redacted(url)}: holds no studies; `hpo run` makes one, or name another with --storage"
        )


def _sqlite_mend(error: sqlite3.Error, patience: float) -> str:
    if "locked" in str(error):
        return f" for {patience:.0f} s; another program holds it: end that one and try again"
    return "; is it a SQLite file that you may write?"


def _probe_postgres(url: URL, *, create: bool) -> None:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args={"connect_timeout": CONNECT_SECONDS})
    try:
        with engine.connect() as connection:
            has_tables = sa.inspect(connection).has_table("studies")
    except sa.exc.SQLAlchemyError as error:
        raise StorageError(f"storage {redacted(url)}: {cause(error)}") from None
    if not has_tables and not create:
        raise StorageError(
            f"storage {redacted(url)}: holds no studies; `hpo run` makes one, or name another with --storage"
        )


def cause(error: BaseException) -> str:
    """Return the driver's own words in one line, without SQLAlchemy's background links."""
    inner = getattr(error, "orig", None) or error.__cause__ or error
    return " ".join(str(inner).split())
