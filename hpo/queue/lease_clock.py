"""The clock of leases: Postgres's own clock, or on SQLite the time that this machine has been awake since it started.

On SQLite the database's clock is the machine's wall clock. It can be set, and leases must not follow it then. The time
awake restarts with the machine, so each moment is stored with its clock's name. A moment without a name is by the
database's clock. Earlier versions of hpo wrote all moments so. A machine that has restarted, known by its host name,
has no old workers left. The clock of another machine cannot be read here, so a moment by that clock never passes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.storage import clock, sql
from hpo.storage.tables import hpo_trials

NO_LEASE = {"lease_until": None, "lease_clock": None}


def name(dialect: str) -> str | None:
    """Return the clock's name, which is stored beside each moment; None for the database's own clock."""
    return clock.name() if dialect == "sqlite" else None


@cache
def now(dialect: str) -> sa.ColumnElement[float]:
    """Return the clock in seconds, as an SQL expression."""
    return sql.clock(dialect) if name(dialect) is None else _awake()


def _awake() -> sa.ColumnElement[float]:
    return sa.select(sa.func.hpo_awake(type_=sa.Double)).scalar_subquery()  # a subquery is evaluated once per statement


def lease(dialect: str, seconds: Any) -> dict[str, Any]:
    """Return the columns of a lease that starts now.

    Args:
        seconds: its length, a number or an SQL expression.
    """
    return {"lease_until": now(dialect) + seconds, "lease_clock": name(dialect)}


def has_passed(dialect: str, moment: sa.ColumnElement[Any], by: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that a moment has passed.

    Args:
        by: the column with the name of the moment's clock.
    """
    mine = name(dialect)
    by_database = sa.and_(by.is_(None), moment < sql.clock_at_start(dialect))
    if mine is None:
        return by_database
    by_mine = sa.and_(by.is_not_distinct_from(mine), moment < now(dialect))
    return sa.or_(by_mine, has_stopped(dialect, by), by_database)


def has_stopped(dialect: str, by: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that a clock is one of this machine's from before its last start."""
    mine = name(dialect)
    if mine is None:
        return sa.false()
    return sa.and_(by.is_not(None), by != mine, by.endswith(_host(mine), autoescape=True))


def is_elsewhere(by: str | None) -> bool:
    """Return whether a clock's name is one of another machine."""
    mine = clock.name()
    return by is not None and (mine is None or by.partition("@")[2].lower() != mine.partition("@")[2].lower())


def _host(of_clock: str) -> str:
    return of_clock[of_clock.index("@") :]


def is_live(dialect: str) -> sa.ColumnElement[bool]:
    """Return the condition that the trial has a lease that has not expired."""
    until = hpo_trials.c.lease_until
    return sa.and_(until.is_not(None), ~has_passed(dialect, until, hpo_trials.c.lease_clock))
