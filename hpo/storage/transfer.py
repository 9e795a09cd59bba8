"""Copies one study's rows from one database to another, with new ids, and compares what has arrived.

A row belongs to a study by its foreign keys and by the study's uid. A table needs no code of its own here: a new one is
copied because it is declared in `tables`. A test fails for a table whose rows no column assigns to a study.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.storage.tables import (
    Hold,
    alembic_version,
    hpo_launches,
    hpo_studies,
    hpo_trials,
    hpo_workers,
    metadata,
    missing,
    optunas,
    studies,
    study_system_attributes,
    trials,
)

NOT_OF_A_STUDY = (alembic_version,)  # of the database as a whole
BATCH = 5000  # rows that are read and written at once
#: Keys of a study's system attributes with a trial's id in them: optuna-dashboard's notes, artifacts and skipped trials.
OF_A_TRIAL = re.compile(r"(dashboard:(?:artifacts:)?|preference:skip_trial:)(\d+)(:.*|$)", re.DOTALL)
PARENTS = ":parent:"  # within the keys under which Optuna's genetic samplers keep a list of trial ids

Change = Callable[[Any, Any], Any]  # the value that is written, from the value and the row that are read


@dataclass(frozen=True, kw_only=True)
class TableCopy:
    """What was copied of one table."""

    name: str
    rows: int
    digest: str  # of the rows as they are in the target, in any order


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the files of a copied study lie."""

    store: str  # its checkpoints
    code: Callable[[str], str]  # the folder of code, from the one of the old study
    checkpoint: Callable[[str], str]  # likewise the file of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs in the copy, beside ids."""

    selected: Mapping[sa.Column[Any], sa.ColumnElement[Any]] = field(default_factory=dict)  # read in place of a column
    made: Mapping[sa.Column[Any], Change] = field(default_factory=dict)


def as_parked(places: Places, *, checkpoints: bool) -> Changes:
    """Return the changes with which a copy of a study of ours is worked on by nobody.

    Leases are given back and workers have left, since no clock of the one database is known in the other. Launches are
    recalled, since their jobs work on the old study. The hold of an earlier copy is taken away.

    Args:
        places: where the files of the copy lie.
        checkpoints: keep the records of checkpoints. Without them open trials start again.
    """
    of_study, of_trial, of_worker, of_launch = hpo_studies.c, hpo_trials.c, hpo_workers.c, hpo_launches.c
    is_copied = of_study.hold == Hold.COPIED
    selected: dict[sa.Column[Any], sa.ColumnElement[Any]] = {
        of_trial.lease_until: sa.null(),
        of_trial.lease_clock: sa.null(),
        of_worker.left_at: sa.func.coalesce(of_worker.left_at, of_worker.seen_at),
        of_launch.recalled_at: sa.func.coalesce(of_launch.recalled_at, of_launch.launched_at),
        of_study.stop_reason: sa.case((is_copied, sa.null()), else_=of_study.stop_reason),
        of_study.hold: sa.case((is_copied, sa.null()), else_=of_study.hold),
    }
    if not checkpoints:
        known = (of_trial.checkpoint_epoch, of_trial.checkpoint_path, of_trial.checkpoint_digest)
        selected |= dict.fromkeys((*known, of_trial.checkpoint_attributes), sa.null())
    made: dict[sa.Column[Any], Change] = {
        of_study.checkpoints: lambda *_: places.store,
        of_study.code_folder: lambda value, _: places.code(value),
        of_trial.checkpoint_path: lambda value, _: None if value is None else places.checkpoint(value),
    }
    return Changes(selected=selected, made=made)


class RowsDiffer(Exception):
    """Raised when the rows of a table in the target are not those that were read. The transaction is to be given up."""


def study_tables() -> list[sa.Table]:
    """Return all tables with rows of studies, each after those that it refers to."""
    return [
        table
        for declared in (optunas, metadata)
        for table in declared.sorted_tables
        if not any(table is other for other in NOT_OF_A_STUDY)
    ]


def of_study(table: sa.Table, study_id: int, uid: str | None) -> sa.ColumnElement[bool]:
    """Return the condition that a row of a table belongs to a study.

    Raises TypeError for a table that does not say whose its rows are.
    """
    found: list[sa.ColumnElement[bool]] = []
    of_trials = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id)
    for column in table.c:
        if column is studies.c.study_id or _refers_to(column, studies.c.study_id):
            found.append(column == study_id)
        elif _refers_to(column, trials.c.trial_id):
            found.append(column.in_(of_trials))
        elif column is hpo_studies.c.uid or (column.name == "study_uid" and table.metadata is metadata):
            found.append(column == uid)
    if not found:
        raise TypeError(f"table {table.name}: no column says which study a row belongs to")
    return sa.and_(*found)


def copy_rows(
    source: sa.Connection, target: sa.Connection, study_id: int, uid: str | None, changes: Changes
) -> list[TableCopy]:
    """Copy all rows of a study, and read them back.

    Args:
        source: an open connection; all its reads see the same state.
        target: an open transaction that writes.
        study_id: the study's id in the source.
        uid: the study's uid, None for a study that Optuna made.
        changes: what differs in the copy.

    Raises RowsDiffer if a table has not arrived as it was read.
    """
    there = set(sa.inspect(source).get_table_names())
    lacking = set(missing(source.engine))
    found: list[TableCopy] = []
    copied = [
        table for table in study_tables() if table.name in there and not (uid is None and table.metadata is metadata)
    ]
    ids = {
        key: _new_ids(source, target, key, of_study(table, study_id, uid))
        for table in copied
        if (key := _surrogate(table)) is not None and key in _referred_to()
    }
    for table in copied:
        key = _surrogate(table)
        columns = [column for column in table.c if column not in lacking and (column is not key or key in ids)]
        read = [changes.selected.get(column, column).label(column.key) for column in columns]
        select = sa.select(*read).where(of_study(table, study_id, uid)).order_by(*table.primary_key.columns)
        sent = _Digest()
        translate = _translator(columns, ids, changes.made)
        _write(target, table, columns, sent.through(map(translate, _read(source, select))))
        here = of_study(table, ids[studies.c.study_id][study_id], uid)
        arrived = _Digest()
        for _ in arrived.through(map(tuple, _read(target, sa.select(*columns).where(here)))):
            pass
        if arrived != sent:
            raise RowsDiffer(f"table {table.name}: {sent.rows} rows were read and {arrived.rows} other ones arrived")
        found.append(TableCopy(name=table.name, rows=sent.rows, digest=sent.text))
    _analyze(target, [one.name for one in found if one.rows])
    return found


# --- ids --------------------------------------------------------------------------------------------------------------


def _refers_to(column: sa.Column[Any], other: sa.Column[Any]) -> bool:
    return any(key.column is other for key in column.foreign_keys)


def _surrogate(table: sa.Table) -> sa.Column[Any] | None:
    """Return the column with ids that the database gives, None if there is none."""
    keys = list(table.primary_key.columns)
    is_one = len(keys) == 1 and isinstance(keys[0].type, sa.Integer) and not keys[0].foreign_keys
    return keys[0] if is_one else None


@cache
def _referred_to() -> frozenset[sa.Column[Any]]:
    return frozenset(key.column for table in study_tables() for column in table.c for key in column.foreign_keys)


def _new_ids(
    source: sa.Connection, target: sa.Connection, key: sa.Column[Any], which: sa.ColumnElement[bool]
) -> dict[int, int]:
    """Return the ids of rows in the target by their ids in the source, in the same order."""
    old = list(source.execute(sa.select(key).where(which).order_by(key)).scalars())
    if target.dialect.name == "sqlite":  # the transaction has the write lock
        last = target.execute(sa.select(sa.func.coalesce(sa.func.max(key), 0))).scalar_one()
        return dict(zip(old, range(last + 1, last + 1 + len(old)), strict=True))
    drawn = sa.text("SELECT nextval(pg_get_serial_sequence(:table, :key)) FROM generate_series(1, :count)")
    new = target.execute(drawn, {"table": key.table.name, "key": key.name, "count": len(old)}).scalars()
    return dict(zip(old, sorted(new), strict=True))


def _of_trials(ids: Mapping[int, int]) -> dict[sa.Column[Any], Change]:
    """Return how ids of trials within a study's system attributes change. Ids of trials that are gone stay."""

    def key(value: str, row: Any) -> str:  # noqa: ARG001  (a Change)
        match = OF_A_TRIAL.fullmatch(value)
        return f"{match[1]}{ids.get(int(match[2]), match[2])}{match[3]}" if match else value

    def value_json(value: str, row: Any) -> str:
        found = json.loads(value) if PARENTS in row.key else None
        is_list = isinstance(found, list) and all(isinstance(one, int) for one in found)
        return json.dumps([ids.get(one, one) for one in found]) if is_list and found else value

    return {study_system_attributes.c.key: key, study_system_attributes.c.value_json: value_json}


# --- rows -------------------------------------------------------------------------------------------------------------


def _translator(
    columns: Sequence[sa.Column[Any]],
    ids: Mapping[sa.Column[Any], Mapping[int, int]],
    made: Mapping[sa.Column[Any], Change],
) -> Callable[[Any], tuple[Any, ...]]:
    """Return what makes a row of the target from one of the source."""
    changed: list[tuple[int, Change]] = []
    made = _of_trials(ids.get(trials.c.trial_id, {})) | dict(made)
    for place, column in enumerate(columns):
        known = ids.get(column) or next((ids[key.column] for key in column.foreign_keys if key.column in ids), None)
        if known is not None:
            changed.append((place, _renumbered(known)))
        if isinstance(column.type, sa.Float):
            changed.append((place, _number))
        if column in made:
            changed.append((place, made[column]))

    def translate(row: Any) -> tuple[Any, ...]:
        values = list(row)
        for place, change in changed:
            values[place] = change(values[place], row)
        return tuple(values)

    return translate


def _renumbered(known: Mapping[int, int]) -> Change:
    return lambda value, _: None if value is None else known[value]


def _number(value: float | None, row: Any) -> float | None:  # noqa: ARG001  (a Change)
    """Return a number as both databases keep it: SQLite has NULL for NaN, and no -0.0."""
    return None if value is None or value != value else value + 0.0


def _read(connection: sa.Connection, select: sa.Select[Any]) -> Iterator[Any]:
    return iter(connection.execute(select, execution_options={"yield_per": BATCH}))


def _write(
    connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]], rows: Iterator[tuple[Any, ...]]
) -> None:
    """Insert rows: on Postgres by COPY, which takes a tenth of the time of INSERT."""
    dialect = connection.dialect
    told = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]
    given = [(place, one) for place, one in enumerate(told) if one is not None]

    def bound() -> Iterator[Sequence[Any]]:
        for row in rows:
            values = list(row)
            for place, process in given:
                values[place] = process(values[place])
            yield values

    write = dialect.identifier_preparer
    names = ", ".join(write.quote(column.name) for column in columns)
    into = f"{write.quote(table.name)} ({names})"
    raw: Any = connection.connection.dbapi_connection
    try:
        if dialect.name == "sqlite":
            raw.executemany(f"INSERT INTO {into} VALUES ({', '.join('?' for _ in columns)})", bound())
            return
        with raw.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for values in bound():
                copy.write_row(values)
    except (dialect.loaded_dbapi.Error, UnicodeError, OverflowError) as error:
        raise sa.exc.DatabaseError(f"INSERT INTO {into}", None, error) from error


def _analyze(connection: sa.Connection, names: Sequence[str]) -> None:
    """Let Postgres count the new rows now: it plans claims badly until it has."""
    if connection.dialect.name == "postgresql" and names:
        connection.exec_driver_sql(f"ANALYZE {', '.join(names)}")


class _Digest:
    """A count and a digest of rows. The order does not matter, since databases sort text differently."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def through(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Yield the rows, and add each."""
        for row in rows:
            self.rows += 1
            self._sum += int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest())
            yield row

    @property
    def text(self) -> str:
        return f"{self._sum % 2**128:032x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Digest) and (self.rows, self.text) == (other.rows, other.text)

    __hash__ = None  # type: ignore[assignment]
