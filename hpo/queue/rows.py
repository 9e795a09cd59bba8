"""Which of our rows of trials a statement selects. Rows are locked in the order of the trials' ids."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.storage.tables import UID_KEY, hpo_trials, study_user_attributes, trials


def open_trials(uid: str, study_id: int, *more: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """Select our rows of a study's leased and parked trials: not settled, and RUNNING in Optuna's table.

    The index `tables.open_by_lease` finds them. With a condition on `lease_until` it finds the few that match.

    Args:
        more: columns to return beside each row.
    """
    return (
        sa.select(hpo_trials, *more)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == uid,
            hpo_trials.c.settled.is_(False),
            runs(sa.literal(study_id)),
        )
    )


def runs(study_id: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that Optuna's row of a trial, found by its id, is of the study and RUNNING.

    It uses no index. After a mass start Postgres does not know yet how many trials run. It then read all of them through
    the index on states, for each row of ours.
    """
    without_index = trials.c.study_id + sa.literal_column("0")
    return sa.and_(without_index == study_id, trials.c.state == TrialState.RUNNING)


def stands(uid_json: Any) -> sa.ColumnElement[bool]:
    """Return the condition that a worker holds the trial: not settled, not given back, and its study still exists."""
    study_is_alive = sa.exists().where(
        # SQLite gives the trial ids of a deleted study to the next one's trials.
        trials.c.trial_id == hpo_trials.c.trial_id,
        study_user_attributes.c.study_id == trials.c.study_id,
        study_user_attributes.c.key == UID_KEY,
        study_user_attributes.c.value_json == uid_json,
    )
    return sa.and_(hpo_trials.c.settled.is_(False), hpo_trials.c.lease_until.is_not(None), study_is_alive)


def locked(found: sa.Select[Any]) -> sa.CTE:
    """Lock both rows of each trial found that a worker holds and that is RUNNING in Optuna's table.

    The statement has the parameters `uid` and `uid_json`.

    Args:
        found: a select from our rows. It need not name the study.
    """
    return (
        found.join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == sa.bindparam("uid"),
            stands(sa.bindparam("uid_json")),
            trials.c.state == TrialState.RUNNING,
        )
        .order_by(hpo_trials.c.trial_id)  # the same order everywhere prevents deadlocks
        .with_for_update(of=[hpo_trials, trials])  # waits for an end that another program writes, and sees it
        .cte("held")
    )
