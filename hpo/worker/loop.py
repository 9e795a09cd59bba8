"""The worker: claim trials, train them and settle them until nothing is left to do.

A worker holds no state that the study needs. It may be killed at any moment. Then its leases expire, a reaper parks the
trials, and the next claim resumes each from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from hpo.errors import LostLease, Outage, StorageError
from hpo.own import training
from hpo.queue import reaper
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.spec.failures import Failure, Kind, Verdict
from hpo.storage.connect import FAILURES, cause
from hpo.storage.retry import Retry
from hpo.study.checkpoint_store import CheckpointStore
from hpo.study.study import Study
from hpo.worker import descendants, restart
from hpo.worker.client import NOT_ASKED, QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.lease import Lease
from hpo.worker.runner import SequentialRunner, TrialRunner
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # from a claim that found nothing to the next one, which may find what another worker has parked
LONGEST_IDLE_SECONDS = 2.0  # each claim takes the study's lock
#: Growth of the pauses. The next claim of an idle worker comes within 0.22 s and a tenth of the time that it has been idle.
BUSY_GROWTH, IDLE_GROWTH = 1.5, 1.1
CUT_OFF = 74  # EX_IOERR of sysexits.h
RECYCLE = -1  # in place of an exit code: the process must restart


class Declaration(Protocol):
    """A declared training, which makes its own runner."""

    def runner(self, study: Study, client: QueueClient, fleet: int) -> TrialRunner:
        """Return the runner of the study's trials.

        Args:
            fleet: the run's number of workers.
        """


Objective = Callable[[LeasedTrial], Any] | Declaration  # a function is the user's own objective


def work(
    study: Study,
    objective: Objective,
    ledger: Ledger,
    stopping: StopSignal,
    *,
    parent: int | None = None,
    fleet: int = 1,
) -> int:
    """Run trials until the study has none left for this worker. Return the exit code.

    The exit code is 0, 128 + the number of the signal that asked to stop, or RECYCLE.

    Args:
        parent: the id of the process that started this worker. The worker stops when it is gone.
        fleet: the run's number of workers.

    Raises StorageError if the storage fails for longer than `recovery.outage_patience`. Raises StorageGone at once if
    its file was removed or replaced. Trials in training are saved first.
    """
    retry = Retry(study.spec.recovery.outage_seconds, stopping)
    client = QueueClient(ledger, retry, stopping)
    client.has_unheard_claims = restart.MARK in os.environ  # under the same name, from before the restart
    try:
        runner = runner_of(with_retry(study, retry), objective, client, fleet)
        overdue = partial(end_overdue, ledger, stopping)
        with Heartbeat(client, parent=parent, leave=stopping.request, retire=stopping.retire, overdue=overdue):
            try:
                code = run(runner, client, restart.RestartPolicy(study.spec.recovery), fleet, study.store)
            except BaseException as error:  # usually an outage that lasted too long
                runner.leave(error)
                client.leave(error)
                raise
            client.leave()
            if code == RECYCLE:
                return RECYCLE
    except (Outage, *FAILURES) as error:
        if client.calls.gone is not None:
            raise client.calls.gone from error
        if not stopping():
            raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
        log.warning("stopping while the storage fails: %s", cause(error))
    return stopping.exit_code


def run(
    runner: TrialRunner, client: QueueClient, policy: restart.RestartPolicy, fleet: int, store: CheckpointStore
) -> int:
    """Claim and train until nothing is left or the worker is asked to stop. Return 0 or RECYCLE."""
    pause, zombies = Pause(), descendants.Zombies()
    while runner.is_busy or not client.stopping():
        found = fill(runner, client, fleet, pause, store)
        if runner.is_busy:
            ended = runner.advance()
            reasons = [policy.reason(kind) for kind in ended]
            if (reason := next(filter(None, reasons), None)) and not client.stopping():
                log.info("restarting %s", reason, extra={"action": "recycle"})
                runner.park()
                return RECYCLE
            if ended:
                zombies.reap()
                pause.end()
        elif found is Idle.DONE:
            return 0
        elif found is Idle.WAIT:
            pause.wait()
    return 0


def fill(runner: TrialRunner, client: QueueClient, fleet: int, pause: Pause, store: CheckpointStore) -> Idle | None:
    """Claim what the runner wants, until there is nothing to claim or the runner wants nothing more.

    While a bucket does not answer nothing is claimed, since a claimed trial may need its checkpoint.

    Returns why there is nothing to claim, else None.
    """
    while pause.is_over and not client.stopping() and (wanted := runner.wants()) is not None:
        leases = Idle.WAIT if store.is_away else client.claim(wanted, fleet, may_wait=not runner.is_busy)
        if isinstance(leases, Idle):
            runner.go_without()
            pause.begin(is_busy=runner.is_busy)
            return leases
        runner.take(leases)
        pause.end()
    return None


class Pause:
    """The pause between claims. It grows with each claim that finds nothing, because each takes the study's lock."""

    def __init__(self) -> None:
        self._seconds, self._until = IDLE_SECONDS, 0.0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until

    def begin(self, *, is_busy: bool) -> None:
        growth = BUSY_GROWTH if is_busy else IDLE_GROWTH
        self._seconds = min(growth * self._seconds, LONGEST_IDLE_SECONDS)
        self._until = time.monotonic() + self._seconds

    def wait(self) -> None:
        time.sleep(max(0.0, self._until - time.monotonic()))

    def end(self) -> None:
        """Let the next claim come at once, because there may be trials."""
        self._seconds, self._until = IDLE_SECONDS, 0.0


def with_retry(study: Study, retry: Retry) -> Study:
    """Return the study with calls to Optuna's storage that are retried while the storage fails."""
    return dataclasses.replace(study, storage=dataclasses.replace(study.storage, retry=retry))


def end_overdue(ledger: Ledger, stopping: StopSignal, lease: Lease) -> None:
    """End a trial whose training thread hangs, and restart this process. A process that was asked to stop is left alone."""
    said = f"trained for longer than budget.trial_timeout and hangs: this attempt has lasted {lease.seconds:.0f} s"
    try:
        if stopping():
            return
        verdict = ledger.fail(lease.claim, Failure(kind=Kind.TIME_LIMIT, message=said))
        if verdict is Verdict.DROP and not lease.has_ended:
            lease.has_ended = True  # perhaps just now, by the training thread; at the next call the thread does hang
            return
    except LostLease:
        log.warning("trial %d hangs, and another process has claimed or ended it", lease.claim.number)
    reaper.release_leases_of(ledger, ledger.worker)  # the other trials that this process held
    restart.start_afresh(stopping, ledger.worker, at_once=True)


def give_all_back(ledger: Ledger, stopping: StopSignal) -> None:
    """Release all trials of this process, which ends now. If an unknown sender asked for it, their attempts fail."""
    if stopping.is_unasked():
        reaper.fail_leases_of(ledger, ledger.worker, NOT_ASKED)
    else:
        reaper.release_leases_of(ledger, ledger.worker)


def end_cut_off() -> NoReturn:
    """End this process after user code has closed its descriptors of the database. It cannot write any more."""
    log.error(
        "the trial's own code has closed descriptors that are not its own: this process lost its storage and ends; "
        "let the code close only files that it has opened"
    )
    descendants.end_with(CUT_OFF)


def runner_of(study: Study, objective: Objective, client: QueueClient, fleet: int) -> TrialRunner:
    """Return the runner of the objective's trials.

    Args:
        fleet: the run's number of workers.
    """
    if callable(objective):
        return SequentialRunner(study, objective, client)
    return objective.runner(study, client, fleet)


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.is_pickled and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("fork")  # a DataLoader's processes cannot import a class of a notebook's cell
    if not study.spec.is_declared:
        return training.load(study.spec, folder)
    from hpo.worker.objective import declared  # imports torch, which only a declared study needs

    return declared(study, folder)
