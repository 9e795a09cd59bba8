"""Writes on Optuna's tables, each one statement that checks by itself whether it may: no read before, nothing in between.

Who only holds a trial's id, as Optuna's own code does, may write to a trial that has not finished. Who holds a claim writes
through the ledger, whose statements check the claim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import choices, sql
from hpo.storage.tables import (
    VALUE_TYPE,
    as_utc,
    intermediate_values,
    stored,
    studies,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
    utc,
)
from hpo.storage.trial_rows import distribution_in

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def lock_study(connection: sa.Connection, study_id: int) -> bool:
    """Lock a study's row, as Optuna does for a new trial; False if there is none."""
    return connection.execute(_lock_study(), {"study_id": study_id}).one_or_none() is not None


@cache
def _lock_study() -> Any:
    return sa.select(studies.c.study_id).where(studies.c.study_id == sa.bindparam("study_id")).with_for_update()


def insert_trial(
    connection: sa.Connection,
    study_id: int,
    state: TrialState = TrialState.RUNNING,
    *,
    started: datetime | None = None,
    completed: datetime | None = None,
) -> tuple[int, int]:
    """Insert a trial numbered max + 1 and return its id and its number; the caller has the study locked."""
    (inserted,) = insert_trials(connection, study_id, 1, state, started=started, completed=completed)
    return inserted


def insert_trials(
    connection: sa.Connection,
    study_id: int,
    count: int,
    state: TrialState = TrialState.RUNNING,
    *,
    started: datetime | None = None,
    completed: datetime | None = None,
) -> list[tuple[int, int]]:
    """Insert so many trials numbered from max + 1 on and return their ids and numbers, in order of the numbers; the caller
    has the study locked.

    Safe under that lock, since trial rows are never deleted. A counter of ours would part from Optuna's numbers.
    """
    given = {"study_id": study_id, "state": state, "started": started, "completed": completed, "how_many": count}
    inserted = connection.execute(_numbered(connection.dialect.name), given).all()
    return sorted(((trial_id, number) for trial_id, number in inserted), key=lambda one: one[1])


@cache
def _numbered(dialect: str) -> Any:
    names = {"study_id": "study_id", "state": "state", "started": "datetime_start", "completed": "datetime_complete"}
    given = [sql.given(dialect, name, trials.c[column].type) for name, column in names.items()]
    place = sa.select(sa.literal_column("0", sa.Integer).label("place")).cte("places", recursive=True)
    further = place.c.place + sa.literal_column("1")
    place = place.union_all(sa.select(further).where(further < sa.bindparam("how_many", type_=sa.Integer)))
    highest = sa.select(sa.func.coalesce(sa.func.max(trials.c.number), -1).label("number"))
    last = highest.where(trials.c.study_id == sa.bindparam("study_id")).subquery("last")
    number = last.c.number + sa.literal_column("1") + place.c.place
    row = sa.select(number, *given).select_from(last.join(place, sa.true())).order_by(place.c.place)
    insert = trials.insert().from_select(["number", *names.values()], row)
    return insert.returning(trials.c.trial_id, trials.c.number)


def set_state(connection: sa.Connection, trial_id: int, state: TrialState, *, once: Sequence[TrialState]) -> bool:
    """Change a trial's state if it is one of `once`, and its start or end with it; False if it is not."""
    return trial_id in set_states(connection, [trial_id], state, once=once)


def set_states(
    connection: sa.Connection, trial_ids: Sequence[int], state: TrialState, *, once: Sequence[TrialState]
) -> set[int]:
    """Change the state of those of these trials in which it is one of `once`, likewise; return their ids."""
    column = "datetime_start" if state == TrialState.RUNNING else "datetime_complete" if state.is_finished() else None
    given = {"of_trials": list(trial_ids), "new_state": state, "moment": utc()}
    return set(connection.execute(_set_states(column, tuple(once)), given).scalars())


@cache
def _set_states(column: str | None, once: tuple[TrialState, ...]) -> Any:
    moment = {} if column is None else {column: sa.bindparam("moment", type_=sa.DateTime)}
    which = trials.c.trial_id.in_(sa.bindparam("of_trials", expanding=True))
    update = trials.update().where(which, trials.c.state.in_(once))
    return update.values(state=sa.bindparam("new_state", type_=trials.c.state.type), **moment).returning(
        trials.c.trial_id
    )


def put(
    connection: sa.Connection,
    table: sa.Table,
    trial_id: int,
    *rows: Mapping[str, Any],
    key: str,
) -> bool:
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
    source = (
        sa.select(trials.c.trial_id, *told.c)
        .select_from(trials.join(told, sa.true()))
        .where(trials.c.trial_id == sa.bindparam("of_trial"), trials.c.state.in_(UNFINISHED))
        .with_for_update(read=True, of=trials)  # on Postgres an end that is being written is waited for, and then seen
    )
    insert = sql.overwriting(dialect, table, ["trial_id", *names], source, key=["trial_id", key])
    return insert.returning(table.c.trial_id)


# --- a whole trial, from a template -----------------------------------------------------------------------------------


def check_against(known: BaseDistribution | None, distribution: BaseDistribution) -> None:
    """Refuse a distribution that cannot be the one of the same parameter in another trial: ValueError."""
    if known is not None:
        check_distribution_compatibility(known, distribution)


def put_values(connection: sa.Connection, trial_id: int, values: Sequence[float]) -> None:
    """Write a trial's values, by objective; ValueError for one that is NaN."""
    rows = []
    for objective, number in enumerate(values):
        if math.isnan(number):
            raise ValueError(f"the value of objective {objective} is NaN, which no trial can end with")
        value, kind = stored(float(number))
        rows.append(
            {"trial_id": trial_id, "objective": objective, "value": value, "value_type": getattr(VALUE_TYPE, kind.name)}
        )
    if rows:
        sql.upsert(connection, trial_values, *rows, key=["trial_id", "objective"])


def insert_template(connection: sa.Connection, study_id: int, template: FrozenTrial) -> int:
    """Insert a trial with all that hangs on it and return its id; ValueError for a parameter of another kind than the study's."""
    for name, distribution in template.distributions.items():
        check_against(distribution_in(connection, study_id, name), distribution)
    trial_id, _ = insert_trial(
        connection,
        study_id,
        template.state,
        started=as_utc(template.datetime_start),
        completed=as_utc(template.datetime_complete),
    )
    put_values(connection, trial_id, template.values or [])
    hanging: list[tuple[sa.Table, list[dict[str, Any]]]] = [
        (
            trial_params,
            [
                {
                    "param_name": name,
                    "param_value": choices.internal(template.distributions[name], value),
                    "distribution_json": distribution_to_json(template.distributions[name]),
                }
                for name, value in template.params.items()
            ],
        ),
        (trial_user_attributes, attribute_rows(template.user_attrs)),
        (trial_system_attributes, attribute_rows(template.system_attrs)),
        (
            intermediate_values,
            [
                {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
                for step, number in template.intermediate_values.items()
                for value, kind in [stored(float(number))]
            ],
        ),
    ]
    for table, rows in hanging:
        if rows:
            connection.execute(table.insert(), [{"trial_id": trial_id, **row} for row in rows])
    return trial_id


def attribute_rows(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return attributes as rows of Optuna's tables."""
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
