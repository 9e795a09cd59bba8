"""A task by Ray Tune without `hpo`: Optuna's sampler by OptunaSearch, ASHA as the scheduler, so many trials at a time.

Runs in an environment of its own that has Ray (see `vs_ray.py`). How a trial is trained stands in `plain_training.py`, which
`plain_optuna.py` shares; the data goes into Ray's object store once. ASHA takes the same rungs as the other sides: the
first after one epoch, each next one after three times as many. What became of the trials is written to a file, with
the time by this process's clock at which each result came in.

    PYTHONPATH=. /tmp/rayenv/bin/python -m benchmarks.plain_ray --trials 8 --output ray.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import ray  # it has an environment of its own
import torch
from optuna.distributions import distribution_to_json
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import plain_training, tasks
from benchmarks.plain_training import Config, Data
from benchmarks.tasks import Task

METRIC = "accuracy"
drawn: set[str] = set()  # the distributions that were drawn from, as Optuna's JSON


def objective(config: Config, task: Task, seed: int, threads: int | None, data: Data) -> None:
    """Train one trial, telling Ray the accuracy of each epoch."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        for accuracy in plain_training.train(config, task, data):
            tune.report({METRIC: accuracy})
    except plain_training.Diverged:
        return


def space(trial: Any, task: Task) -> None:
    """Draw a configuration; the search notes what it asks for."""
    plain_training.suggest(trial, task)
    drawn.update(distribution_to_json(one) for one in trial.distributions.values())


class Notes(tune.Callback):  # type: ignore[misc]
    """Notes each trial's epochs, its last value and when that came."""

    def __init__(self) -> None:
        self.trials: dict[str, dict[str, float]] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:  # noqa: ARG002  (Ray's own signature)
        """Take note of an epoch."""
        epochs = result["training_iteration"]
        self.trials[trial.trial_id] = {"epochs": epochs, "value": result[METRIC], "ended": time.time()}


def get_scheduler(name: str, epochs: int) -> TrialScheduler:
    """Return ASHA, or what ends no trial early."""
    if name == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="training_iteration", metric=METRIC, mode="max", max_t=epochs, grace_period=1, reduction_factor=3
    )


def search(given: argparse.Namespace, task: Task, folder: Path) -> Notes:
    """Run the study from start to end."""
    data = plain_training.get_data(task, given.seed)
    training = tune.with_parameters(
        functools.partial(objective, task=task, seed=given.seed, threads=None if given.default_threads else 1),
        data=data,
    )
    notes = Notes()
    tune.Tuner(
        tune.with_resources(training, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                space=functools.partial(space, task=task),
                metric=METRIC,
                mode="max",
                sampler=plain_training.get_sampler(given.sampler, given.seed),
            ),
            scheduler=get_scheduler(given.pruner, task.epochs),
            num_samples=given.trials,
            max_concurrent_trials=given.processes,
            reuse_actors=given.reuse_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0, callbacks=[notes]),
    ).fit()
    return notes


def main() -> None:
    """Search, and write what became of the trials."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="trials at a time, each on a core of its own")
    parser.add_argument("--reuse-actors", action="store_true", help="train many trials in one process")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    tasks.add_arguments(parser)
    given = parser.parse_args()
    if given.pruner == "median":
        parser.error("Ray Tune is compared with ASHA or without pruning")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        # Loopback alone, no dashboard, nothing sent to anyone; its files go when it ends.
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        ray.init(num_cpus=given.processes, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
        notes = search(given, tasks.chosen(given), Path(temporary) / "results")
        ray.shutdown()
    given.output.write_text(json.dumps({"trials": list(notes.trials.values()), "distributions": sorted(drawn)}))


if __name__ == "__main__":
    main()
