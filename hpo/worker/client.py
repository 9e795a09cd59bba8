"""A worker's access to the database: claims, the leases that it holds, retries, and reports that are not written yet.

Two threads share the client. Threads of a user's objective may report, too. The training thread claims, asks whether a
trial may continue, reports, and ends trials. The heartbeat's thread renews leases, learns commands and lost claims, and
sends the reports that were kept during an outage. When the storage fails or hangs, training waits for it for some
seconds once. Then training continues, and reports are kept in their order until the storage is back.

What each thread may touch:

- Connections. On Postgres the pool keeps two and lends a third. The training thread takes one at a time. So does a
  thread that it no longer waits for (`within`), until its statements end. So does the heartbeat, which therefore never
  waits for the pool. No statement waits longer than `lock_timeout` for one lock.
- `_claims` is held during a claim. A claim that no thread waits for is not begun. A claim under way ends under the lock.
  The next holder releases its trials: the heartbeat at its next tick, the next claim, or `leave`.
- `_sending` is held while reports are written. The heartbeat never waits for it. The training thread waits for
  ANSWER_SECONDS.
- `_noting` guards `_leases`, `_unsent` and `_metrics_of`. No thread calls the storage while it holds this lock.
- Either thread sets a lease's `commands`, `is_lost`, `renewed_at`, `refused` and `has_ended`, each by a single assignment.
  `is_lost` is never reset to False. All else in a lease belongs to the training thread.
- `_heard` belongs to the heartbeat. `_waits_for_others` is used under `_claims`. `has_doubled_a_study` is set by the
  training thread and reset by the heartbeat.

The time from one renewal to the next is at most a third of a lease, one tick and one wait for a lock. The heartbeat
checks before each duty whether a renewal is due, and a duty waits only once for a lock of another client. So a lease of
20 s or more outlasts any lock that another client holds for up to `lock_timeout`, whatever the training thread waits
for. SQLite has one lock, and its holder delays the reapers as well. Late writes are harmless. The attempt number fences
each of them, and a released lease is not renewed.

These calls renew leases: `renew`, a report that is due for it, raw metrics, suggestions, receipts, checkpoints and
costs. A server that hangs without a lock is not bounded so. Once it is back, all leases are extended
(`queue/reaper.py`).
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from hpo.errors import Fault, LostLease, NoAnswer, Outage, Parked, Signal, Stopped, StorageGone, TimeUp, Unasked
from hpo.queue import claiming, reaper
from hpo.queue.claiming import Idle
from hpo.queue.finish import End
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim, Commands, HasClaim, Token
from hpo.queue.report import Report
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.spec.failures import Failure, Verdict
from hpo.spec.objectives import KnownCosts
from hpo.storage import clock, sql
from hpo.storage.connect import FAILURES, UNREACHED, cause
from hpo.storage.retry import Result, Retry, within
from hpo.storage.tables import hpo_trials, trials
from hpo.worker.signals import StopSignal

log = logging.getLogger(__name__)
_HasClaim = TypeVar("_HasClaim", bound=HasClaim)
RENEWALS_PER_LEASE = 3
AT_ONCE = 100  # kept reports in one statement
RECHECK_SECONDS = 10.0  # after which commands are read again, whether their version has changed or not
FEWEST_DOUBLED = 128  # trials; Postgres plans well for fewer, whatever it believes
METRICS_AT_ONCE = 500  # reports whose raw metrics are written in one transaction; others wait for its lock
METRICS_SECONDS = 10.0  # for which raw metrics are collected; only views read them while a trial runs
NOT_ASKED = "ended by a signal that `hpo run` did not send: by the trial's own code, or by hand"
ANSWER_SECONDS = 5.0  # for which the training thread waits for the storage before it continues without an answer
NOTHING_WANTED = Commands(lost=False, stop=False, park=False)


@dataclass(frozen=True, kw_only=True)
class ClaimRequest:
    """What a runner asks its worker to claim."""

    count: int  # the largest number of trials
    stack_key: str | None = None  # the key of the open stack, if there is one
    waiting_at_most: int | None = None  # how many trials may wait for another stack


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Which commands the heartbeat has read last."""

    claims: frozenset[Claim] = frozenset()  # those that stood
    orders: int = -1  # the version of the study's orders
    read_at: float = field(default_factory=time.monotonic)

    def holds(self, claims: Collection[Claim]) -> bool:
        """Whether the commands for these claims are known, unless the orders have changed since."""
        return self.claims.issuperset(claims) and time.monotonic() - self.read_at < RECHECK_SECONDS


@dataclass(eq=False)
class Lease:
    """What a worker knows of its lease on one trial, from the claim to the end."""

    claim: Claim
    started_at: float = field(default_factory=time.monotonic)
    seconds_left: float | None = None  # how long this attempt may last; None without a limit
    renewed_at: float = field(default_factory=lambda: clock.awake_or_asleep())
    is_lost: bool = False  # as far as this worker knows; it stays True
    commands: Commands = NOTHING_WANTED
    refused: Exception | None = None  # why the database refused a write of the trial
    has_ended: bool = False  # the heartbeat's thread has found that the trial ended
    #: The reports since the last recorded checkpoint; None for a trial without checkpoints.
    unrecorded: list[Report] | None = None

    @property
    def seconds(self) -> float:
        """How long this attempt has lasted, in seconds."""
        return time.monotonic() - self.started_at

    @property
    def keeps_its_place(self) -> bool:
        """Whether a later attempt may continue the trial: it is neither lost nor ended by a person."""
        return not (self.is_lost or self.commands.stop)

    @property
    def lost_error(self) -> LostLease:
        """The error that a trial without a lease raises at its next check."""
        return LostLease(f"trial {self.claim.number}: another process has claimed or ended it")

    def check(self) -> None:
        """Raise LostLease if the lease is known to be lost. Else raise, once, why the database refused a write."""
        if self.is_lost:
            raise self.lost_error
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused


class QueueClient:
    """A worker's access to the database, for all trials that it holds."""

    def __init__(self, ledger: Ledger, retry: Retry, stopping: StopSignal) -> None:
        """Start without a trial.

        Args:
            retry: how long the storage may fail.
            stopping: whether the worker was asked to stop, and whether by its parent.
        """
        self.ledger = ledger
        self.retry = retry
        self.stopping = stopping
        self.has_unheard_claims = False  # trials may be leased to this worker by a claim whose answer was lost
        self.has_doubled_a_study = False  # so the database's statistics are old
        self.gone: StorageGone | None = None  # set when the storage is known to be gone for good
        self.finished: int | None = None  # how many trials of the study had finished at the last report
        self._heard = Heard()  # by the heartbeat's thread
        self._leases: dict[Token, Lease] = {}
        self._awaited: object | None = None  # the claim that the training thread waits for, or has not held yet
        self._since = 0  # all trials below this number have finished
        self._unsent: list[Report] = []
        self._metrics_of: list[Report] = []  # reports that are sent without their raw metrics
        self._metrics_since = 0.0  # when the first of these was sent
        self._failing_since: float | None = None
        self._waits_for_others = (
            False  # the last claim found nothing yet, so the next one looks before it takes the lock
        )
        self._claims = threading.Lock()  # held while a thread claims, even if no thread waits for the answer any more
        self._sending = threading.Lock()  # held while a thread writes reports
        self._noting = threading.Lock()  # guards the leases and the reports; not held during calls of the storage

    # --- trials come and go -----------------------------------------------------------------------------------------

    def claim(self, wanted: ClaimRequest, fleet: int = 1, *, may_wait: bool = True) -> list[Lease] | Idle:
        """Claim trials and hold them.

        Args:
            fleet: the run's number of workers.
            may_wait: wait while the storage fails. If False, nothing is claimed during an outage.
        """
        if not may_wait and self.is_cut_off:
            return Idle.WAIT
        self._awaited = call = object()
        action = partial(self._claim, call, wanted, fleet)
        try:
            found = self.retry(action) if may_wait else self.ask(action)
            if found is None:
                return Idle.WAIT
            leases = found if isinstance(found, Idle) else [self.hold(claim) for claim in found]
            self.has_unheard_claims = False
            if not isinstance(found, Idle) and any(map(_doubles_a_study, found)):
                self.has_doubled_a_study = True
            return leases
        finally:
            self._awaited = None

    def _claim(self, call: object, wanted: ClaimRequest, fleet: int) -> list[Claim] | Idle:
        with self._claiming():
            if call is not self._awaited:
                raise NoAnswer("no thread waits for this claim any more")
            self._release_unheard()
            if self._waits_for_others and claiming.must_wait(self.ledger):
                return Idle.WAIT
            self.has_unheard_claims = True
            found = claiming.claim_many(
                self.ledger,
                wanted.count,
                stack_key=wanted.stack_key,
                waiting_at_most=wanted.waiting_at_most,
                fleet=fleet,
            )
            self._waits_for_others = found is Idle.WAIT
            return found

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        """Keep other threads from claiming. Raises NoAnswer if another claim is not answered in time."""
        if not self._claims.acquire(timeout=ANSWER_SECONDS):
            raise NoAnswer("the storage has not answered a claim yet")
        try:
            yield
        finally:
            self._claims.release()

    def _release_unheard(self) -> None:
        """Release trials that may have been claimed by a claim whose answer was lost."""
        if self.has_unheard_claims:
            held = [lease.claim for lease in self.leases]
            reaper.release_leases_of(self.ledger, self.ledger.worker, but=held)
            self.has_unheard_claims = False

    def leave(self, error: BaseException | None = None) -> None:
        """Release the trials of a worker that ends, unless the storage fails. It never raises.

        After a crash the trials that the worker knew of stay leased. They may be the cause, so the attempt must count.

        Args:
            error: why the worker ends; None if nothing is left to do.
        """
        is_crash = error is not None and not isinstance(error, (Fault, *FAILURES))
        is_away = self.is_cut_off or isinstance(error, Outage)
        if is_away or not (self.leases or self.has_unheard_claims):
            return
        try:
            within(ANSWER_SECONDS, self._release_unheard_alone if is_crash else self._release_all)
        except Exception as failed:
            log.warning("trials stay leased until their leases expire: %s", cause(failed))

    def _release_all(self) -> None:
        with self._claiming():
            reaper.release_leases_of(self.ledger, self.ledger.worker)

    def _release_unheard_alone(self) -> None:
        with self._claiming():
            self._release_unheard()

    def hold(self, claim: Claim) -> Lease:
        """Hold a claimed trial and return its lease. An earlier lease on the same trial is lost."""
        lease = Lease(claim)
        if not self._leases:
            self._failing_since = None  # no report is kept, and the claim was answered
        for other in self.leases:
            if other.claim.trial_id == claim.trial_id:
                other.is_lost = True
        with self._noting:
            self._leases[claim.token] = lease
        return lease

    def remove(self, lease: Lease) -> None:
        """Hold this lease no more. Its unsent reports are dropped."""
        with self._noting:
            self._leases.pop(lease.claim.token, None)
            self._unsent, self._metrics_of = self._held(self._unsent), self._held(self._metrics_of)

    @property
    def leases(self) -> list[Lease]:
        """The leases that the worker holds, lost ones included."""
        with self._noting:
            return list(self._leases.values())

    # --- may a trial continue? asked by the training thread ---------------------------------------------------------

    def must_end(self, lease: Lease) -> bool:
        """Return whether the attempt must end. It is called before every batch."""
        return self._why(lease) is not None

    def let_go(self, lease: Lease) -> None:
        """Raise the Signal that says why the attempt must end, if it must."""
        why = self._why(lease)
        if why is not None:
            raise why

    def _why(self, lease: Lease) -> Signal | None:
        number = lease.claim.number
        if self.gone is not None:
            return Outage(str(self.gone))
        if lease.is_lost:
            return lease.lost_error
        if lease.commands.stop:
            return Stopped(f"trial {number}: ended by `hpo stop`")
        is_stopping = self.stopping()
        if is_stopping and self.stopping.is_unasked():
            return Unasked(f"its worker died: {NOT_ASKED}")
        if is_stopping or lease.commands.park:
            return Parked(f"trial {number}: the worker is stopping, or the study is paused")
        if lease.seconds_left is not None and lease.seconds > lease.seconds_left:
            return TimeUp(f"trained for longer than budget.trial_timeout, in this attempt {lease.seconds:.0f} s")
        if self.failing_seconds > self.retry.seconds:
            return Outage(f"the storage has failed for {self.retry.seconds:.0f} s")
        return None

    @property
    def is_cut_off(self) -> bool:
        """Whether the storage failed, or did not answer, at the last attempt."""
        return self._failing_since is not None

    @property
    def failing_seconds(self) -> float:
        """For how many seconds the storage has failed; 0 if it does not."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    # --- written by the training thread, which waits ANSWER_SECONDS for an answer -----------------------------------

    def report(self, reports: Sequence[Report], *, since: int = 0) -> None:
        """Write an epoch of trials in one statement, or keep it until the storage is back.

        The next `check` of a trial's lease raises if the lease was lost, or if the database refused the report for
        good. A refused report is dropped, for example one with a step that no column holds.

        Args:
            since: a number below which all trials of the study are known to have finished.

        Raises RuntimeError, and writes nothing, if a report's trial is not held here.
        """
        with self._noting:
            for report in reports:
                if report.claim.token not in self._leases:
                    raise RuntimeError(
                        f"trial {report.claim.number} is not held here any more; report before its objective returns"
                    )
            for report in reports:
                if (unrecorded := self._leases[report.claim.token].unrecorded) is not None:
                    unrecorded.append(report)
            self._since = since
            self._unsent = [*self._unsent, *reports]
        if not self.is_cut_off:
            self.ask(self.deliver)

    def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file. Return False if the storage fails. Raises LostLease if the claim is lost."""
        if self.is_cut_off or not self.ask(partial(self._record_checkpoint, lease, checkpoint)):
            return False
        if lease.unrecorded is not None:
            lease.unrecorded.clear()
        return True

    def _record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> bool:
        self.deliver(metrics=True)
        self.ledger.record_checkpoint(lease.claim, checkpoint)
        return True

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Call the storage for the training thread. If it fails or hangs, return None, and the client is cut off."""
        return self._attempt(lambda: within(ANSWER_SECONDS, action))

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Call Optuna likewise. The call may use the storage."""

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
        """Note that the storage failed. From now on reports are kept until the heartbeat's thread reaches it.

        If the storage is gone for good, the next `let_go` of each trial raises Outage.
        """
        if isinstance(error, StorageGone):
            self.gone = error
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            what_next = "training goes on" if self.gone is None else "the worker stops"
            log.warning("the storage fails, %s: %s", what_next, cause(error))

    # --- written by the training thread, which retries while the storage fails; Outage if it fails for too long -----

    def flush(self, lease: Lease | None = None) -> None:
        """Write all unsent reports. Raises LostLease if this lease is lost."""
        self.retry(lambda: self.deliver(metrics=True))
        if lease is not None and lease.is_lost:
            raise lease.lost_error

    def write_suggested(self, given: Sequence[SuggestedParams]) -> None:
        """Write suggested parameters. The next `check` of a trial's lease raises if this failed for it."""
        self._write_told(self.ledger.write_suggested, given)

    def record_receipts(self, made: Sequence[TrialReceipt]) -> None:
        """Record the receipts of trials, likewise."""
        self._write_told(self.ledger.record_receipts, made)

    def _write_told(self, write: Callable[[Sequence[_HasClaim]], Collection[Claim]], told: Sequence[_HasClaim]) -> None:
        """Write something for each of several trials in one transaction, or one by one if the database refuses that.

        The next `check` of a trial's lease raises if the lease was lost, or if the database refused the write for good.

        Args:
            write: returns the lost claims.
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
                self._write_told(write, [one])

    def take_up_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> None:
        """Record a checkpoint that an earlier attempt could not record. Raises LostLease if the claim is lost."""
        self.retry(lambda: self._record_checkpoint(lease, checkpoint))

    def curve(self, lease: Lease, metric: str) -> list[float]:
        """Return the stored raw values of a metric, in the order of the epochs."""
        return self.retry(lambda: self.ledger.curve(lease.claim, metric))

    def code_has_changed(self) -> bool:
        """Return whether the study has accepted other code than its first."""
        return self.retry(self.ledger.code_has_changed)

    def record_costs(self, lease: Lease, costs: Mapping[str, float], known: KnownCosts) -> None:
        """Record a trial's costs and what follows from them for its end. Raises LostLease if the claim is lost."""
        self.retry(lambda: self.ledger.record_costs(lease.claim, costs, known))

    def start_over(self, lease: Lease) -> None:
        """Forget a checkpoint that cannot be read, and the curve with it. Raises LostLease if the claim is lost."""
        self.retry(lambda: self.ledger.start_over(lease.claim))

    def park(self, lease: Lease, *, stack_key: str | None = None) -> None:
        """Park a trial for a later claim."""
        self.retry(lambda: self.ledger.park(lease.claim, stack_key=stack_key))

    def hand_back(self, lease: Lease, given: Collection[str]) -> None:
        """Undo a claim and delete the parameters that it was given."""
        self.retry(lambda: self.ledger.hand_back(lease.claim, given))

    def drop(self, lease: Lease, message: str) -> None:
        """Record that the claim is lost."""
        self.retry(lambda: self.ledger.drop(lease.claim, message))

    def finish(self, ends: Sequence[End]) -> set[Claim]:
        """Settle trials that did not fail, in one transaction. Return the lost claims."""
        return self.retry(lambda: self.ledger.finish_all(ends))

    def fail(self, lease: Lease, failure: Failure, *, accumulation: int | None = None) -> Verdict:
        """Record a failed attempt and apply the study's policy. Raises LostLease if the claim is lost."""
        return self.retry(lambda: self.ledger.fail(lease.claim, failure, accumulation=accumulation))

    def end_as_stopped(self, lease: Lease) -> None:
        """Settle a trial that a person ended. Raises LostLease if the claim is lost."""
        self.retry(lambda: self.ledger.end_as_stopped(lease.claim))

    def stop(self, reason: str) -> None:
        """Start no new trials in the study from now on."""
        self.retry(lambda: self.ledger.stop(reason))

    # --- done by the heartbeat's thread -----------------------------------------------------------------------------

    def send(self) -> None:
        """Write the kept reports. Raises the storage's errors."""
        self.deliver(may_wait=False)

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether a lease is old enough for a renewal."""
        return self._is_due(self._standing().values())

    def renew(self) -> None:
        """Renew all leases in one statement, and find those that are lost. Raises the storage's errors."""
        leases, asked_at = self._standing(), clock.awake_or_asleep()
        for claim in self.ledger.renew_all(leases.keys()):
            leases[claim].is_lost = True
        for lease in leases.values():
            lease.renewed_at = asked_at

    def send_metrics(self) -> None:
        """Write the raw metrics once they have waited for METRICS_SECONDS. Raises the storage's errors."""
        if self._metrics_are_due and self._sending.acquire(blocking=False):
            try:
                self._write_metrics()
            finally:
                self._sending.release()

    @property
    def _metrics_are_due(self) -> bool:
        return bool(self._metrics_of) and time.monotonic() - self._metrics_since >= METRICS_SECONDS

    def release_unheard(self) -> None:
        """Release what was claimed after the training thread stopped waiting for it. Raises the storage's errors."""
        if self.has_unheard_claims and self._claims.acquire(blocking=False):
            try:
                if self._awaited is None:
                    self._release_unheard()
            finally:
                self._claims.release()

    def refresh_statistics(self) -> None:
        """Let the database count the trials anew after a mass start. Raises the storage's errors."""
        self.has_doubled_a_study = False  # first, because the other thread may set it meanwhile
        sql.analyze(self.ledger.engine, trials, hpo_trials)

    def poll_commands(self) -> None:
        """Learn the commands for the trials, and find lost leases. Raises the storage's errors.

        They are read again only once the study's orders have changed, or RECHECK_SECONDS have passed: an earlier version
        of hpo orders without raising the version.
        """
        leases = self._standing()
        if not leases or (self._heard.holds(leases) and self.ledger.orders() == self._heard.orders):
            return
        found = self.ledger.commands_of(leases.keys())
        for claim, commands in found.items():
            leases[claim].commands = commands
            if commands.lost:
                leases[claim].is_lost = True
        standing = {claim: commands.orders for claim, commands in found.items() if not commands.lost}
        self._heard = Heard(claims=frozenset(standing), orders=min(standing.values(), default=-1))

    # --- both -------------------------------------------------------------------------------------------------------

    def deliver(self, *, metrics: bool = False, may_wait: bool = True) -> None:
        """Write the unsent reports in order. Raises NoAnswer while another thread writes them.

        Args:
            metrics: also write all raw metrics that wait.
            may_wait: wait up to ANSWER_SECONDS for the other thread, if the storage does not fail.
        """
        if not self._sending.acquire(timeout=ANSWER_SECONDS if may_wait and not self.is_cut_off else 0):
            raise NoAnswer("the storage has not answered yet")
        try:
            if self.is_cut_off and not self._unsent:
                self.renew()  # shows whether the storage is back
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
        """Write the first of the unsent reports in one statement, or one by one if the database refuses that for good.

        A refused report is dropped. The next `check` of its lease raises the reason.
        """
        renew, asked_at = self._is_due(self._of(reports)), clock.awake_or_asleep()
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
        """Write the raw metrics that wait. Metrics that the database refuses for good are dropped with a warning."""
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
        """Return the leases of these claims that are still held here."""
        with self._noting:
            tokens = {one.claim.token for one in told} & self._leases.keys()
            return [self._leases[token] for token in tokens]

    def _is_due(self, leases: Iterable[Lease]) -> bool:
        """Return whether one of these leases is old enough for a renewal."""
        soon = clock.awake_or_asleep() - self.ledger.lease_seconds / RENEWALS_PER_LEASE
        return any(lease.renewed_at <= soon for lease in leases)

    def _note_claims(self, told: Sequence[HasClaim], lost: Collection[Claim], *, renewed_at: float | None) -> None:
        fallen = {claim.token for claim in lost}
        for lease in self._of(told):
            if lease.claim.token in fallen:
                lease.is_lost = True
            elif renewed_at is not None:
                lease.renewed_at = renewed_at

    def _note_sent(self, reports: Sequence[Report], waiting: Sequence[Report]) -> None:
        """Remove reports from the unsent ones.

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


def _doubles_a_study(claim: Claim) -> bool:
    """Return whether a claim begins a trial whose number is a power of two."""
    number = claim.number
    return claim.attempt == 1 and number >= FEWEST_DOUBLED and number & (number - 1) == 0


def _without(kept: list[Report], done: Sequence[Report]) -> list[Report]:
    """Return `kept` without `done`, compared by identity: a report may be made twice."""
    if all(map(operator.is_, kept, done)):  # nearly always `done` is the beginning of a long list
        return kept[len(done) :]
    gone = set(map(id, done))
    return [report for report in kept if id(report) not in gone]
