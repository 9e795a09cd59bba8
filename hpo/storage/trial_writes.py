"""Writes to Optuna's tables. Each is one statement, which checks by itself whether the trial may be written to.

These writes need only a trial's id, as Optuna's own code has it, and refuse a finished trial. The holder of a claim
writes through the ledger, whose statements check the claim.
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
    QUEUED_KEY,
    VALUE_TYPE,
    as_utc,
    intermediate_values,
    stored,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
    utc,
)
from hpo.storage.trial_rows import distribution_in

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def insert_trial(
    connection: sa.Connection,
    study_id: int,
    state: TrialState = TrialState.RUNNING,
    *,
    started: datetime | None = None,
    completed: datetime | None = None,
) -> tuple[int, int]:
    """Insert a trial numbered max + 1. Return its id and its number. The caller has the study locked."""
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
    """Insert trials numbered from max + 1 on. Return their ids and numbers, by number. The caller has the study locked.

    This is safe under the lock, since trial rows are never deleted. A counter of ours would not include trials that
    Optuna adds.
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


def insert_queued(
    connection: sa.Connection,
    study_id: int,
    configurations: Sequence[Mapping[str, Any]],
    attributes: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[int, int]]:
    """Insert a WAITING trial for each configuration, as `enqueue_trial` does. The caller has the study locked.

    Args:
        connection: an open transaction.
        study_id: the study's id.
        configurations: values by parameter, as Optuna stores them. The sampler chooses all others.
        attributes: user attributes of each trial; none if empty.

    Returns their ids and numbers, in the order of the configurations.
    """
    if not configurations:
        return []
    inserted = insert_trials(connection, study_id, len(configurations), TrialState.WAITING)
    ids = [trial_id for trial_id, _ in inserted]
    fixed: list[Mapping[str, Any]] = [{QUEUED_KEY: dict(values)} for values in configurations]
    for table, given in ((trial_system_attributes, fixed), (trial_user_attributes, attributes)):
        if rows := [
            {"trial_id": trial_id, **row}
            for trial_id, one in zip(ids, given, strict=False)
            for row in attribute_rows(one)
        ]:
            connection.execute(table.insert(), rows)
    return inserted


def set_state(connection: sa.Connection, trial_id: int, state: TrialState, *, once: Sequence[TrialState]) -> bool:
    """Change a trial's state, and its start or end, if its state is one of `once`. Return whether it was."""
    return trial_id in set_states(connection, [trial_id], state, once=once)


def set_states(
    connection: sa.Connection, trial_ids: Sequence[int], state: TrialState, *, once: Sequence[TrialState]
) -> set[int]:
    """Do the same for several trials. Return the ids of the changed ones."""
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
    """Insert or overwrite child rows of a trial. Return False if the trial has finished or does not exist.

    Args:
        connection: an open connection.
        table: the table of the rows.
        trial_id: the trial's id.
        rows: at least one; all have the same columns.
        key: the column that identifies a row within the trial.
    """
    statement = _put(connection.dialect.name, table, key, tuple(rows[0]), len(rows))
    written = connection.execute(statement, {"of_trial": trial_id, **sql.numbered(rows)}).all()
    return len(written) == len(rows)  # SQLite's driver does not count rows that a WITH inserts


@cache
def _put(dialect: str, table: sa.Table, key: str, names: tuple[str, ...], count: int) -> Any:
    told = sql.told(dialect, {name: table.c[name].type for name in names}, count)
    source = (
        sa.select(trials.c.trial_id, *told.c)
        .select_from(trials.join(told, sa.true()))
        .where(trials.c.trial_id == sa.bindparam("of_trial"), trials.c.state.in_(UNFINISHED))
        .with_for_update(read=True, of=trials)  # on Postgres it waits for a concurrent end, and then sees it
    )
    insert = sql.overwriting(dialect, table, ["trial_id", *names], source, key=["trial_id", key])
    return insert.returning(table.c.trial_id)


# --- a whole trial, from a template -----------------------------------------------------------------------------------


def check_against(known: BaseDistribution | None, distribution: BaseDistribution) -> None:
    """Raise ValueError if a distribution is incompatible with the known one of the same parameter."""
    if known is not None:
        check_distribution_compatibility(known, distribution)


def put_values(connection: sa.Connection, trial_id: int, values: Sequence[float]) -> None:
    """Write a trial's values, by objective. Raises ValueError for a NaN."""
    if rows := _value_rows(trial_id, values):
        sql.upsert(connection, trial_values, *rows, key=["trial_id", "objective"])


def _value_rows(trial_id: int, values: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for objective, number in enumerate(values):
        if math.isnan(number):
            raise ValueError(f"the value of objective {objective} is NaN, which no trial can end with")
        value, kind = stored(float(number))
        rows.append(
            {"trial_id": trial_id, "objective": objective, "value": value, "value_type": getattr(VALUE_TYPE, kind.name)}
        )
    return rows


def insert_templates(connection: sa.Connection, study_id: int, templates: Sequence[FrozenTrial]) -> list[int]:
    """Insert trials in full, numbered from max + 1 on, and return their ids. The caller has the study locked.

    Raises ValueError for a distribution that the study's does not match, or for a value that is NaN.
    """
    if not templates:
        return []
    known: dict[str, BaseDistribution | None] = {}
    for template in templates:
        for name, distribution in template.distributions.items():
            if name not in known:
                known[name] = distribution_in(connection, study_id, name)
            check_against(known[name], distribution)
            known[name] = known[name] or distribution
    ids = _insert_rows(connection, study_id, templates)
    rows: dict[sa.Table, list[dict[str, Any]]] = {}
    for trial_id, template in zip(ids, templates, strict=True):
        for table, found in _child_rows(trial_id, template).items():
            rows.setdefault(table, []).extend(found)
    for table, found in rows.items():
        if found:
            connection.execute(table.insert(), found)
    return ids


def _insert_rows(connection: sa.Connection, study_id: int, templates: Sequence[FrozenTrial]) -> list[int]:
    of_study = trials.c.study_id == study_id
    highest = connection.execute(sa.select(sa.func.coalesce(sa.func.max(trials.c.number), -1)).where(of_study))
    first = int(highest.scalar_one()) + 1
    rows = [
        {
            "number": number,
            "study_id": study_id,
            "state": template.state,
            "datetime_start": as_utc(template.datetime_start),
            "datetime_complete": as_utc(template.datetime_complete),
        }
        for number, template in enumerate(templates, start=first)
    ]
    connection.execute(trials.insert(), rows)
    inserted = sa.select(trials.c.trial_id).where(of_study, trials.c.number >= first).order_by(trials.c.number)
    return list(connection.execute(inserted).scalars())


def _child_rows(trial_id: int, template: FrozenTrial) -> dict[sa.Table, list[dict[str, Any]]]:
    """Return what hangs on a trial, as rows by table."""
    params = [
        {
            "param_name": name,
            "param_value": choices.internal(template.distributions[name], value),
            "distribution_json": distribution_to_json(template.distributions[name]),
        }
        for name, value in template.params.items()
    ]
    reported = [
        {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        for step, number in template.intermediate_values.items()
        for value, kind in [stored(float(number))]
    ]
    hanging = {
        trial_params: params,
        trial_user_attributes: attribute_rows(template.user_attrs),
        trial_system_attributes: attribute_rows(template.system_attrs),
        intermediate_values: reported,
    }
    whole = {table: [{"trial_id": trial_id, **row} for row in rows] for table, rows in hanging.items()}
    return {trial_values: _value_rows(trial_id, template.values or []), **whole}


def attribute_rows(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return attributes as rows of Optuna's tables."""
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
