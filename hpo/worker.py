"""The worker: claim a trial, run the objective on it, settle it, until nothing is left to do.

A worker holds no truth. Kill it at any instant and the study is right: its trial's lease runs out, a reaper parks the
trial, and the next claim takes it up where its last checkpoint stands.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo import claiming, handover, reaping, recycling, retention, sampling, usercode
from hpo.claim import Claim
from hpo.db.trialrows import TrialRow
from hpo.errors import LostLease, Outage, Parked, Stopped, StorageError, TimeUp
from hpo.failures import Failure, Kind, Verdict, signal_behind
from hpo.keeper import Keeper
from hpo.lease import Lease
from hpo.ledger import Ledger
from hpo.outage import Patience
from hpo.rows import SECONDS
from hpo.signals import StopSignal
from hpo.storage import FAILURES, cause
from hpo.study import Study, as_in_optimize
from hpo.trial import OWN_METRIC, LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # until the first other look for a trial that another worker may have left
LONGEST_IDLE_SECONDS = 2.0  # each look takes the study's lock
RECYCLE = -1  # in the place of an exit code: the process is to start afresh
Objective = Callable[[LeasedTrial], Any]


def work(study: Study, objective: Objective, ledger: Ledger, stopping: StopSignal, *, parent: int | None = None) -> int:
    """Run trials until the study has none left for this worker; return the exit code: 0, 128 + a signal's number, RECYCLE.

    Args:
        parent: the process that started this worker and without which it does not want to go on.

    Raises StorageError if the storage fails for longer than the study's patience; what was at hand keeps its place.
    """
    patience = Patience(study.spec.recovery.outage_seconds, stopping)
    wear = recycling.Wear(study.spec.recovery)
    idle = IDLE_SECONDS
    try:
        study = bearing(study, patience)
        overdue = partial(end_overdue, stopping)
        with Keeper(ledger, parent=parent, orphaned=stopping.request, overdue=overdue) as keeper:
            while not stopping():
                claim = next_claim(ledger, patience)
                if claim is claiming.Idle.DONE:
                    break
                if isinstance(claim, claiming.Idle):
                    time.sleep(idle)
                    idle = min(1.5 * idle, LONGEST_IDLE_SECONDS)
                    continue
                idle = IDLE_SECONDS
                lease = Lease(ledger, claim, stopping=stopping, patience=patience)
                keeper.hold(lease)
                run_trial(study, objective, lease)
                keeper.hold(None)
                if (reason := wear.reason(lease.failed_by)) and not stopping():
                    log.info("starting afresh %s", reason, extra={"action": "recycle"})
                    return RECYCLE
    except (Outage, *FAILURES) as error:
        if not stopping():
            raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
        log.warning("stopping while the storage fails: %s", cause(error))
    return stopping.exit_code


def bearing(study: Study, patience: Patience) -> Study:
    """Return the study with Optuna's calls to the storage under this patience."""
    place = dataclasses.replace(study.storage, optuna=study.storage.optuna.bearing(patience))
    opened = optuna.load_study(
        study_name=study.name, storage=place.optuna, sampler=study.optuna.sampler, pruner=study.optuna.pruner
    )
    return dataclasses.replace(study, storage=place, optuna=opened)


def next_claim(ledger: Ledger, patience: Patience) -> Claim | claiming.Idle:
    """Claim a trial, waiting for a storage that fails."""
    tries = itertools.count()

    def attempt() -> Claim | claiming.Idle:
        if next(tries):  # the claim before this one may have been made, and only its answer lost
            reaping.park_all_of(ledger, ledger.worker)
        return claiming.claim(ledger)

    return patience(attempt)


def end_overdue(stopping: StopSignal, lease: Lease) -> None:
    """End a trial whose training thread hangs, and this process with it; a process that is to stop ends by its grace."""
    said = f"trained for longer than budget.trial_timeout, and for {lease.seconds:.0f} s it has not looked up"
    try:
        if stopping():
            return
        verdict = lease.ledger.fail(lease.claim, Failure(kind=Kind.TIME_LIMIT, message=said))
        if verdict is Verdict.DROP and not lease.has_ended:
            lease.has_ended = True  # maybe just now, by the training thread; if this is called again, it does hang
            return
    except LostLease:
        log.warning("trial %d hangs, and is in other hands by now", lease.claim.number)
    recycling.start_afresh(stopping, at_once=True)


def run_trial(study: Study, objective: Objective, lease: Lease) -> None:
    """Run one claimed trial to its end and write that end: settled, parked or, if another owns it by now, nothing."""
    number = lease.claim.number
    study.optuna.sampler = sampling.build(study.spec, number)
    try:
        with as_in_optimize(study.optuna):
            run_to_its_end(study, objective, lease)
        lease.patience(lambda: retention.sweep(study))
    except Parked:
        lease.patience(lambda: lease.ledger.park(lease.claim))
        log.info("trial %d parked", number, extra={"action": "trial_parked", "trial": number})
    except LostLease as lost:
        message = str(lost)
        log.warning("%s", message, extra={"action": "lease_lost", "trial": number})
        lease.patience(lambda: lease.ledger.drop(lease.claim, message))


def run_to_its_end(study: Study, objective: Objective, lease: Lease) -> None:
    """Open the trial, run the objective on it and settle it; a sampler that fails at its start fails the trial."""
    try:
        trial = open_trial(study, lease)
    except Exception as error:
        failure = Failure.of(error)
        note(lease, failure, lease.patience(lambda: lease.ledger.fail(lease.claim, failure)))
    else:
        settle(trial, objective)


def open_trial(study: Study, lease: Lease) -> LeasedTrial:
    """Return the claimed trial with the curve it has so far, what an earlier attempt could not record included."""
    claim = lease.claim
    if claim.began is not None:
        fresh = TrialRow(claim.trial_id, claim.number, TrialState.RUNNING, started=claim.began, completed=None)
        study.storage.optuna.expect(study.study_id, fresh)
    metric = OWN_METRIC if study.spec.objective else f"validation_{study.spec.metric}"
    curve = lease.patience(lambda: lease.ledger.curve(lease.claim, metric)) if lease.claim.checkpoint else []
    trial = LeasedTrial(study.optuna, lease, study.spec.rule, curve)
    handover.take(study.trial_folder(trial.number), trial)
    limit = study.spec.budget.trial_seconds
    if limit is not None:
        spent = lease.patience(lambda: sum(lease.ledger.curve(lease.claim, SECONDS)))
        lease.seconds_left = limit - spent
    return trial


def settle(trial: LeasedTrial, objective: Objective) -> None:
    """Run the objective and settle the trial by how it ended."""
    failure: Failure | None = None
    try:
        trial.lease.let_go()
        value = trial.judge(objective(trial))
    except BaseException as error:  # SystemExit, CancelledError, ...: an objective's affair, and no end of the worker
        why = signal_behind(error)  # whatever user code made of it: "pruned", for one
        if isinstance(why, Stopped):
            trial.end_as_stopped()
        elif why is not None and not isinstance(why, TimeUp):
            trial.pass_on_a_stop()
            raise why from None
        elif why is None and isinstance(error, optuna.TrialPruned):
            trial.finish_as_pruned(str(error) or None)
        else:
            failure = Failure.of(why or error)
    else:
        trial.finish(TrialState.COMPLETE, value)
    if failure is not None:  # outside of the handler: the exception's frames, and what they hold, are gone
        note(trial.lease, failure, trial.fail(failure))
    log.info("trial %d settled", trial.number, extra={"action": "trial_settled", "trial": trial.number})


def note(lease: Lease, failure: Failure, verdict: Verdict) -> None:
    """Say what an attempt failed by and what was done about it."""
    lease.failed_by = failure.kind
    log.warning("trial %d: %s (%s): %s", lease.claim.number, failure.kind, verdict, failure.message)


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.objective:
        return usercode.load(study.spec.objective, folder, "objective")  # type: ignore[no-any-return]
    from hpo.objective import declared  # torch comes in here, and only if the study trains with it

    return declared(study, folder)
