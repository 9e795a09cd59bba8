"""Rows of trials: their state, value and checkpoint, one by one or as they ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hpo.errors import StudyError
from hpo.queue import lease_clock
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    FINISHED,
    hpo_curves,
    hpo_trials,
    intermediate_values,
    restored,
    trial_values,
    trials,
)
from hpo.study import program_folder
from hpo.study.study import Study

STATE = sa.type_coerce(trials.c.state, sa.String).label("state")  # a string: Optuna need not be loaded
#: The first columns of every select of trials with their values.
OF_TRIAL = (trials.c.trial_id, trials.c.number, STATE, trial_values.c.value, trial_values.c.value_type)
SECONDS = "seconds"  # the raw metric that holds the seconds of each epoch


def with_ours(study: Study) -> sa.Join:
    """Join trials with our rows. Our columns are NULL for a foreign trial."""
    return sa.outerjoin(
        trials, hpo_trials, sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid)
    )


def with_value(study: Study) -> sa.Join:
    """Join trials with our rows and the values of the first objective. Missing ones are NULL."""
    return with_ours(study).outerjoin(
        trial_values, sa.and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0)
    )


def trial(connection: sa.Connection, study: Study, number: int) -> Any:
    """Return one trial's row, whatever its state; None if no trial has this number."""
    return connection.execute(
        sa.select(
            *OF_TRIAL,
            hpo_trials.c.outcome,
            hpo_trials.c.reason,
            hpo_trials.c.attempt,
            hpo_trials.c.worker,
            hpo_trials.c.checkpoint_path,
            lease_clock.is_live(connection.dialect.name).label("live"),
            _epochs(),
            _reports(),
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id, trials.c.number == number)
    ).one_or_none()


def ended(connection: sa.Connection, study: Study, ids: Sequence[int]) -> list[Any]:
    """Return rows of ended trials, each with what one line about it shows."""
    found = sa.select(
        *OF_TRIAL,
        trials.c.datetime_start,
        trials.c.datetime_complete,
        hpo_trials.c.outcome,
        _epochs(),
        _reports(),
        trained_seconds(study),
    ).select_from(with_value(study))
    return [row for chunk in chunks(ids) for row in connection.execute(found.where(trials.c.trial_id.in_(chunk)))]


def settled(connection: sa.Connection, study: Study, numbers: Collection[int]) -> set[int]:
    """Return the numbers of those of these trials that are settled."""
    ours = sa.select(trials.c.number).join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
    return set(
        connection.execute(
            ours.where(
                hpo_trials.c.study_uid == study.uid,
                hpo_trials.c.settled.is_(True),
                trials.c.study_id == study.study_id,
                trials.c.number.in_(numbers),
            )
        ).scalars()
    )


def _epochs() -> sa.Label[int | None]:
    """Return a column with the last step that a trial reported, NULL if it reported none."""
    last = sa.select(sa.func.max(intermediate_values.c.step)).where(intermediate_values.c.trial_id == trials.c.trial_id)
    return last.correlate(trials).scalar_subquery().label("epochs")


def _reports() -> sa.Label[int]:
    """Return a column with the number of steps that a trial reported."""
    count = sa.select(sa.func.count()).where(intermediate_values.c.trial_id == trials.c.trial_id)
    return count.correlate(trials).scalar_subquery().label("reports")


def trained_seconds(study: Study) -> sa.Label[float | None]:
    """Return a column with a trial's seconds in training, without parked time. NULL if no epoch was timed."""
    of_trial = sa.and_(
        hpo_curves.c.study_uid == study.uid,
        hpo_curves.c.trial_id == trials.c.trial_id,
        hpo_curves.c.metric == SECONDS,
    )
    total = sa.select(sa.func.sum(hpo_curves.c.value)).where(of_trial).correlate(trials)
    return total.scalar_subquery().label("trained_seconds")


def seconds_trained(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, float | None]:
    """Return {trial id: seconds in training}, None for a trial without a timed epoch."""
    timed = sa.select(trials.c.trial_id, trained_seconds(study))
    return {
        row.trial_id: row.trained_seconds
        for chunk in chunks(ids)
        for row in connection.execute(timed.where(trials.c.trial_id.in_(chunk)))
    }


def count_finished(connection: sa.Connection, study: Study) -> int:
    """Count the trials that have ended."""
    ended = sa.select(sa.func.count()).where(trials.c.study_id == study.study_id, trials.c.state.in_(FINISHED))
    return int(connection.execute(ended).scalar_one())


def last_number(connection: sa.Connection, study: Study) -> int | None:
    """Return the highest trial number of a study, None if it has no trial."""
    last = sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == study.study_id)
    found: int | None = connection.execute(last).scalar_one()
    return found


def no_such_trial(connection: sa.Connection, study: Study, number: int) -> StudyError:
    """Return the error for a trial number that a study does not have."""
    last = last_number(connection, study)
    known = "it has none yet" if last is None else f"its trials are 0 to {last}"
    return StudyError(f"study {study.name!r} has no trial {number}; {known}")


def state_of(row: Any) -> str:
    """Return the state of a row's trial: Optuna's in lower case, but for a RUNNING one running, parked or foreign."""
    if row.state != "RUNNING":
        return str(row.state.lower())
    if row.attempt is None:
        return "foreign"
    return "running" if row.live else "parked"


def value_of(row: Any) -> float:
    """Return the value of a row as a float, which may be infinite."""
    return restored(row.value, row.value_type)


def timestamp(moment: datetime | None) -> float:
    """Return the seconds since 1970 of a stored time (UTC without a zone). A missing time is now."""
    return moment.replace(tzinfo=UTC).timestamp() if moment else time.time()


def checkpoint_of(study: Study, row: Any) -> str | None:
    """Return the path of a trial's checkpoint file, None if it has none or the file was deleted.

    Of a command it is the folder in which the program has saved, None if that holds no files.
    """
    path: str | None = row.checkpoint_path
    if not path or not study.store.exists(study.store.name_of(path)):
        return None
    if not study.spec.has_program:
        return path
    folder = program_folder.newest(Path(path).parent)
    return str(folder) if program_folder.holds_files(folder) else None
