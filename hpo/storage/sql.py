"""What our statements share on SQLite and on Postgres: a transaction that writes, an insert that may be repeated, a clock."""

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

from hpo.storage.engine import BUSY_SECONDS

SHORTEST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05  # seconds, between two tries to take SQLite's write lock


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that will write: on SQLite it holds the write lock from its first statement on."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            _begin_immediate(connection)
        yield connection
        connection.commit()


@contextmanager
def writing_once(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection for one statement that writes, or for several that may each stand alone.

    On Postgres each is a transaction of its own: one round trip instead of three.
    """
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            yield connection
    else:
        with reading(engine) as connection:
            yield connection


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection for reads that need not agree with one another."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection


def _begin_immediate(connection: sa.Connection) -> None:
    """Take SQLite's write lock, trying again in short pauses of random length.

    SQLite's own waiting has pauses of up to 100 ms, the same for everybody, in which the lock goes from hand to hand: with
    eight writers one report in a hundred took half a second.
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
            except sqlite3.Error as error:  # the file is damaged, for one: nothing that passes
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
    """Insert rows, or overwrite the ones that have the same key: writing twice is writing once.

    Args:
        rows: at least one; all have the same columns.
        computed: columns that the database itself fills.
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
    """Return the statement that inserts, or overwrites, what a query selects; on SQLite the query needs a WHERE."""
    return _overwriting(_insert(dialect, table).from_select(list(names), source), names, key)


def told(dialect: str, kinds: Mapping[str, sa.types.TypeEngine[Any]], count: int) -> sa.CTE:
    """Return rows that are given as parameters, by `numbered`, as a table called `told`.

    Args:
        kinds: the types of its columns.
        count: how many rows it has.
    """
    rows = [
        sa.select(*(given(dialect, f"{name}_{place}", kind).label(name) for name, kind in kinds.items()))
        for place in range(count)
    ]
    # Not VALUES, of which SQLAlchemy remembers no compiled form.
    return sa.union_all(*rows).cte("told") if count > 1 else rows[0].cte("told")


def numbered(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters of `told`."""
    return {f"{name}_{place}": value for place, row in enumerate(rows) for name, value in row.items()}


def given(dialect: str, name: str, kind: sa.types.TypeEngine[Any]) -> sa.ColumnElement[Any]:
    """Return a parameter as a column of a query; Postgres must be told its type there."""
    parameter = sa.bindparam(name, type_=kind)
    if dialect != "postgresql":
        return parameter
    is_text = isinstance(kind, sa.String) and not isinstance(kind, sa.Enum)
    return sa.cast(parameter, sa.Text() if is_text else kind)  # a cast to a length would cut the text


def _insert(dialect: str, table: sa.Table) -> Any:
    return import_module(f"sqlalchemy.dialects.{dialect}").insert(table)  # of the other one nothing need be loaded


def _overwriting(statement: Any, names: Sequence[str], key: Sequence[str]) -> Any:
    overwritten = {name: statement.excluded[name] for name in names if name not in key}
    return statement.on_conflict_do_update(index_elements=list(key), set_=overwritten)


def storable(text: str) -> str:
    """Return the text without what a database cannot hold: Postgres no NUL, neither of them a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def now(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return the database's own clock as an SQL expression: seconds since 1970, with fractions."""
    return clock(connection.dialect.name)


@cache
def clock(dialect: str) -> sa.ColumnElement[float]:
    """Return the clock of SQLite or of Postgres, likewise; the same object each time."""
    if dialect == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Float)
    return sa.literal_column("extract(epoch from clock_timestamp())::double precision", sa.Float)
