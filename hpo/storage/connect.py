"""A storage URL turned into one engine, shared by all statements, once what it names is known to be a storage.

What may hold a secret is cut out of everything that is shown.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from hpo.errors import NoAnswer, StorageBusy, StorageError, StorageGone
from hpo.storage import engine, filesystem, tables
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.redaction import redacted_message, redacted_text, redacted_url
from hpo.storage.sqlite_file import SqliteFile

Made = TypeVar("Made")
FAILURES = (
    sa.exc.SQLAlchemyError,
    NoAnswer,
    optuna.exceptions.StorageInternalError,
)  # what a failing storage raises, ours or Optuna's
#: What passes by itself: a server that restarts, a connection cut, a lock held, a disk full. Retried by `retry`.
OUTAGES = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
    sa.exc.PendingRollbackError,
    NoAnswer,
)
#: What says nothing of the data that it met on its way: an outage, and a file that is gone for good.
UNREACHED = (*OUTAGES, StorageGone)
BUSY_WORDS = ("too many clients", "connection slots", "starting up", "shutting down", "not yet accepting", "locked")
PROBE_SECONDS = 5.0  # how long a command waits for a locked database before it says so
CREATION_TRIES = 8  # to make the tables, against other processes that do the same


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage: one engine, and an Optuna storage on it."""

    url: URL
    engine: sa.Engine
    optuna: OptunaStorage
    file: SqliteFile | None = None  # None of Postgres

    @property
    def shown(self) -> str:
        """The URL without its secrets."""
        return redacted_url(self.url)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs in its environment to open the same storage, the password included."""
        return {"HPO_STORAGE": plain_url(self.url)} | (self.file.handed_on if self.file else {})

    def check(self) -> None:
        """Raise StorageGone if the file is not at its path any more."""
        with self.engine.connect():
            pass

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def parse_url(text: str) -> URL:
    """Return the URL made absolute and with the driver we use; StorageError if it is none that we know."""
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except Exception:
        raise StorageError(
            f"storage: {redacted_text(text)!r} is no database URL; use sqlite:///studies.db or postgresql://USER@HOST/DATABASE"
        ) from None
    if url.host and "@" in url.host:
        raise StorageError("storage: the password holds an @, which ends it; write it as %40")
    if backend in ("postgresql", "postgres"):  # as libpq and many a host write it
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StorageError(
            f"storage: {backend!r} is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        )
    if url.database in (None, "", ":memory:"):
        raise StorageError("storage: a SQLite database in memory cannot be shared by workers; use sqlite:///studies.db")
    assert url.database is not None
    if url.query or not url.database.isprintable():
        raise StorageError(f"storage: {redacted_url(url)!r} has more to it than a file; use sqlite:///FILE")
    return url.set(drivername="sqlite", database=str(Path(url.database).absolute()))


def plain_url(url: URL) -> str:
    """Return the URL with its password, for another process's environment; never for a log."""
    return url.render_as_string(hide_password=False)


def connect(text: str, *, create: bool = False) -> Storage:
    """Open a storage; StorageError, without the password, if it is missing, unreachable, not Optuna's or not to be trusted.

    Args:
        create: make the SQLite file and the tables, Optuna's and ours, if they are not there; else that is an error.

    Raises StorageBusy if the storage is locked, starting up, or has no connection left.
    """
    url = parse_url(text)
    file = SqliteFile(Path(url.database or ""), create=create) if url.get_backend_name() == "sqlite" else None
    _probe(url, file, create=create)
    try:
        opened = _opened(url, file, create=create)
        if create:
            _creating(lambda: tables.create(opened))
            if url.get_backend_name() == "sqlite":
                opened.dispose()  # a connection from before there were our tables has other settings
    except RuntimeError as error:  # Optuna's check of the schema's version
        raise StorageError(f"storage {redacted_url(url)}: {error}") from None
    except FAILURES as error:
        raise _unreachable(url, error) from None
    try:
        _complete_old_tables(opened, url)
    except BaseException:
        opened.dispose()
        raise
    return Storage(url=url, engine=opened, optuna=OptunaStorage(opened), file=file)


def _opened(url: URL, file: SqliteFile | None, *, create: bool) -> sa.Engine:
    """Return an engine on Optuna's tables; RuntimeError in Optuna's words if their schema is another one.

    Only Optuna makes the tables, and only Optuna says what is wrong with a schema. One that is right is seen without its
    RDBStorage, which takes as long to load and to make as a look at a study.
    """
    if not create:
        opened = sa.create_engine(plain_url(url), **engine.arguments(url, file))
        if tables.has_known_schema(opened):
            return opened
        opened.dispose()

    def make() -> sa.Engine:
        arguments = engine.arguments(url, file)
        return optuna.storages.RDBStorage(
            plain_url(url), engine_kwargs=arguments, skip_table_creation=not create
        ).engine

    return _creating(make)


def _creating(make: Callable[[], Made]) -> Made:
    """Make tables where they are missing; a process that makes them at the same moment is waited for, not failed on."""
    for _ in range(CREATION_TRIES - 1):
        try:
            return make()
        except (sa.exc.OperationalError, sa.exc.IntegrityError, sa.exc.ProgrammingError):
            time.sleep(random.uniform(0.05, 0.3))
    return make()


def _complete_old_tables(opened: sa.Engine, url: URL) -> None:
    try:
        lacking = tables.missing(opened)
    except FAILURES as error:
        raise _unreachable(url, error) from None
    if not lacking:
        return
    try:
        _creating(lambda: tables.create(opened))  # which an earlier hpo does not mind
    except FAILURES as error:
        names = ", ".join(f"{column.table.name}.{column.name}" for column in lacking)
        raise StorageError(
            f"storage {redacted_url(url)}: was made by an earlier hpo; it lacks {names}, which cannot be added: "
            f"{cause(error)}; give a command once as a user who may change the tables"
        ) from None


def _unreachable(url: URL, error: Exception) -> StorageError:
    """Return the error that a failed connection means."""
    said = redacted_message(cause(error), url)
    kind = StorageBusy if any(word in said for word in BUSY_WORDS) else StorageError
    return kind(f"storage {redacted_url(url)}: {said}")


def _probe(url: URL, opened: SqliteFile | None, *, create: bool) -> None:
    """Fail early and clearly: before anything is written."""
    if opened is not None:
        _probe_sqlite(url, opened, create=create)
    else:
        _probe_postgres(url, create=create)


def _probe_sqlite(url: URL, opened: SqliteFile, *, create: bool) -> None:
    file = Path(url.database or "")
    if (served := filesystem.kind_of(file)) in filesystem.NETWORK:
        raise StorageError(
            f"storage {redacted_url(url)}: lies on a network file system ({served}), on which SQLite loses data; "
            "use a local disk, or Postgres for workers on several machines"
        )
    if not file.exists() and not opened.handed_on:
        if not create:
            raise StorageError(
                f"storage {redacted_url(url)}: no such file; `hpo run` makes it, or name another with --storage"
            )
        if not file.parent.is_dir():
            raise StorageError(f"storage {redacted_url(url)}: there is no folder {file.parent}; make it first")
        return
    try:
        connection = opened.open(timeout=PROBE_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            has_tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchone()
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        kind = StorageBusy if "locked" in str(error) else StorageError
        raise kind(f"storage {redacted_url(url)}: {error}{_sqlite_mend(error)}") from None
    if not has_tables and not create:
        raise StorageError(
            f"storage {redacted_url(url)}: holds no studies; `hpo run` makes one, or name another with --storage"
        )


def _sqlite_mend(error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f" for {PROBE_SECONDS:.0f} s; another program holds it: end that one and try again"
    return "; is it a SQLite file that you may write?"


def _probe_postgres(url: URL, *, create: bool) -> None:
    arguments = {"connect_timeout": engine.CONNECT_SECONDS}
    try:
        probe = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args=arguments)
        with probe.connect() as connection:
            has_tables = sa.inspect(connection).has_table("studies")
    except sa.exc.SQLAlchemyError as error:
        raise _unreachable(url, error) from None
    if not has_tables and not create:
        raise StorageError(
            f"storage {redacted_url(url)}: holds no studies; `hpo run` makes one, or name another with --storage"
        )


def check_connections(place: Storage, workers: int) -> None:
    """Refuse more workers than Postgres has connections left for; StorageError with the numbers."""
    if place.is_sqlite:
        return
    with place.engine.connect() as connection:
        limit, reserved, used = connection.execute(
            sa.text(
                "SELECT current_setting('max_connections')::int,"
                " current_setting('superuser_reserved_connections')::int"
                " + coalesce(current_setting('reserved_connections', true), '0')::int,"
                " (SELECT sum(numbackends) FROM pg_stat_database)::int"
            )
        ).one()
        pool = place.engine.pool
        assert isinstance(pool, sa.pool.QueuePool)
        others = used - pool.checkedin() - pool.checkedout()
    left = limit - reserved - others
    needed = engine.POOL_SIZE * (workers + 1)
    if needed > left:
        raise StorageError(
            f"storage {place.shown}: {workers} workers and this process take up to {needed} connections, "
            f"{engine.POOL_SIZE} each; Postgres has {left} left "
            f"(max_connections {limit}, {reserved} reserved, {others} in use by others): "
            f"start at most {max(0, left // engine.POOL_SIZE - 1)} workers, or raise max_connections"
        )


def cause(error: BaseException) -> str:
    """Return the driver's own words in one line, without SQLAlchemy's background links and without passwords."""
    inner = getattr(error, "orig", None) or error.__cause__ or error
    return redacted_message(" ".join(str(inner).split()))
