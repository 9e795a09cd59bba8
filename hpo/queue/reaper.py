"""Reaping: trials are taken from workers that are gone, by the timer of a living worker or by the dead worker's parent.

The attempt fails as *lost worker*. The trial is parked for another attempt, or ends after too many such failures.
Reaping is idempotent, because a lease that was given back cannot be taken again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from hpo.queue import finish, lease_clock, limits, workers
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.queue.rows import open_trials
from hpo.spec.failures import Failure, Kind
from hpo.storage import clock, sql, study_rows
from hpo.storage.tables import Hold, hpo_failures, hpo_trials

LONGEST_WAITS = 5  # pauses in a row; each lasts at most one lease


class Reaper:
    """Takes expired leases. After an outage of the storage it first gives all workers one lease of time to come back."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = clock.awake_or_asleep) -> None:
        self._ledger = ledger
        self._clock = clock
        self._written_at: float | None = None  # when this process last wrote to the storage for certain
        self._not_before = -math.inf
        self._waits = 0  # pauses in a row, without reaping in between

    @property
    def is_due(self) -> bool:
        since = math.inf if self._written_at is None else self._clock() - self._written_at
        return since >= self._ledger.lease_seconds / workers.TICKS_PER_LEASE

    def __call__(self) -> int:
        """Stamp this process's row, take expired leases, and stop a study whose time is spent. Return how many were taken.

        The stamp is a write, so it waits for locks and fails in an outage. The time since the last stamp shows both.
        """
        with sql.writing(self._ledger.engine) as connection:
            workers.stamp(connection, self._ledger)
            now = self._clock()
            pause = self._pause(connection, now)
            is_held_off = pause > 0 or now < self._not_before
            taken = reap(connection, self._ledger, of_old_boots_only=is_held_off)
            study = study_rows.living_row(connection, self._ledger.study_id)
            if study is not None and study.uid == self._ledger.uid and study.hold in (None, Hold.PAUSED):
                limits.enforce(connection, study, values=False)  # claims look at values, when a trial has ended
        self._written_at = now  # only here is it known that the commit succeeded
        self._not_before = max(self._not_before, now + pause)
        self._waits = 0 if not is_held_off else self._waits + (pause > 0)
        return taken

    def _pause(self, connection: sa.Connection, now: float) -> float:
        """Return for how many seconds to reap nothing, because workers may have been unable to renew before now.

        After LONGEST_WAITS pauses it is 0. A storage that is always slow must not keep the leases of dead workers.
        """
        lease = self._ledger.lease_seconds
        if self._waits >= LONGEST_WAITS:
            return 0.0
        if self._written_at is None:  # just started, perhaps as the storage came back
            return 0.0 if workers.anybody_else(connection, self._ledger) else lease / 2
        return lease if now - self._written_at > lease / 2 else 0.0


def reap(connection: sa.Connection, ledger: Ledger, *, of_old_boots_only: bool = False) -> int:
    """Take every lease that has expired by its clock. Return how many.

    Args:
        of_old_boots_only: take only leases from before this machine's last start. No worker can renew these.
    """
    dialect, by = connection.dialect.name, hpo_trials.c.lease_clock
    mine = lease_clock.name(dialect)
    if of_old_boots_only and mine is None:
        return 0
    expired = lease_clock.has_passed(dialect, hpo_trials.c.lease_until, by)
    over = lease_clock.has_stopped(dialect, by) if of_old_boots_only else expired

    def how(row: Any) -> str:
        is_of_old_boot = row.lease_clock not in (None, mine)
        return "its machine was restarted" if is_of_old_boot else "its worker did not renew its lease in time"

    return _lose(connection, ledger, over, how, skip_locked=True)


def fail_leases_of(ledger: Ledger, worker: str, how: str) -> int:
    """Take every lease of a worker that is known to have died. Return how many.

    Args:
        how: the cause of its death, in words.
    """
    with sql.writing(ledger.engine) as connection:
        return _lose(connection, ledger, hpo_trials.c.worker == worker, lambda _: f"its worker died: {how}")


def release_leases_of(ledger: Ledger, worker: str, *, but: Collection[Claim] = ()) -> None:
    """Give back the leases of a worker that has exited, or that does not know what it holds. No trial fails by this.

    Args:
        but: the claims that it knows of. They stay leased.
    """
    known = sa.tuple_(hpo_trials.c.trial_id, hpo_trials.c.attempt).not_in([claim.token for claim in but])
    with sql.writing(ledger.engine) as connection:
        for row in _held(connection, ledger, sa.and_(hpo_trials.c.worker == worker, known)):
            finish.release(connection, row)


def has_lost(ledger: Ledger, worker: str) -> bool:
    """Return whether a trial's attempt failed because this worker died."""
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
    if lost:
        study_rows.raise_orders(connection, ledger.uid)  # an owner that lives after all learns it within a tick
    return len(lost)


def _held(
    connection: sa.Connection, ledger: Ledger, whose: sa.ColumnElement[bool], *, skip_locked: bool = False
) -> Sequence[Any]:
    """Lock and return our rows of leased trials. The lock keeps out an owner that wakes up.

    Args:
        skip_locked: leave out rows that another process is writing. Their owners live.
    """
    return connection.execute(
        open_trials(ledger.uid, ledger.study_id)
        .where(hpo_trials.c.lease_until.is_not(None), whose)
        .order_by(hpo_trials.c.trial_id)
        .with_for_update(of=hpo_trials, skip_locked=skip_locked)
    ).all()
