"""Opens a storage: checks its URL and what it names, and makes one engine for all statements.

Messages show nothing that may be a secret.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from hpo.errors import NoAnswer, StorageAway, StorageBusy, StorageError, StorageGone
from hpo.storage import engine, filesystem, tables
from hpo.storage.redaction import redacted_message, redacted_text, redacted_url
from hpo.storage.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from hpo.storage.optuna_storage import OptunaStorage, RetryCall

Made = TypeVar("Made")
FAILURES = (sa.exc.SQLAlchemyError, NoAnswer)  # what a failing storage raises
#: Errors that may pass by themselves: a server restarts, a connection is cut, a lock is held, a disk is full.
OUTAGES = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
    sa.exc.PendingRollbackError,
    NoAnswer,
)
#: Errors that are about the storage and say nothing about the data: an outage, or a file that is gone for good.
UNREACHED = (*OUTAGES, StorageGone)
OF_POOLER = ("no more connections allowed", "query_wait_timeout", "server_login_retry")  # as pgbouncer says it
BUSY_WORDS = (
    *("too many clients", "connection slots", "starting up", "shutting down", "not yet accepting", "locked"),
    *OF_POOLER,
)
PROBE_SECONDS = 5.0  # how long a command waits for a locked database
DEFAULT = "sqlite:///studies.db"  # in the current folder
MAY_READ = "is it a SQLite file that you may read?"
MAY_WRITE = "is it a SQLite file that you may write?"
MOST_TABLES = 5  # that a message names
CREATION_TRIES = 8  # tries to make the tables while other processes do the same


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage: one engine, and an Optuna storage on it."""

    url: URL
    engine: sa.Engine
    file: SqliteFile | None = None  # None for Postgres
    retry: RetryCall | None = None  # calls each transaction of `optuna`, and retries it while the storage fails

    @cached_property
    def optuna(self) -> OptunaStorage:
        """Optuna's storage on this engine. Its first use loads Optuna, which many readers do not need."""
        from hpo.storage.optuna_storage import OptunaStorage, do_once

        return OptunaStorage(self.engine, self.retry or do_once)

    @property
    def shown(self) -> str:
        """The URL without its secrets."""
        return redacted_url(self.url)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which another process opens the same storage. They hold the password."""
        return {"HPO_STORAGE": plain_url(self.url)} | (self.file.handed_on if self.file else {})

    def check(self) -> None:
        """Raise StorageGone if the SQLite file is no longer at its path."""
        with self.engine.connect():
            pass

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def storage_url(given: str | None, of_file: str | None = None) -> str:
    """Return the storage URL: the option, else $HPO_STORAGE, else the file's, else studies.db in the current folder."""
    return given or os.environ.get("HPO_STORAGE") or of_file or DEFAULT


def parse_url(text: str) -> URL:
    """Return the URL with an absolute path and our driver. Raises StorageError if it is not supported."""
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except Exception:
        raise StorageError(
            f"storage: {redacted_text(text)!r} is no database URL; use sqlite:///studies.db or postgresql://USER@HOST/DATABASE"
        ) from None
    if url.host and "@" in url.host:
        raise StorageError("storage: the password holds an @, which ends it; write it as %40")
    if backend in ("postgresql", "postgres"):  # libpq accepts both
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StorageError(
            f"storage: {backend!r} is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        )
    if url.database in (None, "", ":memory:"):
        raise StorageError("storage: a SQLite database in memory cannot be shared by workers; use sqlite:///studies.db")
    assert url.database is not None
    if url.query or not url.database.isprintable():
        raise StorageError(f"storage: {redacted_url(url)!r} names more than a file; use sqlite:///FILE")
    return url.set(drivername="sqlite", database=str(Path(url.database).absolute()))


def plain_url(url: URL) -> str:
    """Return the URL with its password, for another process's environment. It must not be logged."""
    return url.render_as_string(hide_password=False)


def connect(text: str, *, create: bool = False, only_reads: bool = False) -> Storage:
    """Open a storage.

    Args:
        text: the URL.
        create: make the SQLite file, Optuna's tables and ours if they are missing. Without it that is an error.
        only_reads: also open a SQLite file that may not be written, and tables of an earlier hpo that may not be changed.

    Raises StorageError if the storage is missing, unreachable, another program's, or on a network file system. Raises
    StorageBusy if it is locked, starting up, or has no connection left. No message shows the password.
    """
    url = parse_url(text)
    file = SqliteFile(Path(url.database or ""), create=create) if url.get_backend_name() == "sqlite" else None
    if file is not None and only_reads:
        file.read_only()
    _probe(url, file, create=create)
    try:
        opened = _opened(url, file, create=create)
        if create:
            _creating(lambda: tables.create(opened))
            if url.get_backend_name() == "sqlite":
                opened.dispose()  # connections made before our tables have other settings
    except RuntimeError as error:  # from Optuna's check of the schema version
        raise StorageError(f"storage {redacted_url(url)}: {error}") from None
    except FAILURES as error:
        raise _unreachable(url, error) from None
    try:
        _complete_old_tables(opened, url, only_reads=only_reads)
    except BaseException:
        opened.dispose()
        raise
    return Storage(url=url, engine=opened, file=file)


def _opened(url: URL, file: SqliteFile | None, *, create: bool) -> sa.Engine:
    """Return an engine on Optuna's tables. Raises RuntimeError, with Optuna's message, for another schema.

    Only Optuna makes its tables, and only Optuna says what is wrong with a schema. A known schema is accepted without
    Optuna, which takes longer to load than a study takes to read.
    """
    if not create:
        opened = sa.create_engine(plain_url(url), **engine.arguments(url, file))
        if tables.has_known_schema(opened):
            return opened
        opened.dispose()
    import optuna

    def make() -> sa.Engine:
        arguments = engine.arguments(url, file)
        return optuna.storages.RDBStorage(
            plain_url(url), engine_kwargs=arguments, skip_table_creation=not create
        ).engine

    try:
        return _creating(make)
    except optuna.exceptions.StorageInternalError as error:
        raise _unreachable(url, error) from None


def _creating(make: Callable[[], Made]) -> Made:
    """Make missing tables. If another process makes them at the same time, try again."""
    for _ in range(CREATION_TRIES - 1):
        try:
            return make()
        except (sa.exc.OperationalError, sa.exc.IntegrityError, sa.exc.ProgrammingError):
            time.sleep(random.uniform(0.05, 0.3))
    return make()


def _complete_old_tables(opened: sa.Engine, url: URL, *, only_reads: bool) -> None:
    try:
        lacking = tables.missing(opened)
    except FAILURES as error:
        raise _unreachable(url, error) from None
    if not lacking:
        return
    is_dispensable = {*lacking} <= {*(tables.DISPENSABLE_TO_READERS if only_reads else tables.DISPENSABLE)}
    create = partial(tables.create, opened)  # an earlier hpo works with the added columns too
    try:
        if only_reads and is_dispensable:
            create()  # once, since a reader usually may not
        else:
            _creating(create)
    except FAILURES as error:
        if is_dispensable:
            return
        names = ", ".join(f"{column.table.name}.{column.name}" for column in lacking)
        raise StorageError(
            f"storage {redacted_url(url)}: was made by an earlier hpo; it lacks {names}, which cannot be added: "
            f"{cause(error)}; give a command once as a user who may change the tables"
        ) from None


def _unreachable(url: URL, error: Exception) -> StorageError:
    """Return the error for a failed connection: StorageBusy if it may pass soon, StorageAway if no server answers."""
    said = redacted_message(cause(error), url)
    of_server = getattr(getattr(error, "orig", None), "sqlstate", "")  # None if no answer to a statement is the cause
    is_away = of_server is None and "FATAL" not in said  # with this word a server refuses a connection
    is_busy = any(word in said for word in BUSY_WORDS)
    kind = StorageBusy if is_busy else StorageAway if is_away else StorageError
    return kind(f"storage {redacted_url(url)}: {said}")


def _probe(url: URL, opened: SqliteFile | None, *, create: bool) -> None:
    """Check the storage before anything is written. Raises StorageError."""
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
            connection.execute("BEGIN" if opened.is_read_only else "BEGIN IMMEDIATE")
            found = _tables(connection)
            is_optunas = _is_optunas(connection, found)
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        kind = StorageBusy if "locked" in str(error) else StorageError
        raise kind(
            f"storage {redacted_url(url)}: {error}{_sqlite_mend(error, only_reads=opened.is_read_only)}"
        ) from None
    if not is_optunas:
        raise StorageError(
            f"storage {redacted_url(url)}: is the SQLite file of another program, with the tables "
            f"{', '.join(sorted(found)[:MOST_TABLES])}; name another file with --storage"
        )
    if tables.studies.name not in found and not create:
        raise StorageError(
            f"storage {redacted_url(url)}: holds no studies; `hpo run` makes one, or name another with --storage"
        )


def _tables(connection: sqlite3.Connection) -> set[str]:
    found = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    return {name for (name,) in found}


def _is_optunas(connection: sqlite3.Connection, found: set[str]) -> bool:
    """Return whether the tables are Optuna's. A part of them or none will do: another process may be making them now.

    Other tables may lie beside them, since some programs keep all their tables in one file.
    """
    if tables.VERSION_TABLE in found:
        return True
    if tables.studies.name in found:
        columns = {row[1] for row in connection.execute(f"PRAGMA table_info({tables.studies.name})")}
        return columns >= {*tables.studies.c.keys()}
    return found <= {*tables.optunas.tables}


def _sqlite_mend(error: sqlite3.Error, *, only_reads: bool) -> str:
    if "locked" in str(error):
        return f" for {PROBE_SECONDS:.0f} s; another program holds it: end that one and try again"
    return f"; {MAY_READ if only_reads else MAY_WRITE}"


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


@dataclass(frozen=True, kw_only=True)
class Connections:
    """How many connections to Postgres there are, and how many a run needs."""

    needed: int  # by the workers and this process
    limit: int  # max_connections
    reserved: int
    others: int  # in use, by others than this process; behind a pooler by all
    is_pooled: bool  # then the needed ones are the pooler's clients

    @property
    def left(self) -> int:
        return self.limit - self.reserved - self.others


def count_connections(place: Storage, workers: int) -> Connections:
    """Count the connections of a Postgres for a run of so many workers."""
    with place.engine.connect() as connection:
        limit, reserved, used = connection.execute(
            sa.text(
                "SELECT current_setting('max_connections')::int,"
                " current_setting('superuser_reserved_connections')::int"
                " + coalesce(current_setting('reserved_connections', true), '0')::int,"
                " (SELECT sum(numbackends) FROM pg_stat_database)::int"
            )
        ).one()
        is_pooled = bool(connection.info[engine.IS_POOLED])
        pool = place.engine.pool
        assert isinstance(pool, sa.pool.QueuePool)
        mine = 0 if is_pooled else pool.checkedin() + pool.checkedout()
    needed = engine.POOL_SIZE * (workers + 1)
    return Connections(needed=needed, limit=limit, reserved=reserved, others=used - mine, is_pooled=is_pooled)


def check_connections(place: Storage, workers: int) -> None:
    """Raise StorageError if Postgres has too few connections left for so many workers.

    A pooler needs few of them, and does not tell its clients how many clients it takes. So nothing is refused then.
    """
    if place.is_sqlite:
        return
    found = count_connections(place, workers)
    if found.needed > found.left and not found.is_pooled:
        raise StorageError(
            f"storage {place.shown}: {workers} workers and this process take up to {found.needed} connections, "
            f"{engine.POOL_SIZE} each; Postgres has {found.left} left "
            f"(max_connections {found.limit}, {found.reserved} reserved, {found.others} in use by others): "
            f"start at most {max(0, found.left // engine.POOL_SIZE - 1)} workers, or raise max_connections"
        )


def cause(error: BaseException) -> str:
    """Return the driver's message in one line, without SQLAlchemy's links and without passwords."""
    inner = getattr(error, "orig", None) or error.__cause__ or error
    said = redacted_message(" ".join(str(inner).split()))
    return f"{said}; {MAY_WRITE}" if "readonly database" in said and MAY_WRITE not in said else said
