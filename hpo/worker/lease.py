"""A worker's hold on one trial: its right to it, and why it must let go.

Two threads share it. The training thread asks whether it may go on; the keeper's thread hears what others want of the trial
and whether it is in other hands by now. What the trial has to say goes through the worker's post.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hpo.errors import LostLease, Outage, Parked, Signal, Stopped, TimeUp
from hpo.queue import clock
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim, Orders
from hpo.queue.report import Report
from hpo.spec.failures import Kind
from hpo.storage.retry import Patience, Result
from hpo.worker.client import RENEWALS_PER_LEASE, Post


class Lease:
    """The hold on one claimed trial, from its claim to its end."""

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        *,
        stopping: Callable[[], bool] = lambda: False,
        patience: Patience | None = None,
        post: Post | None = None,
    ) -> None:
        """Hold a claim.

        Args:
            stopping: whether the worker was asked to stop.
            patience: how long the storage may fail; the post's own if it is not given.
            post: of the worker, which sends for this trial until it is removed there; one of its own if it is not given.
        """
        self.ledger = ledger
        self.claim = claim
        self.post = post or Post(ledger, patience)
        self.patience = patience or self.post.patience
        self.started_at = time.monotonic()
        self.seconds_left: float | None = None  # how long this attempt may last, if there is a limit
        self.failed_by: Kind | None = None  # what ended the attempt, if that was a failure
        self.has_ended = False  # found so by the keeper's thread
        self.renewed_at = clock.awake_or_asleep()
        self.refused: Exception | None = None  # why the database did not take a report of the trial
        self.is_lost = False  # as far as is known; it stays so
        self._stopping = stopping
        self._orders = Orders(lost=False, stop=False, park=False)
        self.post.add(self)

    # --- asked by the training thread -------------------------------------------------------------------------------

    def must_end(self) -> bool:
        """Say whether the trial must let go; asked before every batch."""
        return self._why() is not None

    def let_go(self) -> None:
        """Raise the Signal that says why the trial must let go; nothing if it need not."""
        why = self._why()
        if why is not None:
            raise why

    def check(self) -> None:
        """Raise LostLease if the trial is known to be in other hands, else, once, why the database refused a report of it."""
        if self.is_lost:
            raise self._lost_lease()
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused

    @property
    def keeps_its_place(self) -> bool:
        """Whether somebody may go on with the trial after this attempt: it is neither lost nor ended by a person."""
        return not (self.is_lost or self._orders.stop)

    def _why(self) -> Signal | None:
        number = self.claim.number
        if self.is_lost:
            return self._lost_lease()
        if self._orders.stop:
            return Stopped(f"trial {number}: ended by `hpo stop`")
        if self._stopping() or self._orders.park:
            return Parked(f"trial {number}: the worker is stopping, or the study is paused")
        if self.seconds_left is not None and self.seconds > self.seconds_left:
            return TimeUp(f"trained for longer than budget.trial_timeout, in this attempt {self.seconds:.0f} s")
        if self.post.failing_seconds > self.patience.seconds:
            return Outage(f"the storage has failed for {self.patience.seconds:.0f} s")
        return None

    def _lost_lease(self) -> LostLease:
        return LostLease(f"trial {self.claim.number}: another worker has taken it up, or it was ended elsewhere")

    @property
    def seconds(self) -> float:
        """How long this attempt has lasted."""
        return time.monotonic() - self.started_at

    @property
    def is_cut_off(self) -> bool:
        """Whether the storage failed, or did not answer, at the last try."""
        return self.post.is_cut_off

    @property
    def finished(self) -> int | None:
        """Trials of the study that had finished at the worker's last report."""
        return self.post.finished

    def report(self, report: Report, *, since: int = 0) -> None:
        """Write a report, or keep it until the storage is back; LostLease if the trial is in other hands.

        What the database refuses for good, such as a step that no column holds, is forgotten and raised.

        Args:
            since: a number below which all trials of the study are known to have finished.
        """
        self.post.report([report], since=since)
        self.check()

    def record_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file, if the storage lets us; LostLease if the trial is in other hands."""

        def record() -> bool:
            self.post.deliver(metrics=True)
            self.ledger.record_checkpoint(self.claim, checkpoint)
            return True

        return not self.is_cut_off and bool(self.ask(record))

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Do something with the storage for the training thread; None, and cut off, if it fails or hangs."""
        return self.post.ask(action)

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Do something of Optuna's likewise, which may or may not come to the storage."""
        return self.post.ask_optuna(action)

    def flush(self) -> None:
        """Write what is unsent, waiting for a storage that fails; LostLease if the trial is in other hands."""
        self.post.flush()
        if self.is_lost:
            raise self._lost_lease()

    # --- told by the post -------------------------------------------------------------------------------------------

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether so much of the lease has gone that a renewal is due."""
        return clock.awake_or_asleep() - self.renewed_at >= self.ledger.lease_seconds / RENEWALS_PER_LEASE

    def lose(self) -> None:
        """Take note that the trial is in other hands."""
        self.is_lost = True

    def hear(self, orders: Orders) -> None:
        """Take note of what others want of the trial."""
        self._orders = orders
        if orders.lost:
            self.lose()
