"""Trials taken from workers that are gone: by the timer of whoever lives, or by the parent that saw its worker die.

What is taken is a failure of kind *lost worker*: the trial is parked for another attempt, or ends if that happened to it
too often. Doing it twice is doing it once: a lease that was given back is nobody's to lose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import presence, settling, storage
from hpo.failures import Failure, Kind
from hpo.ledger import Ledger
from hpo.tables import hpo_trials, trials

TICKS_PER_LEASE = 6  # a worker that is gone is noticed a sixth of a lease after its lease at the latest


class Reaper:
    """Takes expired leases away, unless the storage itself was away: then everybody gets a lease's time to come back."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._written_at = clock()  # the last time that this process was seen to reach the storage
        self._not_before = -math.inf

    @property
    def is_due(self) -> bool:
        return self._clock() - self._written_at >= self._ledger.lease_seconds / TICKS_PER_LEASE

    def __call__(self) -> int:
        """Stamp this process's row and take what is expired; return how many trials were taken.

        The stamp is a write: it waits out a lock or fails in an outage, and the time that it took tells of either.
        """
        with storage.writing(self._ledger.engine) as connection:
            presence.stamp(connection, self._ledger)
            reached_at = self._clock()
            self._hold_off(reached_at)
            taken = reap(connection, self._ledger) if reached_at >= self._not_before else 0
        self._written_at = reached_at  # only now is it known that what was written stands
        return taken

    def _hold_off(self, now: float) -> None:
        """Wait for a lease after a time in which nobody could renew; not again right after, or a storage that is always
        slow would keep the dead alive.
        """
        lease = self._ledger.lease_seconds
        if now - self._written_at > lease / 2 and now >= self._not_before + lease:
            self._not_before = now + lease


def reap(connection: sa.Connection, ledger: Ledger) -> int:
    """Take away every lease that has run out by the database's clock; return how many."""
    expired = hpo_trials.c.lease_until < storage.now(connection)
    return _lose(connection, ledger, expired, "its worker fell silent for longer than its lease")


def bury(ledger: Ledger, worker: str, how: str) -> int:
    """Take away every lease of a worker that is known to have died; return how many.

    Args:
        how: what it died of, in words.
    """
    with storage.writing(ledger.engine) as connection:
        return _lose(connection, ledger, hpo_trials.c.worker == worker, f"its worker died: {how}")


def park_all_of(ledger: Ledger, worker: str) -> None:
    """Give back every lease of a worker that has left, or that cannot know what it holds; no failure of the trials."""
    with storage.writing(ledger.engine) as connection:
        connection.execute(
            hpo_trials.update()
            .where(
                hpo_trials.c.study_uid == ledger.uid,
                hpo_trials.c.settled.is_(False),
                hpo_trials.c.worker == worker,
            )
            .values(lease_until=None)
        )


def _lose(connection: sa.Connection, ledger: Ledger, whose: sa.ColumnElement[bool], how: str) -> int:
    lost = connection.execute(
        sa.select(hpo_trials)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == ledger.uid,
            hpo_trials.c.settled.is_(False),
            hpo_trials.c.lease_until.is_not(None),
            trials.c.state == TrialState.RUNNING,
            whose,
        )
        .order_by(hpo_trials.c.trial_id)
        # Locked as it is read: its owner may wake up. What it holds just now is skipped.
        .with_for_update(of=hpo_trials, skip_locked=True)
    ).all()
    for row in lost:
        _lose_one(connection, ledger, row, how)
    return len(lost)


def _lose_one(connection: sa.Connection, ledger: Ledger, row: Any, how: str) -> None:
    if row.stop_requested:
        settling.end_as_stopped(connection, row)
    else:
        settling.fail(connection, row, Failure(kind=Kind.LOST_WORKER, message=f"{how} ({row.worker})"), ledger.policies)
