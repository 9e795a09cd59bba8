"""A worker's hold on one trial: what it has yet to write, and why it must let go.

Two threads share it. The training thread reports, and asks whether it may go on; the keeper's thread renews the lease,
brings the orders of others, and sends what was reported while the storage was away. Training waits for a storage that
fails or hangs for some seconds once, then it goes on: reports are kept in their order until the storage is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hpo import clocks
from hpo.claim import Checkpoint, Claim, Orders
from hpo.errors import LostLease, NoAnswer, Outage, Parked, Signal, Stopped, TimeUp
from hpo.failures import Kind
from hpo.ledger import Ledger
from hpo.outage import Patience, Result, within
from hpo.reports import Report
from hpo.storage import OUTAGES, cause

log = logging.getLogger(__name__)
RENEWALS_PER_LEASE = 3
AT_ONCE = 100  # reports in one statement, of those that were kept
METRICS_SECONDS = 10.0  # that raw metrics may wait for more of them; nothing but views reads them while a trial runs
ANSWER_SECONDS = 5.0  # that the training thread waits for the storage before it goes on without an answer


class Lease:
    """The hold on one claimed trial, from its claim to its end."""

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        *,
        stopping: Callable[[], bool] = lambda: False,
        patience: Patience | None = None,
    ) -> None:
        """Hold a claim.

        Args:
            stopping: whether the worker was asked to stop.
            patience: how long the storage may fail.
        """
        self.ledger = ledger
        self.claim = claim
        self.patience = patience or Patience(0.0)
        self.started_at = time.monotonic()
        self.seconds_left: float | None = None  # how long this attempt may last, if there is a limit
        self.failed_by: Kind | None = None  # what ended the attempt, if that was a failure
        self.has_ended = False  # found so by the keeper's thread
        self._stopping = stopping
        self._orders = Orders(lost=False, stop=False, park=False)
        self._lost = False
        self.finished: int | None = None  # trials of the study that had, at the last report
        self._since = 0  # all trials below this number had finished before
        self._unsent: list[Report] = []
        self._metrics_of: list[Report] = []  # sent, but for their raw metrics
        self._metrics_sent_at = time.monotonic()
        self._renewed_at = clocks.awake_or_asleep()
        self._sending = threading.Lock()
        self._failing_since: float | None = None

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
        if self._lost or self._orders.lost:
            raise self._lost_lease()

    @property
    def keeps_its_place(self) -> bool:
        """Whether somebody may go on with the trial after this attempt: it is neither lost nor ended by a person."""
        return not (self._lost or self._orders.lost or self._orders.stop)

    def _why(self) -> Signal | None:
        number = self.claim.number
        if self._lost or self._orders.lost:
            return self._lost_lease()
        if self._orders.stop:
            return Stopped(f"trial {number}: ended by `hpo stop`")
        if self._stopping() or self._orders.park:
            return Parked(f"trial {number}: the worker is stopping, or the study is paused")
        if self.seconds_left is not None and self.seconds > self.seconds_left:
            return TimeUp(f"trained for longer than budget.trial_timeout, in this attempt {self.seconds:.0f} s")
        if self._failing_since is not None and time.monotonic() - self._failing_since > self.patience.seconds:
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
        return self._failing_since is not None

    def report(self, report: Report, *, since: int = 0) -> None:
        """Write a report, or keep it until the storage is back; LostLease if the trial is in other hands.

        What the database refuses for good, such as a step that no column holds, is forgotten and raised.

        Args:
            since: a number below which all trials of the study are known to have finished.
        """
        self._since = since
        self._unsent.append(report)
        if not self.is_cut_off:
            self.ask(self._deliver)
        self.check()

    def record_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file, if the storage lets us; LostLease if the trial is in other hands."""

        def record() -> bool:
            self._deliver(metrics=True)
            self.ledger.record_checkpoint(self.claim, checkpoint)
            return True

        return not self.is_cut_off and bool(self.ask(record))

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Do something with the storage for the training thread; None, and cut off, if it fails or hangs."""
        return self._attempt(lambda: within(ANSWER_SECONDS, action))

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Do something of Optuna's likewise, which may or may not come to the storage."""

        def ask() -> Result:
            with self.patience.suspended(ANSWER_SECONDS):
                return action()

        return self._attempt(ask)

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except OUTAGES as error:
            self._note_failure(error)
            return None

    def flush(self) -> None:
        """Write what is unsent, waiting for a storage that fails; LostLease if the trial is in other hands."""
        self.patience(lambda: self._deliver(metrics=True))
        self.check()

    # --- done by the keeper's thread --------------------------------------------------------------------------------

    def send(self) -> None:
        """Try to write what was kept; errors of the storage pass."""
        self._deliver()

    def renew(self) -> None:
        """Renew the lease, or find that it is lost; errors of the storage pass."""
        asked_at = clocks.awake_or_asleep()
        if not self.ledger.renew(self.claim):
            self._lost = True
        self._renewed_at = asked_at

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether so much of the lease has gone that a renewal is due."""
        return clocks.awake_or_asleep() - self._renewed_at >= self.ledger.lease_seconds / RENEWALS_PER_LEASE

    def send_metrics(self) -> None:
        """Write raw metrics that have waited for long enough; errors of the storage pass."""
        if self._metrics_of and self._metrics_are_due and self._sending.acquire(blocking=False):
            try:
                self._write_metrics()
            finally:
                self._sending.release()

    @property
    def _metrics_are_due(self) -> bool:
        return time.monotonic() - self._metrics_sent_at >= METRICS_SECONDS

    def obey(self) -> None:
        """Ask the database what others want of the trial; errors of the storage pass."""
        self._orders = self.ledger.orders(self.claim)

    # --- both -------------------------------------------------------------------------------------------------------

    def _deliver(self, *, metrics: bool = False) -> None:
        """Write what is unsent, in order; NoAnswer while another thread still waits for the storage with it.

        Args:
            metrics: write the raw metrics that wait, too.
        """
        if not self._sending.acquire(timeout=0 if self.is_cut_off else ANSWER_SECONDS):
            raise NoAnswer("the storage has not answered yet")
        try:
            if self.is_cut_off and not self._unsent:
                self.renew()  # as good a question as any whether the storage is back
            while self._unsent:
                self._write(self._unsent[:AT_ONCE])
            if self._metrics_of and (metrics or self._metrics_are_due):
                self._write_metrics()
        finally:
            self._sending.release()
        if self.is_cut_off:
            log.info("trial %d: the storage is back", self.claim.number)
        self._failing_since = None

    def _write(self, reports: list[Report]) -> None:
        """Write the first of the unsent reports: all at once, or one by one if the database refuses some for good, which
        are forgotten then. The first refusal is raised.
        """
        renew, asked_at = self.is_to_be_renewed, clocks.awake_or_asleep()
        try:
            answer = self.ledger.report(reports, metrics=False, renew=renew, since=self._since)
        except OUTAGES:
            raise
        except Exception as error:
            if len(reports) == 1:
                del self._unsent[0]
                raise
            refused: list[Exception] = [error]
            for report in reports:
                try:
                    self._write([report])
                except OUTAGES:
                    raise
                except Exception as one:
                    refused.append(one)
            raise refused[-1] from None
        self._lost = bool(answer.lost) or self._lost
        self.finished = answer.finished
        if renew:
            self._renewed_at = asked_at
        self._metrics_of += reports
        del self._unsent[: len(reports)]

    def _write_metrics(self) -> None:
        """Write the raw metrics that wait; what the database refuses for good is forgotten with a warning."""
        try:
            self._lost = not self.ledger.write_metrics(self.claim, self._metrics_of) or self._lost
        except OUTAGES:
            raise
        except Exception as error:
            log.warning("trial %d: raw metrics cannot be written: %s", self.claim.number, cause(error))
        self._metrics_of.clear()
        self._metrics_sent_at = time.monotonic()

    def _note_failure(self, error: BaseException) -> None:
        """Take note that the storage failed: from now on reports are kept, until the keeper's thread gets through."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning("trial %d: the storage fails, training goes on: %s", self.claim.number, cause(error))
