"""How a worker comes by a trial: one that is parked, else the oldest queued one, else a new one that the budget allows.

One transaction under Optuna's own lock on the study: a trial's row, its lease and its place in the budget, or nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import storage
from hpo.errors import StudyError
from hpo.ledger import Checkpoint, Claim, Ledger, cut_back
from hpo.settling import write_stop
from hpo.tables import Hold, hpo_trials, living_row, studies, trial_system_attributes, trials, utc

GRID_KEY = "grid_id"  # the system attribute in which Optuna's GridSampler keeps a trial's point


class Idle(Enum):
    """Why there is nothing to claim."""

    WAIT = "wait"  # others still run trials of ours, one of which may yet be parked; or the study is paused
    DONE = (
        "done"  # the budget is spent or the study stopped, and no trial of ours is RUNNING; or its failures stopped it
    )


def claim(ledger: Ledger) -> Claim | Idle:
    """Take up a trial; StudyError if the study was deleted meanwhile."""
    with storage.writing(ledger.engine) as connection:
        study = lock_study(connection, ledger)
        if study.hold not in (None, Hold.PAUSED):
            return Idle.DONE
        may_begin = study.stop_reason is None and _spent(connection, ledger) < study.trials + study.imported
        if study.hold == Hold.PAUSED:
            return Idle.WAIT if may_begin or _running(connection, ledger) else Idle.DONE
        if taken := _take_over(connection, ledger):
            return taken
        if may_begin:
            if found := _queued(connection, ledger) or _new(connection, ledger):
                return _lease_out(connection, ledger, *found)
            if not _running(connection, ledger):
                write_stop(connection, ledger.uid, "every point of the grid was tried")
        return Idle.WAIT if _running(connection, ledger) else Idle.DONE


def lock_study(connection: sa.Connection, ledger: Ledger) -> Any:
    """Lock the study's row, as Optuna does for a new trial, and return our row; StudyError if it is gone."""
    connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == ledger.study_id).with_for_update())
    row = living_row(connection, ledger.study_id)
    if row is None or row.uid != ledger.uid:
        raise StudyError("the study was deleted while this worker ran; start `hpo run` again to make a new one")
    return row


def _lease_out(connection: sa.Connection, ledger: Ledger, trial_id: int, number: int) -> Claim:
    connection.execute(
        hpo_trials.insert().values(
            study_uid=ledger.uid,
            trial_id=trial_id,
            attempt=1,
            settled=False,
            worker=ledger.worker,
            lease_until=ledger.lease(connection),
        )
    )
    return Claim(trial_id=trial_id, number=number, attempt=1)


# --- parked -----------------------------------------------------------------------------------------------------------


def _take_over(connection: sa.Connection, ledger: Ledger) -> Claim | None:
    row = connection.execute(
        sa.select(hpo_trials, trials.c.number)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == ledger.uid,
            hpo_trials.c.settled.is_(False),
            hpo_trials.c.lease_until.is_(None),
            trials.c.state == TrialState.RUNNING,
        )
        .order_by(trials.c.number)
        .limit(1)
        .with_for_update(of=hpo_trials, skip_locked=True)
    ).one_or_none()
    if row is None:
        return None
    connection.execute(
        hpo_trials.update()
        .where(hpo_trials.c.study_uid == ledger.uid, hpo_trials.c.trial_id == row.trial_id)
        .values(attempt=row.attempt + 1, worker=ledger.worker, lease_until=ledger.lease(connection))
    )
    cut_back(connection, row)
    checkpoint = None
    if row.checkpoint_epoch is not None:
        checkpoint = Checkpoint(epoch=row.checkpoint_epoch, path=row.checkpoint_path, digest=row.checkpoint_digest)
    return Claim(
        trial_id=row.trial_id,
        number=row.number,
        attempt=row.attempt + 1,
        checkpoint=checkpoint,
        accumulation=row.accumulation,
    )


# --- queued -----------------------------------------------------------------------------------------------------------


def _queued(connection: sa.Connection, ledger: Ledger) -> tuple[int, int] | None:
    """Claim the oldest WAITING trial; a plain Optuna process may be after it too, so the state is checked by the write."""
    waiting = connection.execute(
        sa.select(trials.c.trial_id, trials.c.number)
        .where(trials.c.study_id == ledger.study_id, trials.c.state == TrialState.WAITING)
        .order_by(trials.c.number)
    ).all()
    for trial_id, number in waiting:
        claimed = connection.execute(
            trials.update()
            .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
            .values(state=TrialState.RUNNING, datetime_start=utc())
        )
        if claimed.rowcount == 1:
            return trial_id, number
    return None


# --- new --------------------------------------------------------------------------------------------------------------


def _new(connection: sa.Connection, ledger: Ledger) -> tuple[int, int] | None:
    """Insert a trial numbered max + 1: safe under the study's lock, since trial rows are never deleted.

    None if the study is a grid of which every point is dealt out.
    """
    if ledger.grid_points is not None and _dealt(connection, ledger) >= ledger.grid_points:
        return None
    last = connection.execute(
        sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == ledger.study_id)
    ).scalar_one()
    number = 0 if last is None else last + 1
    inserted = connection.execute(
        trials.insert().values(number=number, study_id=ledger.study_id, state=TrialState.RUNNING, datetime_start=utc())
    )
    primary_key = inserted.inserted_primary_key
    assert primary_key is not None
    return primary_key[0], number


def _spent(connection: sa.Connection, ledger: Ledger) -> int:
    rows = sa.select(sa.func.count()).where(trials.c.study_id == ledger.study_id, trials.c.state != TrialState.WAITING)
    return int(connection.execute(rows).scalar_one())


def _running(connection: sa.Connection, ledger: Ledger) -> int:
    rows = (
        sa.select(sa.func.count())
        .select_from(hpo_trials.join(trials, trials.c.trial_id == hpo_trials.c.trial_id))
        .where(
            hpo_trials.c.study_uid == ledger.uid,
            hpo_trials.c.settled.is_(False),
            trials.c.state == TrialState.RUNNING,
        )
    )
    return int(connection.execute(rows).scalar_one())


def _dealt(connection: sa.Connection, ledger: Ledger) -> int:
    """Count the grid points that a trial has or is about to get: Optuna deals a point out again while it runs."""
    of_study = trials.join(trial_system_attributes, trial_system_attributes.c.trial_id == trials.c.trial_id)
    points = (
        sa.select(sa.func.count(sa.distinct(trial_system_attributes.c.value_json)))
        .select_from(of_study)
        .where(trials.c.study_id == ledger.study_id, trial_system_attributes.c.key == GRID_KEY)
    )
    has_point = sa.exists().where(
        trial_system_attributes.c.trial_id == hpo_trials.c.trial_id, trial_system_attributes.c.key == GRID_KEY
    )
    about_to = (
        sa.select(sa.func.count())
        .select_from(hpo_trials)
        .where(hpo_trials.c.study_uid == ledger.uid, hpo_trials.c.settled.is_(False), ~has_point)
    )
    return int(connection.execute(points).scalar_one()) + int(connection.execute(about_to).scalar_one())
