"""A worker's one door to the storage: the leases that it holds, and the client that reads and writes for all of them.

Two threads share both. The training thread asks a lease whether it may go on, and reports. The heartbeat's thread renews the
leases, learns what people ordered and which trials are in other hands, and sends what was reported while the storage was away.
Training waits for a storage that fails or hangs for some seconds once. Then it goes on, and reports are kept in their order
until the storage is back.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from hpo.errors import LostLease, NoAnswer, Outage, Parked, Signal, Stopped, StorageGone, TimeUp, Unasked
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim, Commands, HasClaim, Token
from hpo.queue.report import Report
from hpo.spec.failures import Kind
from hpo.storage import clock
from hpo.storage.connect import UNREACHED, cause
from hpo.storage.retry import Result, Retry, within
from hpo.worker.signals import StopSignal

log = logging.getLogger(__name__)
_HasClaim = TypeVar("_HasClaim", bound=HasClaim)
RENEWALS_PER_LEASE = 3
AT_ONCE = 100  # reports in one statement, of those that were kept
METRICS_AT_ONCE = 500  # reports whose raw metrics are written in one transaction: others wait for its lock
METRICS_SECONDS = 10.0  # that raw metrics may wait for more of them; nothing but views reads them while a trial runs
NOT_ASKED = "ended by a signal that `hpo run` did not send: by the trial's own code, or by hand"
ANSWER_SECONDS = 5.0  # that the training thread waits for the storage before it goes on without an answer


class QueueClient:
    """The one way from a worker's trials to the database and back, for as long as each is held."""

    def __init__(self, ledger: Ledger, retry: Retry | None = None) -> None:
        """Begin without a trial.

        Args:
            retry: how long the storage may fail.
        """
        self.ledger = ledger
        self.retry = retry or Retry(0.0)
        self.has_unheard_claims = False  # trials may have been claimed without the answer having come
        self.gone: StorageGone | None = None  # set once the storage is known to be gone for good
        self.finished: int | None = None  # trials of the study that had, at the last report
        self._leases: dict[Token, Lease] = {}
        self._since = 0  # all trials below this number had finished before
        self._unsent: list[Report] = []
        self._metrics_of: list[Report] = []  # sent, but for their raw metrics
        self._metrics_since = 0.0  # when the first of those came
        self._failing_since: float | None = None
        self._sending = threading.Lock()  # held while a thread waits for the storage
        self._noting = threading.Lock()  # of what is unsent, and of whose; nobody waits for the storage with it

    # --- what it is for ---------------------------------------------------------------------------------------------

    def lease(self, claim: Claim, stopping: StopSignal) -> Lease:
        """Return the lease of a trial that was claimed."""
        return Lease(
            self.ledger, claim, stopping=stopping, is_unasked=stopping.is_unasked, retry=self.retry, client=self
        )

    def add(self, lease: Lease) -> None:
        """Send for this trial too from now on. An earlier claim to it has fallen, if one is still here."""
        if not self._leases:
            self._failing_since = None  # nothing is kept, and the claim was answered
        for other in self.leases:
            if other.claim.trial_id == lease.claim.trial_id and other is not lease:
                other.lose()
        with self._noting:
            self._leases[lease.claim.token] = lease

    def remove(self, lease: Lease) -> None:
        """Have no more to do with this trial; what is unsent of it is dropped."""
        with self._noting:
            self._leases.pop(lease.claim.token, None)
            self._unsent, self._metrics_of = self._held(self._unsent), self._held(self._metrics_of)

    @property
    def leases(self) -> list[Lease]:
        """The leases that it sends for."""
        with self._noting:
            return list(self._leases.values())

    # --- asked by the training thread -------------------------------------------------------------------------------

    @property
    def is_cut_off(self) -> bool:
        """Whether the storage failed, or did not answer, at the last try."""
        return self._failing_since is not None

    @property
    def failing_seconds(self) -> float:
        """For how long the storage has failed by now; 0 if it does not."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def report(self, reports: Sequence[Report], *, since: int = 0) -> None:
        """Write an epoch of trials that are held here, in one statement, or keep it until the storage is back.

        Each trial learns at its lease's next `check` that it is in other hands, or that the database refused its report for
        good, such as a step that no column holds; that report is forgotten.

        Args:
            since: a number below which all trials of the study are known to have finished.

        Raises KeyError for a report of a trial that is not held here; nothing is written then.
        """
        with self._noting:
            for report in reports:
                if report.claim.token not in self._leases:
                    raise KeyError(f"trial {report.claim.number}, attempt {report.claim.attempt}, is not held here")
            self._since = since
            self._unsent = [*self._unsent, *reports]
        if not self.is_cut_off:
            self.ask(self.deliver)

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Do something with the storage for the training thread; None, and cut off, if it fails or hangs."""
        return self._attempt(lambda: within(ANSWER_SECONDS, action))

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Do something of Optuna's likewise, which may or may not come to the storage."""

        def ask() -> Result:
            with self.retry.without_retry(ANSWER_SECONDS):
                return action()

        return self._attempt(ask)

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except UNREACHED as error:
            self.note_failure(error)
            return None

    def note_failure(self, error: BaseException) -> None:
        """Take note that the storage failed: from now on reports are kept, until the heartbeat's thread gets through.

        If it is gone for good, each trial learns at its lease's next `let_go` that it must let go.
        """
        if isinstance(error, StorageGone):
            self.gone = error
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            what_next = "training goes on" if self.gone is None else "trials are let go"
            log.warning("the storage fails, %s: %s", what_next, cause(error))

    def write(self, write: Callable[[Sequence[_HasClaim]], Collection[Claim]], told: Sequence[_HasClaim]) -> None:
        """Write what is told of trials that are held here, in one transaction, waiting for a storage that fails; Outage if it
        does so for too long.

        Each trial learns at its lease's next `check` that it is in other hands, or that the database refused this for good.

        Args:
            write: returns the claims that fell.
        """
        if not told:
            return
        asked_at = clock.awake_or_asleep()
        try:
            self._note_claims(told, self.retry(lambda: write(told)), renewed_at=asked_at)
        except StorageGone:
            raise
        except Exception as error:
            if len(told) == 1:
                for lease in self._of(told):
                    lease.refused = error
                return
            for one in told:
                self.write(write, [one])

    def flush(self) -> None:
        """Write what is unsent, waiting for a storage that fails; Outage if it does so for too long."""
        self.retry(lambda: self.deliver(metrics=True))

    # --- done by the heartbeat's thread -----------------------------------------------------------------------------

    def send(self) -> None:
        """Try to write what was kept; errors of the storage pass."""
        self.deliver()

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether so much of a lease has gone that a renewal is due."""
        return any(lease.is_to_be_renewed for lease in self._standing().values())

    def renew(self) -> None:
        """Renew all leases by one statement, and find those that are lost; errors of the storage pass."""
        leases, asked_at = self._standing(), clock.awake_or_asleep()
        for claim in self.ledger.renew_all(leases.keys()):
            leases[claim].lose()
        for lease in leases.values():
            lease.renewed_at = asked_at

    def send_metrics(self) -> None:
        """Write raw metrics that have waited for long enough; errors of the storage pass."""
        if self._metrics_are_due and self._sending.acquire(blocking=False):
            try:
                self._write_metrics()
            finally:
                self._sending.release()

    @property
    def _metrics_are_due(self) -> bool:
        return bool(self._metrics_of) and time.monotonic() - self._metrics_since >= METRICS_SECONDS

    def poll_commands(self) -> None:
        """Ask the database by one statement what others want of the trials; errors of the storage pass."""
        leases = self._standing()
        for claim, commands in self.ledger.commands_of(leases.keys()).items():
            leases[claim].apply(commands)

    # --- both -------------------------------------------------------------------------------------------------------

    def deliver(self, *, metrics: bool = False) -> None:
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
            if metrics or self._metrics_are_due:
                self._write_metrics()
        finally:
            self._sending.release()
        if self.is_cut_off:
            log.info("the storage is back")
        self._failing_since = None

    def _write(self, reports: Sequence[Report]) -> None:
        """Write the first of the unsent reports: all at once, or one by one if the database refuses some for good, which
        are forgotten then; their trials learn of it.
        """
        renew, asked_at = self._is_due(reports), clock.awake_or_asleep()
        try:
            answer = self.ledger.report(reports, metrics=False, renew=renew, since=self._since)
        except UNREACHED:
            raise
        except Exception as error:
            if len(reports) > 1:
                for report in reports:
                    self._write([report])
                return
            for lease in self._of(reports):
                lease.refused = error
            self._note_sent(reports, [])
            return
        self.finished = answer.finished
        self._note_claims(reports, answer.lost, renewed_at=asked_at if renew else None)
        self._note_sent(reports, [report for report in reports if report.claim not in answer.lost])

    def _write_metrics(self) -> None:
        """Write the raw metrics that wait; what the database refuses for good is forgotten with a warning."""
        while self._metrics_of:
            self._write_metrics_of(self._metrics_of[:METRICS_AT_ONCE])

    def _write_metrics_of(self, reports: Sequence[Report]) -> None:
        asked_at = clock.awake_or_asleep()
        try:
            self._note_claims(reports, self.ledger.write_metrics(reports), renewed_at=asked_at)
        except UNREACHED:
            raise
        except Exception as error:
            numbers = {report.claim.number for report in reports}
            if len(numbers) > 1:
                for number in sorted(numbers):
                    self._write_metrics_of([report for report in reports if report.claim.number == number])
                return
            log.warning("trial %d: raw metrics cannot be written: %s", reports[0].claim.number, cause(error))
        with self._noting:
            self._metrics_of = _without(self._metrics_of, reports)

    # --- what is known ----------------------------------------------------------------------------------------------

    def _standing(self) -> dict[Claim, Lease]:
        """Return the leases that are not known to be lost."""
        return {lease.claim: lease for lease in self.leases if not lease.is_lost}

    def _of(self, told: Sequence[HasClaim]) -> list[Lease]:
        """Return the leases under which something is told, of those that are still here."""
        with self._noting:
            tokens = {one.claim.token for one in told} & self._leases.keys()
            return [self._leases[token] for token in tokens]

    def _is_due(self, reports: Sequence[Report]) -> bool:
        return any(lease.is_to_be_renewed for lease in self._of(reports))

    def _note_claims(self, told: Sequence[HasClaim], lost: Collection[Claim], *, renewed_at: float | None) -> None:
        fallen = {claim.token for claim in lost}
        for lease in self._of(told):
            if lease.claim.token in fallen:
                lease.lose()
            elif renewed_at is not None:
                lease.renewed_at = renewed_at

    def _note_sent(self, reports: Sequence[Report], waiting: Sequence[Report]) -> None:
        """Take note that reports need not be sent any more.

        Args:
            waiting: those of them whose raw metrics are still to be written.
        """
        with self._noting:
            self._unsent = _without(self._unsent, reports)
            if not self._metrics_of:
                self._metrics_since = time.monotonic()
            self._metrics_of = [*self._metrics_of, *self._held(waiting)]

    def _held(self, reports: Sequence[Report]) -> list[Report]:
        return [report for report in reports if report.claim.token in self._leases]


def _without(kept: list[Report], done: Sequence[Report]) -> list[Report]:
    """Return what is kept but for what is done, by identity: a report may be made twice."""
    if all(map(operator.is_, kept, done)):  # as nearly always: the first ones, of maybe very many
        return kept[len(done) :]
    gone = set(map(id, done))
    return [report for report in kept if id(report) not in gone]


class Lease:
    """The hold on one claimed trial, from its claim to its end."""

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        *,
        stopping: Callable[[], bool] = lambda: False,
        is_unasked: Callable[[], bool] = lambda: False,
        retry: Retry | None = None,
        client: QueueClient | None = None,
    ) -> None:
        """Hold a claim.

        Args:
            stopping: whether the worker was asked to stop.
            is_unasked: whether that came from nobody who may ask.
            retry: how long the storage may fail; the client's own if not given.
            client: of the worker, which sends for this trial until it is removed there; one of its own if not given.
        """
        self.ledger = ledger
        self.claim = claim
        self.client = client or QueueClient(ledger, retry)
        self.retry = retry or self.client.retry
        self.started_at = time.monotonic()
        self.seconds_left: float | None = None  # how long this attempt may last, if there is a limit
        self.failed_by: Kind | None = None  # what ended the attempt, if that was a failure
        self.has_ended = False  # found so by the heartbeat's thread
        self.renewed_at = clock.awake_or_asleep()
        self.refused: Exception | None = None  # why the database did not take a report of the trial
        self.is_lost = False  # as far as is known; it stays so
        self._stopping = stopping
        self._is_unasked = is_unasked
        self._commands = Commands(lost=False, stop=False, park=False)
        self.client.add(self)

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
        return not (self.is_lost or self._commands.stop)

    def _why(self) -> Signal | None:
        number = self.claim.number
        if self.client.gone is not None:
            return Outage(str(self.client.gone))
        if self.is_lost:
            return self._lost_lease()
        if self._commands.stop:
            return Stopped(f"trial {number}: ended by `hpo stop`")
        is_stopping = self._stopping()
        if is_stopping and self._is_unasked():
            return Unasked(f"its worker died: {NOT_ASKED}")
        if is_stopping or self._commands.park:
            return Parked(f"trial {number}: the worker is stopping, or the study is paused")
        if self.seconds_left is not None and self.seconds > self.seconds_left:
            return TimeUp(f"trained for longer than budget.trial_timeout, in this attempt {self.seconds:.0f} s")
        if self.client.failing_seconds > self.retry.seconds:
            return Outage(f"the storage has failed for {self.retry.seconds:.0f} s")
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
        return self.client.is_cut_off

    @property
    def finished(self) -> int | None:
        """Trials of the study that had finished at the worker's last report."""
        return self.client.finished

    def report(self, *reports: Report, since: int = 0) -> None:
        """Write reports in one statement, or keep them until the storage is back; LostLease if the trial is in other hands.

        What the database refuses for good, such as a step that no column holds, is forgotten and raised.

        Args:
            since: a number below which all trials of the study are known to have finished.
        """
        self.client.report(reports, since=since)
        self.check()

    def record_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file, if the storage lets us; LostLease if the trial is in other hands."""

        def record() -> bool:
            self.client.deliver(metrics=True)
            self.ledger.record_checkpoint(self.claim, checkpoint)
            return True

        return not self.is_cut_off and bool(self.ask(record))

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Do something with the storage for the training thread; None, and cut off, if it fails or hangs."""
        return self.client.ask(action)

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Do something of Optuna's likewise, which may or may not come to the storage."""
        return self.client.ask_optuna(action)

    def flush(self) -> None:
        """Write what is unsent, waiting for a storage that fails; LostLease if the trial is in other hands."""
        self.client.flush()
        if self.is_lost:
            raise self._lost_lease()

    # --- learned by the client --------------------------------------------------------------------------------------

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether so much of the lease has gone that a renewal is due."""
        return clock.awake_or_asleep() - self.renewed_at >= self.ledger.lease_seconds / RENEWALS_PER_LEASE

    def lose(self) -> None:
        """Take note that the trial is in other hands."""
        self.is_lost = True

    def apply(self, commands: Commands) -> None:
        """Take note of what others want of the trial."""
        self._commands = commands
        if commands.lost:
            self.lose()
