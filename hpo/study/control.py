"""What a person orders: stop a study or one trial, pause or resume a study, end or park a trial that a worker lost."""

from __future__ import annotations

from typing import Any

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import commands, finish, lease_clock, limits
from hpo.spec import budget
from hpo.storage import sql, study_rows
from hpo.storage.connect import Storage
from hpo.storage.tables import Hold
from hpo.study.format import STATES
from hpo.study.study import Study
from hpo.text import command


def stop(study: Study, *, now: bool = False) -> int:
    """Let the study start no new trial. Return how many of our trials are still open.

    Args:
        study: the study.
        now: also end the open trials. Parked ones end at once, running ones at their next batch or report.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        found = commands.lock_open(connection, study.uid, study.study_id)
        if now:
            for row in found:
                commands.end(connection, row)
        finish.write_stop(connection, study.uid, finish.BY_HAND)
        return len(commands.lock_open(connection, study.uid, study.study_id))


def stop_trial(study: Study, number: int) -> bool:
    """End one trial. Return whether it has ended already; else it ends at its next batch or report.

    A queued trial becomes FAIL. Raises StudyError if the trial is finished, foreign, or does not exist.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        row = _ours(connection, study, trial)
        if row is not None:
            return commands.end(connection, row)
        if trial.state == TrialState.RUNNING:
            raise StudyError(
                f"trial {number} of study {study.name!r} was started by another program than hpo; end that one, or "
                f"`{command('doctor', study.name, options=f'--fail {number}')}`"
            )
        if not commands.fail_unheld(connection, trial, TrialState.WAITING):
            raise StudyError(f"trial {number} of study {study.name!r} is {STATES[trial.state.name.lower()]} already")
        return True


def fail_foreign(study: Study, number: int) -> None:
    """Set a foreign RUNNING trial to FAIL. Raises StudyError if it is ours or not RUNNING."""
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        if _ours(connection, study, trial) is not None:
            raise StudyError(
                f"trial {number} of study {study.name!r} is ours; `{command('stop', study.name, options=f'--trial {number}')}`"
            )
        if not commands.fail_unheld(connection, trial, TrialState.RUNNING):
            raise StudyError(
                f"trial {number} of study {study.name!r} does not run: it is {STATES[trial.state.name.lower()]}"
            )


def fail_by_id(place: Storage, trial_id: int) -> TrialState | None:
    """Set a trial of any study to FAIL, for a person at the dashboard. Return its state before, None if there is no such trial.

    A trial that has ended keeps its state. A worker that has the trial drops it at its next report.
    """
    has_ours = study_rows.has_ours(place.engine)
    with sql.writing(place.engine) as connection:
        found = commands.with_id(connection, trial_id)
        study = study_rows.lock_and_read(connection, found.study_id) if found and has_ours else None
        trial = found and commands.with_id(connection, trial_id)  # as it is under the lock
        if trial is None:
            return None
        rows = commands.lock_open(connection, study.uid, trial.study_id) if study else []
        row = next((row for row in rows if row.trial_id == trial_id), None)
        if row is not None:
            finish.end_as_failed(connection, row)
        elif not trial.state.is_finished():
            commands.fail_unheld(connection, trial, trial.state)
        state: TrialState = trial.state
        return state


def release(study: Study, number: int) -> None:
    """Park a trial whose lease is by the clock of another machine. A person must know that the machine is gone.

    Raises StudyError if the trial has no such lease.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        row = _ours(connection, study, trial)
        if row is None or not lease_clock.is_elsewhere(row.lease_clock):
            raise StudyError(
                f"trial {number} of study {study.name!r} is not held by another machine; "
                "a lease of this machine expires by itself"
            )
        finish.release(connection, row)


def pause(study: Study) -> None:
    """Let workers park their trials and wait. Raises StudyError if the study is on hold for another reason."""
    with sql.writing(study.storage.engine) as connection:
        row = _living(connection, study)
        if row.hold not in (None, Hold.PAUSED):
            raise StudyError(f"study {study.name!r} has stopped already: {row.stop_reason}")
        commands.pause(connection, study.uid)


def hold_as_copied(study: Study, where: str) -> None:
    """Let nobody work on a study of which a copy goes on elsewhere. `resume` undoes it.

    Args:
        study: the study.
        where: the storage of the copy, without secrets.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        commands.hold_as_copied(connection, study.uid, where)


def resume(study: Study) -> str | None:
    """Resume a paused or stopped study. Return what had stopped it, None if nothing had.

    Raises StudyError if a fork is still being copied into it, or if a limit of its budget is spent.
    """
    with sql.writing(study.storage.engine) as connection:
        row = _living(connection, study)
        if row.hold == Hold.FORKING:
            raise StudyError(f"study {study.name!r}: {row.stop_reason}")
        commands.resume(connection, study.uid)
        if spent := limits.enforce(connection, study_rows.lock_and_read(connection, study.study_id)):
            raise StudyError(f"study {study.name!r}: {limits.reason(spent)}; {budget.MEND}")
        return f"stopped: {row.stop_reason}" if row.stop_reason else row.hold and str(row.hold)


def _living(connection: sql.Connection, study: Study) -> Any:
    """Lock the study, so that no trial is claimed meanwhile, and return its row of ours."""
    row = study_rows.lock_and_read(connection, study.study_id)
    if row is None or row.uid != study.uid:
        raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
    return row


def _numbered(connection: sql.Connection, study: Study, number: int) -> Any:
    row = commands.numbered(connection, study.study_id, number)
    if row is None:
        raise StudyError(
            f"study {study.name!r} has no trial {number}; `{command('status', study.name)}` lists those that run"
        )
    return row


def _ours(connection: sql.Connection, study: Study, trial: Any) -> Any:
    """Return the locked row of a running or parked trial, None if the trial is foreign or has ended."""
    ours = commands.lock_open(connection, study.uid, study.study_id)
    return next((row for row in ours if row.trial_id == trial.trial_id), None)
