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
from typing import Any, Protocol

import optuna

from hpo.errors import LostLease, Outage, StorageError
from hpo.queue import claiming, reaper
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.spec import usercode
from hpo.spec.failures import Failure, Kind, Verdict
from hpo.storage.connect import FAILURES, cause
from hpo.storage.retry import Patience
from hpo.study.study import Study
from hpo.worker import restart
from hpo.worker.client import Lease, Post
from hpo.worker.heartbeat import Keeper
from hpo.worker.runner import Alone, Crew, Wanted
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # until the first other look for a trial that another worker may have left
LONGEST_IDLE_SECONDS = 2.0  # each look takes the study's lock
RECYCLE = -1  # in the place of an exit code: the process is to start afresh


class Declaration(Protocol):
    """A declared training, which brings its own crew."""

    def crew(self, study: Study, post: Post, stopping: StopSignal, fleet: int) -> Crew:
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

    Raises StorageError if the storage fails for longer than the study's patience; what was at hand keeps its place.
    """
    patience = Patience(study.spec.recovery.outage_seconds, stopping)
    try:
        post = Post(ledger, patience)
        crew = crew_of(bearing(study, patience), objective, post, stopping, fleet)
        overdue = partial(end_overdue, stopping)
        with Keeper(ledger, parent=parent, orphaned=stopping.request, overdue=overdue) as keeper:
            keeper.hold(post)
            try:
                if run(crew, post, stopping, restart.Wear(study.spec.recovery), fleet) == RECYCLE:
                    return RECYCLE
            except BaseException as error:  # as a rule the storage was away for too long
                crew.leave(error)
                raise
    except (Outage, *FAILURES) as error:
        if not stopping():
            raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
        log.warning("stopping while the storage fails: %s", cause(error))
    return stopping.exit_code


def run(crew: Crew, post: Post, stopping: StopSignal, wear: restart.Wear, fleet: int) -> int:
    """Claim and train until there is nothing left or the worker is asked to stop; return 0 or RECYCLE."""
    idle, look_at = IDLE_SECONDS, 0.0
    while True:
        found = None
        if not stopping() and time.monotonic() >= look_at:
            found = fill(crew, post, stopping, fleet)
            idle = min(1.5 * idle, LONGEST_IDLE_SECONDS) if found else IDLE_SECONDS
            look_at = time.monotonic() + idle if found else 0.0
        if crew.is_busy:
            ended = crew.advance()
            reasons = [wear.reason(kind) for kind in ended]
            if (reason := next(filter(None, reasons), None)) and not stopping():
                log.info("starting afresh %s", reason, extra={"action": "recycle"})
                crew.park()
                return RECYCLE
            if ended:
                idle, look_at = IDLE_SECONDS, 0.0
        elif stopping() or found is claiming.Idle.DONE:
            return 0
        elif found is claiming.Idle.WAIT:
            time.sleep(idle)
            look_at = 0.0


def fill(crew: Crew, post: Post, stopping: StopSignal, fleet: int) -> claiming.Idle | None:
    """Claim what the crew wants, for as long as there is some; return why there was not, None if it wants nothing more."""
    while not stopping() and (wanted := crew.wants()) is not None:
        claims = next_claims(post, wanted, fleet, may_wait=not crew.is_busy)
        if isinstance(claims, claiming.Idle):
            crew.go_without()
            return claims
        crew.take(claims)
    return None


def bearing(study: Study, patience: Patience) -> Study:
    """Return the study with Optuna's calls to the storage under this patience."""
    place = dataclasses.replace(study.storage, optuna=study.storage.optuna.bearing(patience))
    opened = optuna.load_study(
        study_name=study.name, storage=place.optuna, sampler=study.optuna.sampler, pruner=study.optuna.pruner
    )
    return dataclasses.replace(study, storage=place, optuna=opened)


def next_claims(post: Post, wanted: Wanted, fleet: int = 1, *, may_wait: bool = True) -> list[Claim] | claiming.Idle:
    """Claim trials.

    Args:
        may_wait: for a storage that fails; else there is nothing to claim while it does, and training goes on.
    """

    def attempt() -> list[Claim] | claiming.Idle:
        if post.has_unheard_claims:  # the claims before this may have been made, and only their answer lost
            held = [lease.claim for lease in post.leases]
            reaper.park_all_of(post.ledger, post.ledger.worker, but=held)
        post.has_unheard_claims = True
        return claiming.claim_many(
            post.ledger,
            wanted.count,
            partition=wanted.partition,
            waiting_at_most=wanted.waiting_at_most,
            fleet=fleet,
        )

    if not may_wait and post.is_cut_off:
        return claiming.Idle.WAIT
    found = post.patience(attempt) if may_wait else post.ask(attempt)
    if found is None:
        return claiming.Idle.WAIT
    post.has_unheard_claims = False
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
    reaper.park_all_of(ledger, ledger.worker)  # whatever else this process held
    restart.start_afresh(stopping, at_once=True)


def crew_of(study: Study, objective: Objective, post: Post, stopping: StopSignal, fleet: int) -> Crew:
    """Return who runs the objective's trials, in one of so many workers."""
    if callable(objective):
        return Alone(study, objective, post, stopping)
    return objective.crew(study, post, stopping, fleet)


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.objective:
        return usercode.load(study.spec.objective, folder, "objective")  # type: ignore[no-any-return]
    from hpo.worker.objective import declared  # torch comes in here, and only if the study trains with it

    return declared(study, folder)
