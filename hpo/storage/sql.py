"""SQL that works on SQLite and on Postgres: transactions, upserts, rows as parameters, the database's clock."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import sqlalchemy as sa

from hpo.storage.engine import BUSY_SECONDS, LACKS_LIMITS, limit_transaction

Connection = sa.Connection  # for modules that pass one on and write no SQL
CHUNK = 500  # ids in one IN (...); every SQLite takes at least 999 parameters
SHORTEST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05  # seconds, between two tries to take SQLite's write lock


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that will write. On SQLite it takes the write lock first."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            _begin_immediate(connection)
        else:
            limit_transaction(connection)
        yield connection
        connection.commit()


@contextmanager
def writing_once(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection for one writing statement, or for several independent ones.

    On Postgres each statement is its own transaction: one round trip instead of three. Behind a pooler they are one
    transaction, if only that can have time limits.
    """
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            _begin_immediate(connection)
        elif connection.info.get(LACKS_LIMITS):
            limit_transaction(connection)
        else:
            connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection
        connection.commit()


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection for reads that need no common snapshot."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection whose reads all see the same state, however long they take."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
            may_be_idle(connection)
        else:
            connection.exec_driver_sql("BEGIN")
        yield connection


def may_be_idle(connection: sa.Connection) -> None:
    """Let this transaction be idle for longer than `engine.IDLE_SECONDS` on Postgres."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


def _begin_immediate(connection: sa.Connection) -> None:
    """Take SQLite's write lock, with short random pauses between tries.

    SQLite's own pauses grow to 100 ms and are the same in all processes. With eight writers, one report in a hundred
    then took half a second.
    """
    raw = connection.connection.dbapi_connection
    assert raw is not None
    deadline = time.monotonic() + BUSY_SECONDS
    pause = SHORTEST_PAUSE
    try:
        raw.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() >= deadline:
                    raise sa.exc.OperationalError("BEGIN IMMEDIATE", None, error) from error
            except sqlite3.Error as error:  # does not pass by itself: for example the file is damaged
                raise sa.exc.DatabaseError("BEGIN IMMEDIATE", None, error) from error
            time.sleep(random.uniform(0.5, 1.0) * pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
    finally:
        raw.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")


def upsert(
    connection: sa.Connection,
    table: sa.Table,
    *rows: Mapping[str, Any],
    key: Sequence[str],
    computed: Mapping[str, sa.ColumnElement[Any]] | None = None,
) -> None:
    """Insert rows, or overwrite those with the same key. Writing twice has the same effect as writing once.

    Args:
        connection: an open connection.
        table: the table.
        rows: at least one; all have the same columns.
        key: the columns of the key.
        computed: SQL expressions of further columns.
    """
    statement = _upsert(connection.dialect.name, table, tuple(rows[0]), tuple(key), tuple((computed or {}).items()))
    connection.execute(statement, [dict(row) for row in rows])


@cache
def _upsert(
    dialect: str,
    table: sa.Table,
    names: tuple[str, ...],
    key: tuple[str, ...],
    computed: tuple[tuple[str, sa.ColumnElement[Any]], ...],
) -> Any:
    columns = {name: sa.bindparam(name, type_=table.c[name].type) for name in names} | dict(computed)
    return _overwriting(_insert(dialect, table).values(columns), list(columns), key)


def overwriting(
    dialect: str, table: sa.Table, names: Sequence[str], source: sa.Select[Any], *, key: Sequence[str]
) -> Any:
    """Return a statement that inserts or overwrites what a query selects. On SQLite the query needs a WHERE."""
    return _overwriting(_insert(dialect, table).from_select(list(names), source), names, key)


def told(dialect: str, kinds: Mapping[str, sa.types.TypeEngine[Any]], count: int) -> sa.CTE:
    """Return a table `told` of rows that are given as parameters, see `numbered`.

    Args:
        dialect: the database's dialect.
        kinds: the types of its columns, by name.
        count: its number of rows.
    """
    rows = [
        sa.select(*(given(dialect, f"{name}_{place}", kind).label(name) for name, kind in kinds.items()))
        for place in range(count)
    ]
    # Not VALUES: SQLAlchemy does not cache its compiled form.
    return sa.union_all(*rows).cte("told") if count > 1 else rows[0].cte("told")


def numbered(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as the parameters of `told`."""
    return {f"{name}_{place}": value for place, row in enumerate(rows) for name, value in row.items()}


def given(dialect: str, name: str, kind: sa.types.TypeEngine[Any]) -> sa.ColumnElement[Any]:
    """Return a parameter as a column of a query. Postgres needs its type there."""
    parameter = sa.bindparam(name, type_=kind)
    if dialect != "postgresql":
        return parameter
    is_text = isinstance(kind, sa.String) and not isinstance(kind, sa.Enum)
    return sa.cast(parameter, sa.Text() if is_text else kind)  # a cast to VARCHAR(n) would cut the text


def _insert(dialect: str, table: sa.Table) -> Any:
    return import_module(f"sqlalchemy.dialects.{dialect}").insert(table)  # loads no other dialect


def _overwriting(statement: Any, names: Sequence[str], key: Sequence[str]) -> Any:
    overwritten = {name: statement.excluded[name] for name in names if name not in key}
    return statement.on_conflict_do_update(index_elements=list(key), set_=overwritten)


def storable(text: str) -> str:
    """Return text with NUL characters and lone surrogates escaped, which databases cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def now(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return the database's clock as an SQL expression: seconds since 1970, with fractions."""
    return clock(connection.dialect.name)


@cache
def clock(dialect: str) -> sa.ColumnElement[float]:
    """Return the clock of a dialect, likewise. It is the same object each time."""
    if dialect == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Float)
    return sa.literal_column("extract(epoch from clock_timestamp())::double precision", sa.Float)


@cache
def clock_at_start(dialect: str) -> sa.ColumnElement[float]:
    """Return what the clock of a dialect showed as the statement began. An index can be searched for it."""
    if dialect == "sqlite":
        return clock(dialect)
    return sa.literal_column("extract(epoch from statement_timestamp())::double precision", sa.Float)


def analyze(engine: sa.Engine, *tables: sa.Table) -> None:
    """Let Postgres count what is in tables, from which it plans. It does so by itself only about once a minute.

    Nothing is done if another process does it now, or if this user may not.
    """
    if engine.dialect.name == "postgresql":
        with reading(engine) as connection:
            connection.exec_driver_sql(f"ANALYZE (SKIP_LOCKED) {', '.join(table.name for table in tables)}")


def chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut ids into pieces that fit into one statement."""
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))


def quick_check(engine: sa.Engine) -> str | None:
    """Return the result of SQLite's `quick_check`: "ok", or the first problem of the file."""
    with engine.connect() as connection:
        said = connection.exec_driver_sql("PRAGMA quick_check").scalars().first()
        return None if said is None else str(said)
