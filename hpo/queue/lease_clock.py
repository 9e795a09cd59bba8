"""By which clock leases run: Postgres's own; on SQLite the time for which this machine has been awake since it started.

Each process on SQLite has the machine's wall clock for the database's, and leases must not follow that when it is set. The
other clock starts anew with the machine, so each moment is written with its clock's name. A moment without a name is by the wall
clock, as hpo wrote all of them before. A machine that was started anew, known by its host name, has no old worker left.
Of a clock on another machine nobody here can tell how late it is: what was written by that never passes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.storage import clock, sql
from hpo.storage.tables import hpo_trials

NO_LEASE = {"lease_until": None, "lease_clock": None}


def name(dialect: str) -> str | None:
    """Return what stands beside a moment that is written now; None for the database's own clock."""
    return clock.name() if dialect == "sqlite" else None


@cache
def now(dialect: str) -> sa.ColumnElement[float]:
    """Return the clock as an SQL expression: seconds."""
    return sql.clock(dialect) if name(dialect) is None else _awake()


def _awake() -> sa.ColumnElement[float]:
    return sa.select(sa.func.hpo_awake(type_=sa.Double)).scalar_subquery()  # so that it is asked once a statement


def lease(dialect: str, seconds: Any) -> dict[str, Any]:
    """Return the columns of a lease that is given now for so many seconds, a number or an SQL expression."""
    return {"lease_until": now(dialect) + seconds, "lease_clock": name(dialect)}


def has_passed(dialect: str, moment: sa.ColumnElement[Any], by: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Say of a column of moments that each has passed, by the clock that another column names."""
    mine = name(dialect)
    by_database = sa.and_(by.is_(None), moment < sql.clock(dialect))
    if mine is None:
        return by_database
    by_mine = sa.and_(by.is_not_distinct_from(mine), moment < now(dialect))
    return sa.or_(by_mine, has_stopped(dialect, by), by_database)


def has_stopped(dialect: str, by: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Say of a column of clocks' names that each is one of this machine's, from before it was started anew."""
    mine = name(dialect)
    if mine is None:
        return sa.false()
    return sa.and_(by.is_not(None), by != mine, by.endswith(_host(mine), autoescape=True))


def is_elsewhere(by: str | None) -> bool:
    """Say of the name of a clock that it is one of another machine's."""
    mine = clock.name()
    return by is not None and (mine is None or by.partition("@")[2].lower() != mine.partition("@")[2].lower())


def _host(of_clock: str) -> str:
    return of_clock[of_clock.index("@") :]


def is_live(dialect: str) -> sa.ColumnElement[bool]:
    """Say of our row of a trial that its lease runs."""
    until = hpo_trials.c.lease_until
    return sa.and_(until.is_not(None), ~has_passed(dialect, until, hpo_trials.c.lease_clock))
