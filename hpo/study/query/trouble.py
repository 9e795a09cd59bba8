"""Signs of trouble: expired leases, foreign trials, trials that others ended or hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.storage.tables import (
    FINISHED,
    hpo_trials,
    trials,
)
from hpo.study.query.trial_columns import with_ours
from hpo.study.study import Study


def expired(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return our RUNNING trials whose lease has expired and that no reaper has taken yet."""
    return connection.execute(
        _ours(study).where(
            hpo_trials.c.settled.is_(False),
            trials.c.state == "RUNNING",
            lease_clock.has_passed(connection.dialect.name, hpo_trials.c.lease_until, hpo_trials.c.lease_clock),
        )
    ).all()


def ended_elsewhere(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return our trials that another program has ended and whose row of ours is open."""
    is_open = sa.and_(hpo_trials.c.settled.is_(False), trials.c.state.in_(FINISHED))
    return connection.execute(_ours(study).where(is_open)).all()


def _ours(study: Study) -> sa.Select[Any]:
    return (
        sa.select(hpo_trials.c.study_uid, hpo_trials.c.trial_id, trials.c.number, hpo_trials.c.worker)
        .join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
        .where(hpo_trials.c.study_uid == study.uid)
        .order_by(trials.c.number)
    )


def foreign_running(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return number and start of the foreign RUNNING trials."""
    return connection.execute(
        sa.select(trials.c.number, trials.c.datetime_start)
        .select_from(with_ours(study))
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state == "RUNNING",
            hpo_trials.c.trial_id.is_(None),
        )
        .order_by(trials.c.number)
    ).all()


def held_elsewhere(study: Study) -> Sequence[Any]:
    """Return (number, worker, lease_clock) of trials leased by the clock of another machine.

    Such leases never expire here.
    """
    with study.storage.engine.connect() as connection:
        held = connection.execute(
            sa.select(trials.c.number, hpo_trials.c.worker, hpo_trials.c.lease_clock)
            .select_from(with_ours(study))
            .where(trials.c.study_id == study.study_id, hpo_trials.c.lease_clock.is_not(None))
            .order_by(trials.c.number)
        ).all()
    return [row for row in held if lease_clock.is_elsewhere(row.lease_clock)]
