"""The worker: claim trials, train them, settle them, until nothing is left to do.

A worker holds no truth. Kill it at any instant and the study is right: its trials' leases run out, a reaper parks the
trials, and the next claim takes each up where its last checkpoint stands.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import optuna

from hpo.errors import LostLease, Outage, StorageError
from hpo.queue import claiming, reaper
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.spec import usercode
from hpo.spec.failures import Failure, Kind, Verdict
from hpo.storage.connect import FAILURES, cause
from hpo.storage.retry import Retry
from hpo.study.study import Study
from hpo.worker import descendants, restart
from hpo.worker.client import NOT_ASKED, Lease, QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.runner import ClaimRequest, SequentialRunner, TrialRunner
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # until the first other look for a trial that another worker may have left
LONGEST_IDLE_SECONDS = 2.0  # each look takes the study's lock
CUT_OFF = 74  # EX_IOERR of sysexits.h
RECYCLE = -1  # in the place of an exit code: the process is to start afresh


class Declaration(Protocol):
    """A declared training, which brings its own runner."""

    def runner(self, study: Study, client: QueueClient, stopping: StopSignal, fleet: int) -> TrialRunner:
        """Return who trains the study's trials, in one of so many workers."""


Objective = Callable[[LeasedTrial], Any] | Declaration  # the first is the user's own


def work(
    study: Study,
    objective: Objective,
    ledger: Ledger,
    stopping: StopSignal,
    *,
    parent: int | None = None,
    fleet: int = 1,
) -> int:
    """Run trials until the study has none left for this worker; return the exit code: 0, 128 + a signal's number, RECYCLE.

    Args:
        parent: the process that started this worker and without which it does not want to go on.
        fleet: how many workers the run has, of which this is one.

    Raises StorageError if the storage fails for longer than `recovery.outage_patience`, and StorageGone at once if its file
    was removed or replaced; what was at hand keeps its place.
    """
    retry = Retry(study.spec.recovery.outage_seconds, stopping)
    client = QueueClient(ledger, retry)
    try:
        runner = runner_of(with_retry(study, retry), objective, client, stopping, fleet)
        overdue = partial(end_overdue, stopping)
        with Heartbeat(ledger, parent=parent, leave=stopping.request, overdue=overdue) as heartbeat:
            heartbeat.hold(client)
            try:
                if run(runner, client, stopping, restart.RestartPolicy(study.spec.recovery), fleet) == RECYCLE:
                    return RECYCLE
            except BaseException as error:  # as a rule the storage was away for too long
                runner.leave(error)
                raise
    except (Outage, *FAILURES) as error:
        if client.gone is not None:
            raise client.gone from error
        if not stopping():
            raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
        log.warning("stopping while the storage fails: %s", cause(error))
    return stopping.exit_code


def run(
    runner: TrialRunner, client: QueueClient, stopping: StopSignal, policy: restart.RestartPolicy, fleet: int
) -> int:
    """Claim and train until there is nothing left or the worker is asked to stop; return 0 or RECYCLE."""
    idle, look_at = IDLE_SECONDS, 0.0
    zombies = descendants.Zombies()
    while True:
        found = None
        if not stopping() and time.monotonic() >= look_at:
            found = fill(runner, client, stopping, fleet)
            idle = min(1.5 * idle, LONGEST_IDLE_SECONDS) if found else IDLE_SECONDS
            look_at = time.monotonic() + idle if found else 0.0
        if runner.is_busy:
            ended = runner.advance()
            reasons = [policy.reason(kind) for kind in ended]
            if (reason := next(filter(None, reasons), None)) and not stopping():
                log.info("starting afresh %s", reason, extra={"action": "recycle"})
                runner.park()
                return RECYCLE
            if ended:
                zombies.reap()
                idle, look_at = IDLE_SECONDS, 0.0
        elif stopping() or found is claiming.Idle.DONE:
            return 0
        elif found is claiming.Idle.WAIT:
            time.sleep(idle)
            look_at = 0.0


def fill(runner: TrialRunner, client: QueueClient, stopping: StopSignal, fleet: int) -> claiming.Idle | None:
    """Claim what the runner wants, for as long as there is some; return why there was not, None if it wants nothing more."""
    while not stopping() and (wanted := runner.wants()) is not None:
        claims = next_claims(client, wanted, fleet, may_wait=not runner.is_busy)
        if isinstance(claims, claiming.Idle):
            runner.go_without()
            return claims
        runner.take(claims)
    return None


def with_retry(study: Study, retry: Retry) -> Study:
    """Return the study whose calls to Optuna's storage are retried while the storage fails."""
    place = dataclasses.replace(study.storage, optuna=study.storage.optuna.with_retry(retry))
    opened = optuna.load_study(
        study_name=study.name, storage=place.optuna, sampler=study.optuna.sampler, pruner=study.optuna.pruner
    )
    return dataclasses.replace(study, storage=place, optuna=opened)


def next_claims(
    client: QueueClient, wanted: ClaimRequest, fleet: int = 1, *, may_wait: bool = True
) -> list[Claim] | claiming.Idle:
    """Claim trials.

    Args:
        may_wait: for a storage that fails; else there is nothing to claim while it does, and training goes on.
    """

    def attempt() -> list[Claim] | claiming.Idle:
        if client.has_unheard_claims:  # the claims before this may have been made, and only their answer lost
            held = [lease.claim for lease in client.leases]
            reaper.release_leases_of(client.ledger, client.ledger.worker, but=held)
        client.has_unheard_claims = True
        return claiming.claim_many(
            client.ledger,
            wanted.count,
            stack_key=wanted.stack_key,
            waiting_at_most=wanted.waiting_at_most,
            fleet=fleet,
        )

    if not may_wait and client.is_cut_off:
        return claiming.Idle.WAIT
    found = client.retry(attempt) if may_wait else client.ask(attempt)
    if found is None:
        return claiming.Idle.WAIT
    client.has_unheard_claims = False
    return found


def end_overdue(stopping: StopSignal, lease: Lease) -> None:
    """End a trial whose training thread hangs, and this process with it; a process that is to stop ends by its grace."""
    said = f"trained for longer than budget.trial_timeout, and for {lease.seconds:.0f} s it has not looked up"
    ledger = lease.ledger
    try:
        if stopping():
            return
        verdict = ledger.fail(lease.claim, Failure(kind=Kind.TIME_LIMIT, message=said))
        if verdict is Verdict.DROP and not lease.has_ended:
            lease.has_ended = True  # maybe just now, by the training thread; if this is called again, it does hang
            return
    except LostLease:
        log.warning("trial %d hangs, and is in other hands by now", lease.claim.number)
    reaper.release_leases_of(ledger, ledger.worker)  # whatever else this process held
    restart.start_afresh(stopping, at_once=True)


def let_go(ledger: Ledger, stopping: StopSignal) -> None:
    """Give back all that this process holds, for it is ended now; that counts if nobody has asked for it who may."""
    if stopping.is_unasked():
        reaper.fail_leases_of(ledger, ledger.worker, NOT_ASKED)
    else:
        reaper.release_leases_of(ledger, ledger.worker)


def end_cut_off() -> NoReturn:
    """End this process, whose descriptors of the database user code has closed: it cannot write any more, nor may it."""
    log.error(
        "the trial's own code has closed descriptors that are not its own: this process lost its storage and ends"
    )
    descendants.end_with(CUT_OFF)


def runner_of(study: Study, objective: Objective, client: QueueClient, stopping: StopSignal, fleet: int) -> TrialRunner:
    """Return who runs the objective's trials, in one of so many workers."""
    if callable(objective):
        return SequentialRunner(study, objective, client, stopping)
    return objective.runner(study, client, stopping, fleet)


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.objective:
        return usercode.load_objective(study.spec.objective, folder)  # type: ignore[no-any-return]
    from hpo.worker.objective import declared  # torch comes in here, and only if the study trains with it

    return declared(study, folder)
