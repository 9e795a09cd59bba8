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
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo import claiming, handover, reaping, recycling, retention, sampling, usercode
from hpo.errors import LostLease, Outage, Parked, Signal, Stopped, StorageError, TimeUp
from hpo.failures import Failure, Kind
from hpo.keeper import Keeper
from hpo.lease import Lease
from hpo.ledger import Claim, Ledger
from hpo.outage import Patience, patient
from hpo.rows import SECONDS
from hpo.signals import StopSignal
from hpo.storage import FAILURES, cause
from hpo.study import Study, as_in_optimize
from hpo.trial import OWN_METRIC, LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # between two looks for a trial that another worker may have left
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
    try:
        study = bearing(study, patience)
        with Keeper(ledger, parent=parent, orphaned=stopping.request, overdue=end_overdue) as keeper:
            while not stopping():
                claim = next_claim(ledger, patience)
                if claim is claiming.Idle.DONE:
                    break
                if isinstance(claim, claiming.Idle):
                    time.sleep(IDLE_SECONDS)
                    continue
                lease = Lease(
                    ledger, claim, stopping=stopping, patience=patience, seconds_left=seconds_left(study, ledger, claim)
                )
                keeper.hold(lease)
                run_trial(study, objective, lease)
                keeper.hold(None)
                if (reason := wear.reason(lease.failed_by)) and not stopping():
                    log.info("starting afresh %s", reason, extra={"action": "recycle"})
                    return RECYCLE
    except (Outage, *FAILURES) as error:
        if not stopping():
            raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
    return stopping.exit_code


def bearing(study: Study, patience: Patience) -> Study:
    """Return the study with Optuna's calls to the storage under this patience."""
    backend = patient(study.storage.optuna, patience)
    opened = optuna.load_study(
        study_name=study.name, storage=backend, sampler=study.optuna.sampler, pruner=study.optuna.pruner
    )
    return dataclasses.replace(study, optuna=opened)


def next_claim(ledger: Ledger, patience: Patience) -> Claim | claiming.Idle:
    """Claim a trial, waiting for a storage that fails."""
    tries = itertools.count()

    def attempt() -> Claim | claiming.Idle:
        if next(tries):  # the claim before this one may have been made, and only its answer lost
            reaping.park_all_of(ledger, ledger.worker)
        return claiming.claim(ledger)

    return patience(attempt)


def seconds_left(study: Study, ledger: Ledger, claim: Claim) -> float | None:
    """Return how long the trial may still train, None if there is no limit."""
    limit = study.spec.budget.trial_seconds
    if limit is None or claim.checkpoint is None:
        return limit
    return limit - sum(ledger.curve(claim, SECONDS))


def end_overdue(lease: Lease) -> None:
    """End a trial whose training thread hangs, and this process with it."""
    said = f"trained for longer than budget.trial_timeout, and for {lease.seconds:.0f} s it has not looked up"
    lease.ledger.fail(lease.claim, Failure(kind=Kind.TIME_LIMIT, message=said))
    recycling.start_afresh()


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
    lease.let_go()
    lease.claim = lease.patience(lambda: handover.take(study.trial_folder(lease.claim.number), lease))
    study.optuna.get_trials(deepcopy=False)  # Optuna's cache must know the new row before a parameter is set
    try:
        trial = open_trial(study, lease)
    except Exception as error:
        failure = Failure.of(error)
        lease.patience(lambda: lease.ledger.fail(lease.claim, failure))
    else:
        settle(trial, objective)


def open_trial(study: Study, lease: Lease) -> LeasedTrial:
    """Return the claimed trial with the curve it has so far."""
    metric = OWN_METRIC if study.spec.objective else f"validation_{study.spec.metric}"
    curve = lease.patience(lambda: lease.ledger.curve(lease.claim, metric)) if lease.claim.checkpoint else []
    return LeasedTrial(study.optuna, lease, study.spec.rule, curve)


def settle(trial: LeasedTrial, objective: Objective) -> None:
    """Run the objective and settle the trial by how it ended."""
    failure: Failure | None = None
    try:
        value = trial.judge(objective(trial))
    except Stopped:
        trial.end_as_stopped()
    except optuna.TrialPruned as pruned:
        trial.finish(TrialState.PRUNED, trial.last_value(), reason=str(pruned) or None)
    except BaseException as error:  # SystemExit, CancelledError, ...: an objective's affair, and no end of the worker
        if isinstance(error, Signal) and not isinstance(error, TimeUp):
            raise
        failure = Failure.of(error)
    else:
        trial.finish(TrialState.COMPLETE, value)
    if failure is not None:  # outside of the handler: the exception's frames, and what they hold, are gone
        trial.lease.failed_by = failure.kind
        verdict = trial.fail(failure)
        log.warning("trial %d: %s (%s): %s", trial.number, failure.kind, verdict, failure.message)
    log.info("trial %d settled", trial.number, extra={"action": "trial_settled", "trial": trial.number})


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.objective:
        return usercode.load(study.spec.objective, folder, "objective")  # type: ignore[no-any-return]
    from hpo.objective import declared  # torch comes in here, and only if the study trains with it

    return declared(study, folder)
