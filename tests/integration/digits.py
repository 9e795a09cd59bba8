"""Studies that train scikit-learn's digits, one thread each, and their trials trained again by themselves.

"Right" means bit for bit here: the curve of an undisturbed run with the same config. Times are scaled: a lease is a second
or two, an outage a few.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hpo.spec import seeds, space
from hpo.spec.training import TrainConfig
from hpo.storage.connect import Storage
from hpo.study.study import Study
from hpo.train import loop
from hpo.train.build import assemble
from tests.integration.processes import WorkerProcesses, failures, rows, trials_of
from tests.support import declared

DOCUMENT: dict[str, Any] = {
    **declared.DOCUMENT,
    "model": {**declared.DOCUMENT["model"], "widths": [16]},
    "training": {"epochs": 12, "batch_size": 32},
    "recovery": {"lease": "2s", "checkpoint_every": "0s"},
    "failures": {"lost_worker": {"retries": 100}},
}


def made(place: Storage, folder: Path, trials: int, **changes: Any) -> Study:
    return declared.made(place, folder, {**DOCUMENT, "budget": {"trials": trials}, **changes})


def alone(study: Study, number: int) -> dict[str, list[float]]:
    """Train a trial's config again, by itself and without a study, as far as the trial went; return its curves."""
    trial = trials_of(study)[number]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = TrainConfig.from_tree(space.pin(study.spec.tree, lambda path, parameter: trial.params[path]))
        cpu = torch.device("cpu")
        splits = assemble.load_splits(config, study.spec.split_seed, study.code_folder, cpu)
        run = assemble.build_run(config, splits, seeds.of_trial(study.spec.seed, number), study.code_folder, cpu)
        found: dict[str, list[float]] = {}
        for result in loop.train(run):
            for metric, value in result.numbers.items():
                found.setdefault(metric, []).append(value)
            if result.epoch == max(trial.intermediate_values):
                break
    finally:
        torch.set_num_threads(threads)
    del found["seconds"]
    return found


def assert_finished_once(study: Study, processes: WorkerProcesses, number_of_trials: int) -> None:
    """Every trial was settled, and by one worker only; no number is missing or doubled."""
    assert [trial.number for trial in trials_of(study)] == list(range(number_of_trials))
    assert all(
        row.settled and row.state == trial.state for row, trial in zip(rows(study), trials_of(study), strict=True)
    )
    settled = Counter(line.split("trial ")[1] for line in processes.said.splitlines() if line.endswith(" settled"))
    assert set(settled.values()) <= {1}
    assert sum(settled.values()) >= number_of_trials - len(failures(study))  # a worker may die before it says so
