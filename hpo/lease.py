"""A worker's hold on one trial: what it has yet to write, and why it must let go.

Two threads share it. The training thread reports, and asks whether it may go on; the keeper's thread renews the lease,
brings the orders of others, and sends what was reported while the storage was away. Training never waits for a storage
that fails: reports are kept in their order until it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hpo.errors import LostLease, Outage, Parked, Signal, Stopped, TimeUp
from hpo.failures import Kind
from hpo.ledger import Checkpoint, Claim, Ledger, Report
from hpo.outage import Patience
from hpo.storage import OUTAGES, cause

log = logging.getLogger(__name__)


class Lease:
    """The hold on one claimed trial, from its claim to its end."""

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        *,
        stopping: Callable[[], bool] = lambda: False,
        patience: Patience | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Hold a claim.

        Args:
            stopping: whether the worker was asked to stop.
            patience: how long the storage may fail.
            seconds_left: how long the trial may still train, if there is a limit.
        """
        self.ledger = ledger
        self.claim = claim
        self.patience = patience or Patience(0.0)
        self.since_checkpoint: list[Report] = []  # what whoever goes on from the next checkpoint needs to know
        self.started_at = time.monotonic()
        self.seconds_left = seconds_left
        self.failed_by: Kind | None = None  # what ended the attempt, if that was a failure
        self._stopping = stopping
        self._unsent: list[Report] = []
        self._sending = threading.Lock()
        self._failing_since: float | None = None
        self._lost = self._stop = self._park = False

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
        """Raise LostLease if the trial is known to be in other hands."""
        if self._lost:
            raise self._lost_lease()

    def _why(self) -> Signal | None:
        number = self.claim.number
        if self._lost:
            return self._lost_lease()
        if self._stop:
            return Stopped(f"trial {number}: ended by `hpo stop`")
        if self._stopping() or self._park:
            return Parked(f"trial {number}: the worker is stopping, or the study is paused")
        if self.seconds_left is not None and self.seconds > self.seconds_left:
            return TimeUp(f"trained for longer than budget.trial_timeout, in this attempt {self.seconds:.0f} s")
        if self._failing_since is not None and time.monotonic() - self._failing_since > self.patience.seconds:
            return Outage(f"trial {number}: the storage has failed for {self.patience.seconds:.0f} s")
        return None

    def _lost_lease(self) -> LostLease:
        return LostLease(f"trial {self.claim.number}: another worker has taken it up, or it was ended elsewhere")

    @property
    def seconds(self) -> float:
        """How long this attempt has lasted."""
        return time.monotonic() - self.started_at

    @property
    def is_cut_off(self) -> bool:
        """Whether the storage failed at the last try."""
        return self._failing_since is not None

    def report(self, report: Report) -> None:
        """Write a report, or keep it until the storage is back; LostLease if the trial is in other hands."""
        self._unsent.append(report)
        self.since_checkpoint.append(report)
        if not self.is_cut_off:
            self.send()
        self.check()

    def record_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file, if the storage lets us; LostLease if the trial is in other hands."""
        if self.is_cut_off or not self.send():
            return False
        try:
            self.ledger.record_checkpoint(self.claim, checkpoint)
        except OUTAGES as error:
            self.note_failure(error)
            return False
        self.since_checkpoint.clear()
        return True

    # --- done by the keeper's thread, or when the storage is back ----------------------------------------------------

    def send(self) -> bool:
        """Write what is unsent, in order; False if the storage fails."""
        try:
            self._deliver()
        except OUTAGES as error:
            self.note_failure(error)
            return False
        return True

    def flush(self) -> None:
        """Write what is unsent, waiting for a storage that fails; LostLease if the trial is in other hands."""
        self.patience(self._deliver)
        self.check()

    def _deliver(self) -> None:
        with self._sending:
            unsent = list(self._unsent)
            if unsent:
                self._lost = bool(self.ledger.report(unsent)) or self._lost
                del self._unsent[: len(unsent)]
            elif self.is_cut_off:
                self.renew()  # as good a question as any whether the storage is back
            self._note_success()

    def renew(self) -> None:
        """Renew the lease, or find that it is lost; errors of the storage pass."""
        if not self.ledger.renew(self.claim):
            self._lost = True

    def obey(self) -> None:
        """Ask the database what others want of the trial; errors of the storage pass."""
        orders = self.ledger.orders(self.claim)
        self._lost = self._lost or orders.lost
        self._stop, self._park = orders.stop, orders.park

    def note_failure(self, error: BaseException) -> None:
        """Take note that the storage failed: from now on reports are kept, until the keeper's thread gets through."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning("trial %d: the storage fails, training goes on: %s", self.claim.number, cause(error))

    def _note_success(self) -> None:
        if self._failing_since is not None:
            log.info("trial %d: the storage is back", self.claim.number)
        self._failing_since = None
