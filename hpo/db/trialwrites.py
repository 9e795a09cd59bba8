"""Writes on Optuna's tables, each one statement that checks by itself whether it may: no read before, nothing in between.

Who only holds a trial's id, as Optuna's own code does, may write to a trial that has not finished. Who holds a claim writes
through the ledger, whose statements check the claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.db import sql
from hpo.db.tables import studies, trials, utc

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def lock_study(connection: sa.Connection, study_id: int) -> bool:
    """Lock a study's row, as Optuna does for a new trial; False if there is none."""
    found = connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())
    return found.one_or_none() is not None


def insert_trial(
    connection: sa.Connection,
    study_id: int,
    state: TrialState = TrialState.RUNNING,
    *,
    started: datetime | None = None,
    completed: datetime | None = None,
) -> tuple[int, int]:
    """Insert a trial numbered max + 1 and return its id and its number; the caller has the study locked.

    Safe under that lock, since trial rows are never deleted. A counter of ours would part from Optuna's numbers.
    """
    given = {"study_id": study_id, "state": state, "started": started, "completed": completed}
    trial_id, number = connection.execute(_numbered(connection.dialect.name), given).one()
    return trial_id, number


@cache
def _numbered(dialect: str) -> Any:
    names = {"study_id": "study_id", "state": "state", "started": "datetime_start", "completed": "datetime_complete"}
    given = [sql.given(dialect, name, trials.c[column].type) for name, column in names.items()]
    number = sa.func.coalesce(sa.func.max(trials.c.number) + 1, 0)
    row = sa.select(number, *given).where(trials.c.study_id == sa.bindparam("study_id"))
    insert = trials.insert().from_select(["number", *names.values()], row)
    return insert.returning(trials.c.trial_id, trials.c.number)


def set_state(connection: sa.Connection, trial_id: int, state: TrialState, *, once: Sequence[TrialState]) -> bool:
    """Change a trial's state if it is one of `once`, and its start or end with it; False if it is not."""
    times: dict[str, Any] = {}
    if state == TrialState.RUNNING:
        times["datetime_start"] = utc()
    elif state.is_finished():
        times["datetime_complete"] = utc()
    changed = connection.execute(
        trials.update().where(trials.c.trial_id == trial_id, trials.c.state.in_(once)).values(state=state, **times)
    )
    return bool(changed.rowcount == 1)


def put(connection: sa.Connection, table: sa.Table, trial_id: int, *rows: Mapping[str, Any], key: str) -> bool:
    """Insert or overwrite rows that hang on a trial, if the trial has not finished; False if it has, or is not there.

    Args:
        rows: at least one; all have the same columns.
        key: the column that names a row among those of the trial.
    """
    statement = _put(connection.dialect.name, table, key, tuple(rows[0]), len(rows))
    written = connection.execute(statement, {"of_trial": trial_id, **sql.numbered(rows)}).all()
    return len(written) == len(rows)  # SQLite's driver does not count what a WITH inserts


@cache
def _put(dialect: str, table: sa.Table, key: str, names: tuple[str, ...], count: int) -> Any:
    told = sql.told(dialect, {name: table.c[name].type for name in names}, count)
    # On Postgres an end that is being written is waited for, and then seen.
    source = (
        sa.select(trials.c.trial_id, *told.c)
        .join(told, sa.true())
        .where(trials.c.trial_id == sa.bindparam("of_trial"), trials.c.state.in_(UNFINISHED))
        .with_for_update(read=True, of=trials)
    )
    insert = sql.overwriting(dialect, table, ["trial_id", *names], source, key=["trial_id", key])
    return insert.returning(table.c.trial_id)
