"""A worker's access to the database: it claims, reports, and ends trials.

The leases that it holds and the reports that are not written yet are in `holdings.py`. `lease_upkeep.py` renews leases
and learns commands. `storage_calls.py` knows since when the storage has failed.

Two threads share the client. Threads of a user's objective may report, too. The training thread claims, asks whether a
trial may continue, reports, and ends trials. The heartbeat's thread renews leases, learns commands and lost claims, and
sends the reports that were kept during an outage. When the storage fails or hangs, training waits for it for some
seconds once. Then training continues, and reports are kept in their order until the storage is back.

What each thread may touch:

- Connections. On Postgres the pool keeps two and lends a third. The training thread takes one at a time. So does a
  thread that it no longer waits for (`within`), until its statements end. So does the heartbeat, which therefore never
  waits for the pool. No statement waits longer than `lock_timeout` for one lock.
- `_claiming` is held during a claim. A claim that no thread waits for is not begun. A claim under way ends under the
  lock. The next holder releases its trials: the heartbeat at its next tick, the next claim, or `leave`.
- `_sending` is held while reports are written. The heartbeat never waits for it. The training thread waits for
  ANSWER_SECONDS.
- The lock of `Holdings` guards the leases and the reports. No thread calls the storage while it holds this lock.
- Either thread sets a lease's `commands`, `is_lost`, `renewed_at`, `refused` and `has_ended`, each by a single assignment.
  `is_lost` is never reset to False. All else in a lease belongs to the training thread.
- `LeaseUpkeep` belongs to the heartbeat, but for `is_due` and `renew`. `_waits_for_others` is used under `_claiming`.
  `has_doubled_a_study` is set by the training thread and reset by the heartbeat.

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
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from hpo.errors import Fault, NoAnswer, Outage, Parked, Signal, Stopped, StorageGone, TimeUp, Unasked
from hpo.queue import claiming, reaper
from hpo.queue.claiming import Idle
from hpo.queue.finish import End
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim, HasClaim
from hpo.queue.report import Report
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.spec.failures import Failure, Verdict
from hpo.spec.objectives import KnownCosts
from hpo.storage import clock, sql
from hpo.storage.connect import FAILURES, UNREACHED, cause
from hpo.storage.retry import Retry, within
from hpo.storage.tables import hpo_trials, trials
from hpo.worker import storage_calls
from hpo.worker.holdings import Holdings
from hpo.worker.lease import Lease
from hpo.worker.lease_upkeep import LeaseUpkeep
from hpo.worker.signals import StopSignal
from hpo.worker.storage_calls import StorageCalls

log = logging.getLogger(__name__)
_HasClaim = TypeVar("_HasClaim", bound=HasClaim)
AT_ONCE = 100  # kept reports in one statement
FEWEST_DOUBLED = 128  # trials; Postgres plans well for fewer, whatever it believes
METRICS_AT_ONCE = 500  # reports whose raw metrics are written in one transaction; others wait for its lock
METRICS_SECONDS = 10.0  # for which raw metrics are collected; only views read them while a trial runs
NOT_ASKED = "ended by a signal that `hpo run` did not send: by the trial's own code, or by hand"


@dataclass(frozen=True, kw_only=True)
class ClaimRequest:
    """What a runner asks its worker to claim."""

    count: int  # the largest number of trials
    stack_key: str | None = None  # the key of the open stack, if there is one
    waiting_at_most: int | None = None  # how many trials may wait for another stack


class QueueClient:
    """A worker's access to the database, for all trials that it holds."""

    def __init__(self, ledger: Ledger, retry: Retry, stopping: StopSignal) -> None:
        """Start without a trial.

        Args:
            retry: how long the storage may fail.
            stopping: whether the worker was asked to stop, and whether by its parent.
        """
        self.ledger = ledger
        self.stopping = stopping
        self.calls = StorageCalls(retry)
        self.held = Holdings()
        self.upkeep = LeaseUpkeep(ledger, self.held)
        self.has_unheard_claims = False  # trials may be leased to this worker by a claim whose answer was lost
        self.has_doubled_a_study = False  # so the database's statistics are old
        self.finished: int | None = None  # how many trials of the study had finished at the last report
        self._awaited: object | None = None  # the claim that the training thread waits for, or has not held yet
        self._waits_for_others = False  # the last claim found nothing yet: the next one looks before it takes the lock
        self._claiming = threading.Lock()  # held while a thread claims, even if no thread waits for the answer any more
        self._sending = threading.Lock()  # held while a thread writes reports

    # --- trials come and go ------------------------------------------------------------------------------------------

    def claim(self, wanted: ClaimRequest, fleet: int = 1, *, may_wait: bool = True) -> list[Lease] | Idle:
        """Claim trials and hold them.

        Args:
            fleet: the run's number of workers.
            may_wait: wait while the storage fails. If False, nothing is claimed during an outage.
        """
        if not may_wait and self.calls.is_cut_off:
            return Idle.WAIT
        self._awaited = call = object()
        action = partial(self._claim, call, wanted, fleet)
        try:
            found = self.calls.retry(action) if may_wait else self.calls.ask(action)
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
        with self._alone():
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
    def _alone(self) -> Iterator[None]:
        """Keep other threads from claiming. Raises NoAnswer if another claim is not answered in time."""
        if not self._claiming.acquire(timeout=storage_calls.ANSWER_SECONDS):
            raise NoAnswer("the storage has not answered a claim yet")
        try:
            yield
        finally:
            self._claiming.release()

    def hold(self, claim: Claim) -> Lease:
        """Hold a claimed trial and return its lease. An earlier lease on the same trial is lost."""
        if not self.held.leases:
            self.calls.note_answer()  # no report is kept, and the claim was answered
        return self.held.add(claim)

    def _release_unheard(self) -> None:
        """Release trials that may have been claimed by a claim whose answer was lost."""
        if self.has_unheard_claims:
            held = [lease.claim for lease in self.held.leases]
            reaper.release_leases_of(self.ledger, self.ledger.worker, but=held)
            self.has_unheard_claims = False

    def leave(self, error: BaseException | None = None) -> None:
        """Release the trials of a worker that ends, unless the storage fails. It never raises.

        After a crash the trials that the worker knew of stay leased. They may be the cause, so the attempt must count.

        Args:
            error: why the worker ends; None if nothing is left to do.
        """
        is_crash = error is not None and not isinstance(error, (Fault, *FAILURES))
        is_away = self.calls.is_cut_off or isinstance(error, Outage)
        if is_away or not (self.held.leases or self.has_unheard_claims):
            return
        try:
            within(storage_calls.ANSWER_SECONDS, self._release_unheard_alone if is_crash else self._release_all)
        except Exception as failed:
            log.warning("trials stay leased until their leases expire: %s", cause(failed))

    def _release_all(self) -> None:
        with self._alone():
            reaper.release_leases_of(self.ledger, self.ledger.worker)

    def _release_unheard_alone(self) -> None:
        with self._alone():
            self._release_unheard()

    # --- may a trial continue? asked by the training thread ----------------------------------------------------------

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
        if self.calls.gone is not None:
            return Outage(str(self.calls.gone))
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
        if self.calls.failing_seconds > self.calls.retry.seconds:
            return Outage(f"the storage has failed for {self.calls.retry.seconds:.0f} s")
        return None

    # --- written by the training thread, which waits ANSWER_SECONDS for an answer ------------------------------------

    def report(self, reports: Sequence[Report]) -> None:
        """Write an epoch of trials in one statement, or keep it until the storage is back.

        The next `check` of a trial's lease raises if the lease was lost, or if the database refused the report for
        good. A refused report is dropped, for example one with a step that no column holds.

        Raises RuntimeError, and writes nothing, if a report's trial is not held here.
        """
        self.held.keep(reports)
        if not self.calls.is_cut_off:
            self.calls.ask(self.deliver)

    def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint file. Return False if the storage fails. Raises LostLease if the claim is lost."""
        if self.calls.is_cut_off or not self.calls.ask(partial(self._record_checkpoint, lease, checkpoint)):
            return False
        if lease.unrecorded is not None:
            lease.unrecorded.clear()
        return True

    def _record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> bool:
        self.deliver(metrics=True)
        self.ledger.record_checkpoint(lease.claim, checkpoint)
        return True

    # --- written by the training thread, which retries while the storage fails; Outage if it fails for too long ------

    def flush(self, lease: Lease | None = None) -> None:
        """Write all unsent reports. Raises LostLease if this lease is lost."""
        self.calls.retry(lambda: self.deliver(metrics=True))
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
            self.held.note_claims(told, self.calls.retry(lambda: write(told)), renewed_at=asked_at)
        except StorageGone:
            raise
        except Exception as error:
            if len(told) == 1:
                for lease in self.held.of(told):
                    lease.refused = error
                return
            for one in told:
                self._write_told(write, [one])

    def take_up_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> None:
        """Record a checkpoint that an earlier attempt could not record. Raises LostLease if the claim is lost."""
        self.calls.retry(lambda: self._record_checkpoint(lease, checkpoint))

    def curve(self, lease: Lease, metric: str) -> list[float]:
        """Return the stored raw values of a metric, in the order of the epochs."""
        return self.calls.retry(lambda: self.ledger.curve(lease.claim, metric))

    def code_has_changed(self) -> bool:
        """Return whether the study has accepted other code than its first."""
        return self.calls.retry(self.ledger.code_has_changed)

    def record_costs(self, lease: Lease, costs: Mapping[str, float], known: KnownCosts) -> None:
        """Record a trial's costs and what follows from them for its end. Raises LostLease if the claim is lost."""
        self.calls.retry(lambda: self.ledger.record_costs(lease.claim, costs, known))

    def start_over(self, lease: Lease) -> None:
        """Forget a checkpoint that cannot be read, and the curve with it. Raises LostLease if the claim is lost."""
        self.calls.retry(lambda: self.ledger.start_over(lease.claim))

    def park(self, lease: Lease, *, stack_key: str | None = None) -> None:
        """Park a trial for a later claim."""
        self.calls.retry(lambda: self.ledger.park(lease.claim, stack_key=stack_key))

    def hand_back(self, lease: Lease, given: Collection[str]) -> None:
        """Undo a claim and delete the parameters that it was given."""
        self.calls.retry(lambda: self.ledger.hand_back(lease.claim, given))

    def drop(self, lease: Lease, message: str) -> None:
        """Record that the claim is lost."""
        self.calls.retry(lambda: self.ledger.drop(lease.claim, message))

    def finish(self, ends: Sequence[End]) -> set[Claim]:
        """Settle trials that did not fail, in one transaction. Return the lost claims."""
        return self.calls.retry(lambda: self.ledger.finish_all(ends))

    def fail(self, lease: Lease, failure: Failure, *, accumulation: int | None = None) -> Verdict:
        """Record a failed attempt and apply the study's policy. Raises LostLease if the claim is lost."""
        return self.calls.retry(lambda: self.ledger.fail(lease.claim, failure, accumulation=accumulation))

    def end_as_stopped(self, lease: Lease) -> None:
        """Settle a trial that a person ended. Raises LostLease if the claim is lost."""
        self.calls.retry(lambda: self.ledger.end_as_stopped(lease.claim))

    def stop(self, reason: str) -> None:
        """Start no new trials in the study from now on."""
        self.calls.retry(lambda: self.ledger.stop(reason))

    # --- done by the heartbeat's thread ------------------------------------------------------------------------------

    def send(self) -> None:
        """Write the kept reports. Raises the storage's errors."""
        self.deliver(may_wait=False)

    def send_metrics(self) -> None:
        """Write the raw metrics once they have waited for METRICS_SECONDS. Raises the storage's errors."""
        if self._metrics_are_due and self._sending.acquire(blocking=False):
            try:
                self._write_metrics()
            finally:
                self._sending.release()

    def release_unheard(self) -> None:
        """Release what was claimed after the training thread stopped waiting for it. Raises the storage's errors."""
        if self.has_unheard_claims and self._claiming.acquire(blocking=False):
            try:
                if self._awaited is None:
                    self._release_unheard()
            finally:
                self._claiming.release()

    def refresh_statistics(self) -> None:
        """Let the database count the trials anew after a mass start. Raises the storage's errors."""
        self.has_doubled_a_study = False  # first, because the other thread may set it meanwhile
        sql.analyze(self.ledger.engine, trials, hpo_trials)

    # --- both --------------------------------------------------------------------------------------------------------

    def deliver(self, *, metrics: bool = False, may_wait: bool = True) -> None:
        """Write the unsent reports in order. Raises NoAnswer while another thread writes them.

        Args:
            metrics: also write all raw metrics that wait.
            may_wait: wait up to ANSWER_SECONDS of `storage_calls` for the other thread, if the storage does not fail.
        """
        seconds = storage_calls.ANSWER_SECONDS if may_wait and not self.calls.is_cut_off else 0
        if not self._sending.acquire(timeout=seconds):
            raise NoAnswer("the storage has not answered yet")
        try:
            if self.calls.is_cut_off and not self.held.unsent:
                self.upkeep.renew()  # shows whether the storage is back
            while self.held.unsent:
                self._write(self.held.unsent[:AT_ONCE])
            if metrics or self._metrics_are_due:
                self._write_metrics()
        finally:
            self._sending.release()
        if self.calls.is_cut_off:
            log.info("the storage is back")
        self.calls.note_answer()

    @property
    def _metrics_are_due(self) -> bool:
        return bool(self.held.without_metrics) and time.monotonic() - self.held.metrics_since >= METRICS_SECONDS

    def _write(self, reports: Sequence[Report]) -> None:
        """Write the first of the unsent reports in one statement, or one by one if the database refuses that for good.

        A refused report is dropped. The next `check` of its lease raises the reason.
        """
        renew, asked_at = self.upkeep.is_due(self.held.of(reports)), clock.awake_or_asleep()
        try:
            answer = self.ledger.report(reports, metrics=False, renew=renew)
        except UNREACHED:
            raise
        except Exception as error:
            if len(reports) > 1:
                for report in reports:
                    self._write([report])
                return
            for lease in self.held.of(reports):
                lease.refused = error
            self.held.note_sent(reports, [])
            return
        self.finished = answer.finished
        self.held.note_claims(reports, answer.lost, renewed_at=asked_at if renew else None)
        self.held.note_sent(reports, [report for report in reports if report.claim not in answer.lost])

    def _write_metrics(self) -> None:
        """Write the raw metrics that wait. Metrics that the database refuses for good are dropped with a warning."""
        while self.held.without_metrics:
            self._write_metrics_of(self.held.without_metrics[:METRICS_AT_ONCE])

    def _write_metrics_of(self, reports: Sequence[Report]) -> None:
        asked_at = clock.awake_or_asleep()
        try:
            self.held.note_claims(reports, self.ledger.write_metrics(reports), renewed_at=asked_at)
        except UNREACHED:
            raise
        except Exception as error:
            numbers = {report.claim.number for report in reports}
            if len(numbers) > 1:
                for number in sorted(numbers):
                    self._write_metrics_of([report for report in reports if report.claim.number == number])
                return
            log.warning("trial %d: raw metrics cannot be written: %s", reports[0].claim.number, cause(error))
        self.held.note_metrics_sent(reports)


def _doubles_a_study(claim: Claim) -> bool:
    """Return whether a claim begins a trial whose number is a power of two."""
    number = claim.number
    return claim.attempt == 1 and number >= FEWEST_DOUBLED and number & (number - 1) == 0
