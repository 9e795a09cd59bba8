"""What people order, as writes: hold or resume a study, end a trial or ask its worker to. The caller locks the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue import finish
from hpo.queue.rows import open_trials
from hpo.storage import sql, study_rows
from hpo.storage.tables import Hold, hpo_studies, hpo_trials, trials, utc


def pause(connection: sa.Connection, uid: str) -> None:
    """Make workers park their trials and wait. Nothing changes if something else holds the study."""
    of_study = sa.and_(hpo_studies.c.uid == uid, hpo_studies.c.hold.is_(None))
    connection.execute(hpo_studies.update().where(of_study).values(hold=Hold.PAUSED))
    study_rows.raise_orders(connection, uid)


def resume(connection: sa.Connection, uid: str) -> None:
    """Remove the study's hold, its stop reason and its streak of failures."""
    study_rows.update(connection, uid, hold=None, stop_reason=None, streak=0)
    study_rows.raise_orders(connection, uid)


def hold_as_copied(connection: sa.Connection, uid: str, where: str) -> None:
    """Let nobody work on a study that goes on elsewhere. Its copy keeps the reason for which it was stopped before."""
    reason = sql.storable(f"copied to {where}")
    study_rows.update(connection, uid, hold=Hold.COPIED, stop_reason=reason)


def lock_open(connection: sa.Connection, uid: str, study_id: int) -> Sequence[Any]:
    """Lock and return our rows of the leased and the parked trials."""
    found = open_trials(uid, study_id).order_by(hpo_trials.c.trial_id).with_for_update(of=hpo_trials)
    return connection.execute(found).all()


def numbered(connection: sa.Connection, study_id: int, number: int) -> Any:
    """Return Optuna's row of the trial with this number; None if there is none."""
    of_number = sa.select(trials).where(trials.c.study_id == study_id, trials.c.number == number)
    return connection.execute(of_number).one_or_none()


def with_id(connection: sa.Connection, trial_id: int) -> Any:
    """Return Optuna's row of the trial with this id; None if there is none."""
    return connection.execute(sa.select(trials).where(trials.c.trial_id == trial_id)).one_or_none()


def end(connection: sa.Connection, row: Any) -> bool:
    """End a parked trial, or ask the worker that holds it to. Return whether the trial has ended."""
    if row.lease_until is None:
        return finish.end_as_stopped(connection, row)
    connection.execute(
        hpo_trials.update()
        .where(hpo_trials.c.study_uid == row.study_uid, hpo_trials.c.trial_id == row.trial_id)
        .values(stop_requested=True)
    )
    study_rows.raise_orders(connection, row.study_uid)
    return False


def fail_unheld(connection: sa.Connection, trial: Any, state: TrialState) -> bool:
    """Set a trial that no worker of ours holds to FAIL. Return False if it is no longer in `state`."""
    failed = connection.execute(
        trials.update()
        .where(trials.c.trial_id == trial.trial_id, trials.c.state == state)
        .values(state=TrialState.FAIL, datetime_complete=utc())
    )
    return failed.rowcount == 1
