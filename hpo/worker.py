"""The worker: claim a trial, run the objective on it, settle it, until nothing is left to do.

A worker holds no truth. Kill it at any instant and the study is right: its trial's lease runs out and the next claim
takes the trial up where its last checkpoint stands.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import platform
import shutil
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import optuna
from optuna.trial import TrialState

from hpo import sampling, usercode
from hpo.errors import Diverged, LostLease, Outage, Parked, Signal, StorageError
from hpo.lease import Keeper
from hpo.ledger import Claim, Idle, Ledger
from hpo.signals import StopSignal
from hpo.storage import FAILURES, cause
from hpo.study import Study, as_in_optimize
from hpo.trial import OWN_METRIC, Desk, LeasedTrial

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.2  # between two looks for a trial that another worker may have left
Objective = Callable[[LeasedTrial], Any]


def new_name() -> str:
    """Return a name that no other worker has: host, process, and a random part since process ids come again."""
    return f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter apart, which with torch loaded takes up to 2 s.

    What the interpreter does for user code at its end is done: threads are joined, exit handlers run, streams flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def work(study: Study, objective: Objective, ledger: Ledger, stopping: StopSignal, *, parent: int | None = None) -> int:
    """Run trials until the study has none left for this worker; return the exit code: 0, or 128 + a signal's number.

    Args:
        parent: the process that started this worker and without which it does not want to go on.

    Raises StorageError if the storage fails; what was at hand keeps its place.
    """
    try:
        with Keeper(ledger, parent=parent, orphaned=stopping.request) as keeper:
            while not stopping():
                claim = ledger.claim()
                if claim is Idle.DONE:
                    break
                if isinstance(claim, Idle):
                    time.sleep(IDLE_SECONDS)
                    continue
                keeper.hold(claim)
                run_trial(study, objective, claim, ledger, stopping)
                keeper.hold(None)
    except (Outage, *FAILURES) as error:
        raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
    return stopping.exit_code


def run_trial(study: Study, objective: Objective, claim: Claim, ledger: Ledger, stopping: Callable[[], bool]) -> None:
    """Run one claimed trial to its end and write that end: finished, parked or, if another owns it by now, nothing."""
    study.optuna.sampler = sampling.build(study.spec, claim.number)
    study.optuna.get_trials(deepcopy=False)  # Optuna's cache must know the new row before a parameter is set
    try:
        with as_in_optimize(study.optuna):
            run_to_its_end(study, objective, claim, ledger, stopping)
        shutil.rmtree(study.trial_folder(claim.number), ignore_errors=True)  # a settled trial goes on nowhere
    except Parked:
        ledger.park(claim)
        log.info("trial %d parked", claim.number, extra={"action": "trial_parked", "trial": claim.number})
    except LostLease as lost:
        log.warning("%s", lost, extra={"action": "lease_lost", "trial": claim.number})


def run_to_its_end(
    study: Study, objective: Objective, claim: Claim, ledger: Ledger, stopping: Callable[[], bool]
) -> None:
    """Open the trial, run the objective on it and settle it; a sampler that fails at its start fails the trial."""
    if stopping():
        raise Parked(f"trial {claim.number}: claimed as the worker was asked to stop")
    try:
        trial = open_trial(study, claim, ledger, stopping)
    except FAILURES:
        raise
    except Exception:
        ledger.finish(claim, TrialState.FAIL, None, outcome="exception", reason=traceback.format_exc())
    else:
        settle(trial, objective)


def open_trial(study: Study, claim: Claim, ledger: Ledger, stopping: Callable[[], bool]) -> LeasedTrial:
    """Return the claimed trial with the curve it has so far."""
    metric = OWN_METRIC if study.spec.objective else f"validation_{study.spec.metric}"
    curve = ledger.curve(claim, metric) if claim.checkpoint else []
    return LeasedTrial(study.optuna, Desk(ledger=ledger, claim=claim, rule=study.spec.rule, stopping=stopping), curve)


def settle(trial: LeasedTrial, objective: Objective) -> None:
    """Run the objective and settle the trial by how it ended."""
    try:
        value = trial.judge(objective(trial))
    except Signal:
        raise
    except optuna.exceptions.StorageInternalError as error:
        raise Outage(str(error)) from error
    except optuna.TrialPruned as pruned:
        trial.settle(TrialState.PRUNED, last_value(trial), outcome="pruned", reason=str(pruned) or None)
    except Diverged as diverged:
        trial.settle(TrialState.PRUNED, last_value(trial), outcome="diverged", reason=str(diverged))
    except BaseException as error:  # SystemExit, CancelledError, ...: an objective's affair, and no end of the worker
        log.warning("trial %d failed: %s: %s", trial.number, type(error).__name__, error)
        trial.settle(TrialState.FAIL, None, outcome="exception", reason=traceback.format_exc())
    else:
        trial.settle(TrialState.COMPLETE, value, outcome="complete")
    log.info("trial %d settled", trial.number, extra={"action": "trial_settled", "trial": trial.number})


def last_value(trial: LeasedTrial) -> float | None:
    """Return the last number reported to Optuna that a sampler can use: the value of a pruned trial."""
    reported = trial._cached_frozen_trial.intermediate_values
    return next((value for _, value in sorted(reported.items(), reverse=True) if math.isfinite(value)), None)


def build_objective(study: Study, folder: Path) -> Objective:
    """Return the study's objective, ready to run in this process."""
    if study.spec.objective:
        return usercode.load(study.spec.objective, folder, "objective")  # type: ignore[no-any-return]
    from hpo.objective import declared  # torch comes in here, and only if the study trains with it

    return declared(study, folder)
