"""One worker of plain Optuna, written as Optuna's documentation advises, whose objective fails as asked; see `faults.py`.

What is of the documentation: load_study, optimize, MaxTrialsCallback over a shared database, and with `--heartbeat` an
RDBStorage with heartbeat_interval and RetryHeartbeatStaleTrialCallback. Its numbers there (60 s, grace 120 s) are scaled
down with the trials; the grace is three intervals, since SQLite's clock has whole seconds. No pruner, so that every trial that
comes to its end is COMPLETE.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

STUDY = "faulty"
STEP_SECONDS = 0.1
HEARTBEAT_SECONDS = 1
GRACE_SECONDS = 3
MAX_RETRY = 3  # of Optuna's example
FAULTY_TRIAL = 3  # the number of the one trial that goes wrong


def go_wrong(fault: str, number: int) -> None:
    """Do in the middle of a trial what was asked for."""
    if fault == "always":
        raise RuntimeError("no such file: train.npz")
    if number != FAULTY_TRIAL:
        return
    if fault == "system-exit":
        sys.exit(3)
    if fault == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def objective(trial: optuna.Trial, given: argparse.Namespace) -> float:
    """Do nothing for a second, in steps that are reported; note each where the storage's faults do not reach."""
    note(given.events, "begin", trial.number)
    x = trial.suggest_float("x", -10, 10)
    for step in range(given.steps):
        note(given.events, "step", trial.number)
        time.sleep(STEP_SECONDS)
        if step == given.steps // 2:
            go_wrong(given.fault, trial.number)
        trial.report(x**2 + 1 / (step + 1), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    note(given.events, "end", trial.number)
    return float("-inf") if given.fault == "infinity" and trial.number == FAULTY_TRIAL else x**2


def note(events: Path, event: str, number: int) -> None:
    """Add a line to the file that all workers of the study share."""
    with events.open("a") as file:
        file.write(f"{event} {number} {os.getpid()}\n")


def main() -> None:
    """Take part in the study until its trials are used up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--events", type=Path, required=True, help="file for what the objective did")
    parser.add_argument("--trials", type=int, required=True, help="of the study in all")
    parser.add_argument("--steps", type=int, default=10, help=f"of a trial, {STEP_SECONDS} s each (default 10)")
    parser.add_argument("--fault", choices=["none", "system-exit", "memory", "always", "infinity"], default="none")
    parser.add_argument("--heartbeat", action="store_true")
    parser.add_argument("--catch", action="store_true", help="catch=(Exception,)")
    parser.add_argument("--count-complete", action="store_true", help="MaxTrialsCallback's own default of states")
    given = parser.parse_args()

    storage: str | RDBStorage = given.storage
    if given.heartbeat:
        storage = RDBStorage(
            given.storage,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRY),
        )
    study = optuna.load_study(study_name=STUDY, storage=storage, pruner=optuna.pruners.NopPruner())
    states = (TrialState.COMPLETE,) if given.count_complete else None
    study.optimize(
        lambda trial: objective(trial, given),
        callbacks=[MaxTrialsCallback(given.trials, states=states)],
        catch=(Exception,) if given.catch else (),
    )


if __name__ == "__main__":
    main()
