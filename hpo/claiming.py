"""How a worker comes by a trial: one that is parked, else the oldest queued one, else a new one that the budget allows.

One transaction under Optuna's own lock on the study: a trial's row, its lease and its place in the budget, or nothing.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.claim import Checkpoint, Claim
from hpo.db import sql, trialwrites
from hpo.db.tables import Hold, hpo_trials, living_row, running_ids, trial_system_attributes, trials, utc
from hpo.errors import StudyError
from hpo.ledger import Ledger, cut_back
from hpo.settling import write_stop

GRID_KEY = "grid_id"  # the system attribute in which Optuna's GridSampler keeps a trial's point


class Idle(Enum):
    """Why there is nothing to claim."""

    WAIT = "wait"  # others still run trials of ours, one of which may yet be parked; or the study is paused
    DONE = (
        "done"  # the budget is spent or the study stopped, and no trial of ours is RUNNING; or its failures stopped it
    )


def claim(ledger: Ledger) -> Claim | Idle:
    """Take up a trial; StudyError if the study was deleted meanwhile."""
    with sql.writing(ledger.engine) as connection:
        study = lock_study(connection, ledger)
        if study.hold not in (None, Hold.PAUSED):
            return Idle.DONE
        may_begin = study.stop_reason is None and study.spent < study.trials + study.imported
        if study.hold == Hold.PAUSED:
            return Idle.WAIT if may_begin or study.unfinished else Idle.DONE
        if study.parked and (taken := _take_over(connection, ledger)):
            return taken
        if may_begin:
            if begun := (study.queued and _queued(connection, ledger)) or _new(connection, ledger):
                _lease_out(connection, ledger, begun)
                return begun
            if not study.unfinished:
                write_stop(connection, ledger.uid, "every point of the grid was tried")
        return Idle.WAIT if study.unfinished else Idle.DONE


def lock_study(connection: sa.Connection, ledger: Ledger) -> Any:
    """Lock the study's row, as Optuna does for a new trial, and return our row with what is spent, queued, unfinished and
    parked; StudyError if it is gone.
    """
    trialwrites.lock_study(connection, ledger.study_id)
    row = living_row(connection, ledger.study_id, *_counts(), uid=ledger.uid)
    if row is None or row.uid != ledger.uid:
        raise StudyError("the study was deleted while this worker ran; start `hpo run` again to make a new one")
    return row


def _lease_out(connection: sa.Connection, ledger: Ledger, begun: Claim) -> None:
    row = {"study_uid": ledger.uid, "trial_id": begun.trial_id, "attempt": begun.attempt, "worker": ledger.worker}
    parameters = {**row, "settled": False, "lease_seconds": ledger.lease_seconds}
    connection.execute(_leased(connection.dialect.name), parameters)


@cache
def _leased(dialect: str) -> Any:
    return hpo_trials.insert().values(lease_until=sql.clock(dialect) + sa.bindparam("lease_seconds"))


# --- parked -----------------------------------------------------------------------------------------------------------


def _take_over(connection: sa.Connection, ledger: Ledger) -> Claim | None:
    row = connection.execute(
        sa.select(hpo_trials, trials.c.number)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == ledger.uid,
            hpo_trials.c.settled.is_(False),
            hpo_trials.c.lease_until.is_(None),
            # By this way round, since few trials run and many have.
            hpo_trials.c.trial_id.in_(running_ids(ledger.study_id)),
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


def _queued(connection: sa.Connection, ledger: Ledger) -> Claim | None:
    """Claim the oldest WAITING trial; a plain Optuna process may be after it too, so the state is checked by the write."""
    waiting = connection.execute(
        sa.select(trials.c.trial_id, trials.c.number)
        .where(trials.c.study_id == ledger.study_id, trials.c.state == TrialState.WAITING)
        .order_by(trials.c.number)
    ).all()
    for trial_id, number in waiting:
        if trialwrites.set_state(connection, trial_id, TrialState.RUNNING, once=(TrialState.WAITING,)):
            return Claim(trial_id=trial_id, number=number, attempt=1)
    return None


# --- new --------------------------------------------------------------------------------------------------------------


def _new(connection: sa.Connection, ledger: Ledger) -> Claim | None:
    """Insert a trial; None if the study is a grid of which every point is dealt out."""
    if ledger.grid_points is not None and _dealt(connection, ledger) >= ledger.grid_points:
        return None
    began = utc()
    trial_id, number = trialwrites.insert_trial(connection, ledger.study_id, started=began)
    return Claim(trial_id=trial_id, number=number, attempt=1, began=began)


@cache
def _counts() -> tuple[sa.ColumnElement[Any], ...]:
    """Return the columns that count a study's trials: in any state but WAITING, WAITING, and of ours unfinished, parked."""
    of_study = trials.c.study_id == sa.bindparam("of_study")
    unfinished = sa.and_(
        of_study,
        trials.c.state == TrialState.RUNNING,
        trials.c.trial_id == hpo_trials.c.trial_id,
        hpo_trials.c.study_uid == sa.bindparam("uid"),
        hpo_trials.c.settled.is_(False),
    )
    last = sa.select(sa.func.coalesce(sa.func.max(trials.c.number), -1)).where(of_study).scalar_subquery()
    queued = _count(of_study, trials.c.state == TrialState.WAITING)
    return (
        (last + 1 - queued).label("spent"),  # numbers have no gaps, and the index knows the last one
        queued.label("queued"),
        _count(unfinished).label("unfinished"),
        _count(unfinished, hpo_trials.c.lease_until.is_(None)).label("parked"),
    )


def _count(*which: sa.ColumnElement[bool]) -> Any:
    return sa.select(sa.func.count()).where(*which).scalar_subquery()


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
