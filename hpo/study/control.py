"""What people order: stop a study or one trial of it, pause it, go on, end a trial that is not ours."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import finish, lease_clock
from hpo.storage import sql
from hpo.storage.tables import Hold, hpo_studies, hpo_trials, living_row, studies, trials, utc
from hpo.study.format import STATES
from hpo.study.study import Study
from hpo.text import command


def stop(study: Study, *, now: bool = False) -> int:
    """Start no new trial from now on; return how many trials of ours are still open.

    Args:
        now: end those too: parked ones at once, running ones at their next batch or report.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        found = _open(connection, study)
        if now:
            for row in found:
                _end(connection, row)
        finish.write_stop(connection, study.uid, finish.BY_HAND)
        return len(_open(connection, study))


def stop_trial(study: Study, number: int) -> bool:
    """End one trial; return whether it has ended, or will at its next batch or report.

    A queued trial becomes FAIL. StudyError if it is finished, not there, or not ours.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        row = next((row for row in _open(connection, study) if row.trial_id == trial.trial_id), None)
        if row is not None:
            return _end(connection, row)
        if trial.state == TrialState.RUNNING:
            raise StudyError(
                f"trial {number} of study {study.name!r} was started by another program than hpo; end that one, or "
                f"`{command('doctor', study.name, options=f'--fail {number}')}`"
            )
        if not _fail_plain(connection, trial, TrialState.WAITING):
            raise StudyError(f"trial {number} of study {study.name!r} is {STATES[trial.state.name.lower()]} already")
        return True


def fail_foreign(study: Study, number: int) -> None:
    """Make a RUNNING trial that is not ours FAIL; StudyError if it is ours, or not RUNNING."""
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        if any(row.trial_id == trial.trial_id for row in _open(connection, study)):
            raise StudyError(
                f"trial {number} of study {study.name!r} is ours; `{command('stop', study.name, options=f'--trial {number}')}`"
            )
        if not _fail_plain(connection, trial, TrialState.RUNNING):
            raise StudyError(
                f"trial {number} of study {study.name!r} does not run: it is {STATES[trial.state.name.lower()]}"
            )


def release(study: Study, number: int) -> None:
    """Park a trial that is held by the clock of another machine, since a person knows that this one is gone; StudyError if
    it is not held so.
    """
    with sql.writing(study.storage.engine) as connection:
        _living(connection, study)
        trial = _numbered(connection, study, number)
        row = next((row for row in _open(connection, study) if row.trial_id == trial.trial_id), None)
        if row is None or not lease_clock.is_elsewhere(row.lease_clock):
            raise StudyError(
                f"trial {number} of study {study.name!r} is not held by another machine: a lease of this one runs out by itself"
            )
        finish.release(connection, row)


def pause(study: Study) -> None:
    """Let workers park what they run and wait; StudyError if the study starts nothing anyway."""
    with sql.writing(study.storage.engine) as connection:
        row = _living(connection, study)
        if row.hold not in (None, Hold.PAUSED):
            raise StudyError(f"study {study.name!r} has stopped already: {row.stop_reason}")
        connection.execute(_of(study).where(hpo_studies.c.hold.is_(None)).values(hold=Hold.PAUSED))


def resume(study: Study) -> str | None:
    """Go on with a study that was paused or stopped; return what had stopped it, None if nothing had."""
    with sql.writing(study.storage.engine) as connection:
        row = _living(connection, study)
        if row.hold == Hold.FORKING:
            raise StudyError(f"study {study.name!r}: {row.stop_reason}")
        connection.execute(_of(study).values(hold=None, stop_reason=None, streak=0))
        return f"stopped: {row.stop_reason}" if row.stop_reason else row.hold and str(row.hold)


def _living(connection: sa.Connection, study: Study) -> Any:
    """Lock the study, so that no trial is claimed meanwhile, and return our row of it."""
    connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == study.study_id).with_for_update())
    row = living_row(connection, study.study_id)
    if row is None or row.uid != study.uid:
        raise StudyError(f"study {study.name!r} was deleted")
    return row


def _of(study: Study) -> sa.Update:
    return hpo_studies.update().where(hpo_studies.c.uid == study.uid)


def _open(connection: sa.Connection, study: Study) -> list[Any]:
    """Return our rows, locked, of the trials that run or are parked."""
    found = connection.execute(
        sa.select(hpo_trials)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == study.uid,
            hpo_trials.c.settled.is_(False),
            trials.c.state == TrialState.RUNNING,
        )
        .order_by(hpo_trials.c.trial_id)
        .with_for_update(of=hpo_trials)
    )
    return list(found)


def _numbered(connection: sa.Connection, study: Study, number: int) -> Any:
    row = connection.execute(
        sa.select(trials).where(trials.c.study_id == study.study_id, trials.c.number == number)
    ).one_or_none()
    if row is None:
        raise StudyError(
            f"study {study.name!r} has no trial {number}; `{command('status', study.name)}` lists those that run"
        )
    return row


def _end(connection: sa.Connection, row: Any) -> bool:
    """End a parked trial, or ask the worker that holds it; return whether it has ended."""
    if row.lease_until is None:
        return finish.end_as_stopped(connection, row)
    connection.execute(
        hpo_trials.update()
        .where(hpo_trials.c.study_uid == row.study_uid, hpo_trials.c.trial_id == row.trial_id)
        .values(stop_requested=True)
    )
    return False


def _fail_plain(connection: sa.Connection, trial: Any, state: TrialState) -> bool:
    failed = connection.execute(
        trials.update()
        .where(trials.c.trial_id == trial.trial_id, trials.c.state == state)
        .values(state=TrialState.FAIL, datetime_complete=utc())
    )
    return failed.rowcount == 1
