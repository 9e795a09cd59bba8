"""Trials taken from workers that are gone: by the timer of whoever lives, or by the parent that saw its worker die.

What is taken is a failure of kind *lost worker*: the trial is parked for another attempt, or ends if that happened to it
too often. Doing it twice is doing it once: a lease that was given back is nobody's to lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue import finish, lease_clock, workers
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.spec.failures import Failure, Kind
from hpo.storage import clock, sql
from hpo.storage.tables import hpo_failures, hpo_trials, running_ids, trials

TICKS_PER_LEASE = 6  # a worker that is gone is noticed a sixth of a lease after its lease, if others live
LONGEST_WAITS = 5  # pauses in a row, each of a lease at most


class Reaper:
    """Takes expired leases away, unless the storage itself was away: then everybody gets a lease's time to come back."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = clock.awake_or_asleep) -> None:
        self._ledger = ledger
        self._clock = clock
        self._written_at: float | None = None  # the last time that this process is known to have reached the storage
        self._not_before = -math.inf
        self._waits = 0  # one after the other, without reaping in between

    @property
    def is_due(self) -> bool:
        since = math.inf if self._written_at is None else self._clock() - self._written_at
        return since >= self._ledger.lease_seconds / TICKS_PER_LEASE

    def __call__(self) -> int:
        """Stamp this process's row and take what is expired; return how many trials were taken.

        The stamp is a write: it waits out a lock or fails in an outage, and the time that it took tells of either.
        """
        with sql.writing(self._ledger.engine) as connection:
            workers.stamp(connection, self._ledger)
            now = self._clock()
            pause = self._pause(connection, now)
            is_held_off = pause > 0 or now < self._not_before
            taken = reap(connection, self._ledger, of_old_boots_only=is_held_off)
        self._written_at = now  # only now is it known that what was written stands
        self._not_before = max(self._not_before, now + pause)
        self._waits = 0 if not is_held_off else self._waits + (pause > 0)
        return taken

    def _pause(self, connection: sa.Connection, now: float) -> float:
        """Return how long to leave everybody alone, for a time before this in which perhaps nobody could renew.

        Not for ever: a storage that is always slow must not keep the dead alive.
        """
        lease = self._ledger.lease_seconds
        if self._waits >= LONGEST_WAITS:
            return 0.0
        if self._written_at is None:  # just started: maybe as the storage came back
            return 0.0 if workers.anybody_else(connection, self._ledger) else lease / 2
        return lease if now - self._written_at > lease / 2 else 0.0


def reap(connection: sa.Connection, ledger: Ledger, *, of_old_boots_only: bool = False) -> int:
    """Take away every lease that has run out by its clock; return how many.

    Args:
        of_old_boots_only: those alone that were given before this machine was started anew: nobody can renew them.
    """
    dialect, by = connection.dialect.name, hpo_trials.c.lease_clock
    mine = lease_clock.name(dialect)
    if of_old_boots_only and mine is None:
        return 0
    expired = lease_clock.has_passed(dialect, hpo_trials.c.lease_until, by)
    over = lease_clock.has_stopped(dialect, by) if of_old_boots_only else expired

    def how(row: Any) -> str:
        is_of_old_boot = row.lease_clock not in (None, mine)
        return "its machine was started anew" if is_of_old_boot else "its worker fell silent for longer than its lease"

    return _lose(connection, ledger, over, how, skip_locked=True)


def fail_leases_of(ledger: Ledger, worker: str, how: str) -> int:
    """Take away every lease of a worker that is known to have died; return how many.

    Args:
        how: what it died of, in words.
    """
    with sql.writing(ledger.engine) as connection:
        return _lose(connection, ledger, hpo_trials.c.worker == worker, lambda _: f"its worker died: {how}")


def release_leases_of(ledger: Ledger, worker: str, *, but: Collection[Claim] = ()) -> None:
    """Give back every lease of a worker that has left, or that cannot know what it holds; no failure of the trials.

    Args:
        but: what it knows to hold.
    """
    known = sa.tuple_(hpo_trials.c.trial_id, hpo_trials.c.attempt).not_in([claim.token for claim in but])
    with sql.writing(ledger.engine) as connection:
        for row in _held(connection, ledger, sa.and_(hpo_trials.c.worker == worker, known)):
            finish.release(connection, row)


def has_lost(ledger: Ledger, worker: str) -> bool:
    """Say whether a trial's attempt failed because this worker died."""
    of_worker = sa.select(hpo_failures.c.trial_id).where(
        hpo_failures.c.study_uid == ledger.uid,
        hpo_failures.c.worker == worker,
        hpo_failures.c.kind == Kind.LOST_WORKER,
    )
    with sql.reading(ledger.engine) as connection:
        return connection.execute(of_worker.limit(1)).first() is not None


def _lose(
    connection: sa.Connection,
    ledger: Ledger,
    whose: sa.ColumnElement[bool],
    how: Callable[[Any], str],
    *,
    skip_locked: bool = False,
) -> int:
    lost = _held(connection, ledger, whose, skip_locked=skip_locked)
    for row in lost:
        failure = Failure(kind=Kind.LOST_WORKER, message=f"{how(row)} ({row.worker})")
        finish.fail(connection, row, failure, ledger.policies)
    return len(lost)


def _held(
    connection: sa.Connection, ledger: Ledger, whose: sa.ColumnElement[bool], *, skip_locked: bool = False
) -> Sequence[Any]:
    """Return our rows of the trials that are leased, locked as they are read: an owner may wake up.

    Args:
        skip_locked: leave out what somebody writes to just now: it lives.
    """
    return connection.execute(
        sa.select(hpo_trials)
        .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
        .where(
            hpo_trials.c.study_uid == ledger.uid,
            hpo_trials.c.settled.is_(False),
            hpo_trials.c.lease_until.is_not(None),
            hpo_trials.c.trial_id.in_(running_ids(ledger.study_id)),
            trials.c.state == TrialState.RUNNING,
            whose,
        )
        .order_by(hpo_trials.c.trial_id)
        .with_for_update(of=hpo_trials, skip_locked=skip_locked)
    ).all()
