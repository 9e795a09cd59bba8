"""A task without `hpo`: one of the processes that a user of Optuna alone starts by hand on one database.

Written in the manner of Optuna's own PyTorch example: a report and a question to the pruner after each epoch; how a trial
is trained stands in `plain_training.py`. The processes share the trials by a callback rather than by half each, so neither
waits long for the other at the end. Epochs are reported from 1, so that the rungs of successive halving are 1, 3, 9.

    export PYTHONPATH=.
    python -m benchmarks.plain_optuna --storage sqlite:///plain.db --study digits --trials 64 &
    python -m benchmarks.plain_optuna --storage sqlite:///plain.db --study digits --trials 64 --process 1 &
    wait
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import optuna
import torch
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from benchmarks import plain_training, tasks
from benchmarks.plain_training import Data
from benchmarks.tasks import Task

TAKEN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def objective(trial: optuna.Trial, task: Task, data: Data, loader_workers: int) -> float:
    """Train one trial and return its last validation accuracy or loss."""
    config = plain_training.suggest(trial, task)
    value = 0.0
    try:
        for epoch, value in enumerate(plain_training.train(config, task, data, loader_workers), start=1):
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
    except plain_training.Diverged:
        raise optuna.TrialPruned from None
    return value


def get_pruner(name: str) -> optuna.pruners.BasePruner:
    """Return the pruner, with the settings that `hpo` gives it."""
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "median":  # epochs count from 1: the first three are never pruned
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=4, n_min_trials=3)
    return optuna.pruners.NopPruner()


def prepared(given: argparse.Namespace, seed: int) -> Callable[[optuna.Trial], float]:
    """Return the objective of a task with its data, as a script has it after its first lines."""
    if not given.default_threads:
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = tasks.chosen(given)
    data = plain_training.get_data(task, given.seed)
    return lambda trial: objective(trial, task, data, given.loader_workers)


def main() -> None:
    """Take part in the study until its trials are used up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--study", required=True)
    parser.add_argument("--process", type=int, default=0, help="a number of its own for each process")
    tasks.add_arguments(parser)
    given = parser.parse_args()

    seed = 1000 * given.seed + given.process
    task, train = tasks.chosen(given), prepared(given, seed)
    study = optuna.create_study(
        study_name=given.study,
        storage=given.storage,
        direction="maximize" if task.maximizes else "minimize",
        sampler=plain_training.get_sampler(given.sampler, seed),
        pruner=get_pruner(given.pruner),
        load_if_exists=True,
    )
    study.optimize(train, callbacks=[MaxTrialsCallback(task.trials, TAKEN)])
    print(f"{len(study.trials)} trials")


if __name__ == "__main__":
    main()
