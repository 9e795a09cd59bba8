"""Finds, locks, makes and changes our row of a study and Optuna's rows beside it. Optuna need not be loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.storage import sql
from hpo.storage.tables import (
    UID_KEY,
    hpo_studies,
    hpo_test_openings,
    hpo_trials,
    intermediate_values,
    metadata,
    missing,
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_heartbeats,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)

# --- found ------------------------------------------------------------------------------------------------------------


def living_row(
    connection: sa.Connection, study_id: int, *more: sa.ColumnElement[Any], **parameters: Any
) -> sa.Row[Any] | None:
    """Return our row of a study without `orders`, None if it has none or only a dead one (see `tables`).

    Args:
        connection: an open connection.
        study_id: the study's id.
        more: further columns to return. The statement is cached by them, so they must be the same objects in each call.
        parameters: the parameters of these columns.
    """
    return connection.execute(_living(*more), {"of_study": study_id, **parameters}).one_or_none()


@cache
def _living(*more: sa.ColumnElement[Any]) -> Any:
    kept = [column for column in hpo_studies.c if column is not hpo_studies.c.orders]  # readers may lack it
    return (
        sa.select(*kept, *more)
        .join(study_user_attributes, study_user_attributes.c.study_id == hpo_studies.c.study_id)
        .where(
            hpo_studies.c.study_id == sa.bindparam("of_study"),
            study_user_attributes.c.key == UID_KEY,
            study_user_attributes.c.value_json == sa.literal('"').concat(hpo_studies.c.uid).concat('"'),
        )
    )


def look_up(engine: sa.Engine, name: str) -> tuple[int | None, Any]:
    """Return a study's id, None if it does not exist, and our row of it, None if it is not ours."""
    is_shared = has_ours(engine)
    with engine.connect() as connection:
        study_id = id_of(connection, name)
        return study_id, living_row(connection, study_id) if is_shared and study_id is not None else None


def id_of(connection: sa.Connection, name: str) -> int | None:
    """Return a study's id, None if it does not exist."""
    found = sa.select(studies.c.study_id).where(studies.c.study_name == name)
    study_id: int | None = connection.execute(found).scalar_one_or_none()
    return study_id


def our_names(engine: sa.Engine) -> list[str]:
    """Return the names of the studies that `hpo` made, the oldest first."""
    if not has_ours(engine):
        return []
    with engine.connect() as connection:
        rows = connection.execute(_by_age(studies.c.study_name, studies.c.study_id)).all()
        return [row.study_name for row in rows if living_row(connection, row.study_id) is not None]


def all_names(engine: sa.Engine) -> list[str]:
    """Return the names of all studies, those that Optuna made included, the oldest first."""
    with engine.connect() as connection:
        return list(connection.execute(_by_age(studies.c.study_name)).scalars())


def has_ours(engine: sa.Engine) -> bool:
    """Return whether our tables exist. A storage that only Optuna has used has none."""
    return sa.inspect(engine).has_table(hpo_studies.name)


def _by_age(*columns: sa.Column[Any]) -> sa.Select[Any]:
    return sa.select(*columns).order_by(studies.c.study_id)


def count_trials(connection: sa.Connection, study_id: int, *, begun: bool = False) -> int:
    """Count a study's trials.

    Args:
        connection: an open connection.
        study_id: the study's id.
        begun: leave out WAITING trials.
    """
    counted = sa.select(sa.func.count()).where(trials.c.study_id == study_id)
    return int(connection.execute(counted.where(trials.c.state != "WAITING") if begun else counted).scalar_one())


def count_running(connection: sa.Connection, study_id: int, uid: str | None) -> tuple[int, int]:
    """Count a study's RUNNING trials: those of ours, and those of other programs."""
    ours = sa.exists().where(
        hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == uid, sa.not_(hpo_trials.c.settled)
    )
    running = sa.select(sa.func.count()).where(trials.c.study_id == study_id, trials.c.state == "RUNNING")
    every = int(connection.execute(running).scalar_one())
    own = 0 if uid is None else int(connection.execute(running.where(ours)).scalar_one())
    return own, every - own


def open_checkpoints(connection: sa.Connection, uid: str) -> Sequence[Any]:
    """Return (number, checkpoint_path, checkpoint_digest) of the trials of a study of ours that go on from a checkpoint."""
    columns = hpo_trials.c
    found = (
        sa.select(trials.c.number, columns.checkpoint_path, columns.checkpoint_digest)
        .join(trials, trials.c.trial_id == columns.trial_id)
        .where(columns.study_uid == uid, sa.not_(columns.settled), columns.checkpoint_path.is_not(None))
        .order_by(trials.c.number)
    )
    return connection.execute(found).all()


def count_open_checkpoints(engine: sa.Engine, uid: str) -> int:
    """Count the trials of a study of ours that are to go on from a checkpoint."""
    columns = hpo_trials.c
    counted = sa.select(sa.func.count()).where(
        columns.study_uid == uid, sa.not_(columns.settled), columns.checkpoint_path.is_not(None)
    )
    with engine.connect() as connection:
        return int(connection.execute(counted).scalar_one())


# --- locked, made, changed --------------------------------------------------------------------------------------------


def lock(connection: sa.Connection, study_id: int) -> bool:
    """Lock a study's row, as Optuna does for a new trial. Return False if there is none."""
    return connection.execute(_lock(), {"study_id": study_id}).one_or_none() is not None


@cache
def _lock() -> Any:
    return sa.select(studies.c.study_id).where(studies.c.study_id == sa.bindparam("study_id")).with_for_update()


def lock_and_read(connection: sa.Connection, study_id: int) -> Any:
    """Lock a study, so that no trial is claimed meanwhile. Return our row of it as `living_row` does."""
    lock(connection, study_id)
    return living_row(connection, study_id)


def insert(
    connection: sa.Connection,
    study_id: int,
    row: Mapping[str, Any],
    *,
    user_attributes: Mapping[str, Any],
    system_attributes: Mapping[str, Any],
) -> None:
    """Insert our row and attributes for a study that Optuna made.

    Args:
        connection: an open transaction.
        study_id: the study's id.
        row: the values of our columns.
        user_attributes: new user attributes of the study.
        system_attributes: system attributes to insert or overwrite.
    """
    connection.execute(hpo_studies.insert().values(study_id=study_id, **row))
    connection.execute(study_user_attributes.insert(), _attributes(study_id, user_attributes))
    if system_attributes:
        sql.upsert(
            connection, study_system_attributes, *_attributes(study_id, system_attributes), key=["study_id", "key"]
        )


def _attributes(study_id: int, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in values.items()]


def set_user_attributes(connection: sa.Connection, study_id: int, values: Mapping[str, Any]) -> None:
    """Insert or overwrite user attributes of a study."""
    if values:
        sql.upsert(connection, study_user_attributes, *_attributes(study_id, values), key=["study_id", "key"])


def user_attributes(connection: sa.Connection, study_id: int) -> dict[str, Any]:
    """Return the user attributes of a study."""
    attribute = study_user_attributes.c
    found = sa.select(attribute.key, attribute.value_json).where(attribute.study_id == study_id)
    return {key: json.loads(text) for key, text in connection.execute(found)}


def update(connection: sa.Connection, uid: str, **values: Any) -> None:
    """Set columns of our row of a study."""
    connection.execute(hpo_studies.update().where(hpo_studies.c.uid == uid).values(**values))


def raise_orders(connection: sa.Connection, uid: str) -> None:
    """Let the workers of a study read again what is ordered, and which of their claims stand."""
    update(connection, uid, orders=hpo_studies.c.orders + 1)


# --- deleted ----------------------------------------------------------------------------------------------------------

_OF_TRIAL = (
    trial_heartbeats,
    intermediate_values,
    trial_values,
    trial_params,
    trial_user_attributes,
    trial_system_attributes,
)
_OF_STUDY = (trials, study_user_attributes, study_system_attributes, study_directions, studies)


def delete(connection: sa.Connection, study_id: int) -> None:
    """Delete a study that is locked from Optuna's tables. Our rows of it are dead then."""
    of_study = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id)
    for table in (hpo_trials, trials):  # in the order in which reports lock them; they find the study gone then
        locked = sa.select(table.c.trial_id).where(table.c.trial_id.in_(of_study)).order_by(table.c.trial_id)
        connection.execute(locked.with_for_update())
    for table in _OF_TRIAL:
        connection.execute(table.delete().where(table.c.trial_id.in_(of_study)))
    for table in _OF_STUDY:
        connection.execute(table.delete().where(table.c.study_id == study_id))


def delete_dead(connection: sa.Connection, uid: str) -> None:
    """Delete our rows of a study that Optuna has deleted. Nothing happens if the study lives."""
    found = connection.execute(sa.select(hpo_studies.c.study_id).where(hpo_studies.c.uid == uid)).scalar_one_or_none()
    row = None if found is None else living_row(connection, found)
    if row is None or row.uid != uid:
        delete_ours(connection, uid)


def delete_ours(connection: sa.Connection, uid: str) -> None:
    """Delete our rows of a study, and of its trials."""
    for table in reversed(metadata.sorted_tables):
        key = table.c.uid if table is hpo_studies else table.c.study_uid
        connection.execute(table.delete().where(key == uid))


# --- openings of the test split ---------------------------------------------------------------------------------------


def announce_opening(engine: sa.Engine, study_id: int, **which: Any) -> None:
    """Record that a test split is opened now.

    Args:
        engine: the engine.
        study_id: the study's id.
        which: study_uid, trial_number and folder of the training; opened_by, trainings and trials_tried.
    """
    lacking = {column.name for column in missing(engine)}
    with sql.writing(engine) as connection:
        opened = {"study_id": study_id, "opened_at": sql.now(connection), **which}
        opened = {key: value for key, value in opened.items() if key not in lacking}
        connection.execute(hpo_test_openings.insert().values(opened))


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One opening of a study's test split. Older ones have neither a person nor a number of trainings or trials."""

    trial_number: int | None  # whose config was trained
    folder: str
    opened_at: float  # seconds since 1970
    opened_by: str | None  # user@host
    trainings: int | None  # models that were tested
    trials_tried: int | None  # from which the config was chosen


def openings(connection: sa.Connection, uid: str) -> list[Opening]:
    """Return the openings of a study's test split, the oldest first."""
    lacking = {column.name for column in missing(connection.engine)}
    names = [field.name for field in fields(Opening)]
    columns = [sa.null().label(name) if name in lacking else hpo_test_openings.c[name] for name in names]
    found = sa.select(*columns).where(hpo_test_openings.c.study_uid == uid).order_by(hpo_test_openings.c.opening_id)
    return [Opening(**row) for row in connection.execute(found).mappings()]


def complete_opening(engine: sa.Engine, metrics: Mapping[str, float], **which: Any) -> None:
    """Record the result of a training's latest opening that has no result yet.

    Args:
        engine: the engine.
        metrics: the result, by metric.
        which: study_uid, trial_number and folder of the training.
    """
    latest = sa.select(sa.func.max(hpo_test_openings.c.opening_id)).where(
        *(hpo_test_openings.c[key] == value for key, value in which.items()), hpo_test_openings.c.metrics.is_(None)
    )
    with sql.writing(engine) as connection:
        connection.execute(
            hpo_test_openings.update()
            .where(hpo_test_openings.c.opening_id == latest.scalar_subquery())
            .values(metrics=json.dumps(metrics))
        )
