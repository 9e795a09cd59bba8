"""What a loop of one's own pays for reports and checkpoints: `hpo.epochs` in a worker beside plain Optuna, in turn.

All sides run the same loop, Optuna and hpo on a new SQLite file: a linear model whose epoch is 1 ms of waiting, then
`trial.report` and `should_prune`. Each value is better than the one before, so hpo copies the weights in each epoch.
The time from the end of one epoch's wait to the begin of the next is measured. A run counts with the median of its
epochs. The table has the median, the lowest and the highest of the runs. Optuna's side keeps nothing. With an
interpreter that has Ray (see `vs_ray.py`), Ray's `tune.report` is measured too; `plain_ray_loop.py` is its loop.

    python benchmarks/own_loop.py
    python benchmarks/own_loop.py --epochs 1000 --repeats 5 --ray /tmp/rayenv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

import optuna
import torch
from torch import nn

import hpo
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import connect
from hpo.study import study as studies
from hpo.worker import loop as worker
from hpo.worker.signals import StopSignal

ROOT = Path(__file__).parent.parent
EPOCH_SECONDS = 0.001
Objective = Callable[[optuna.Trial], float]


def loop(epochs: int, beside: list[float], *, keeps: bool) -> Objective:
    """Return an objective that notes how long each epoch took beside its training.

    Args:
        epochs: of one trial.
        beside: gets the seconds of each epoch but the first, which begins the trial.
        keeps: iterate over `hpo.epochs`, else over `range`.
    """

    def objective(trial: optuna.Trial) -> float:
        model = nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        all_epochs = hpo.epochs(trial, epochs, model=model, optimizer=optimizer) if keeps else range(epochs)
        trained = 0.0  # when the last epoch's training ended
        for epoch in all_epochs:
            if trained:
                beside.append(time.perf_counter() - trained)
            time.sleep(EPOCH_SECONDS)
            trained = time.perf_counter()
            trial.report(-float(epoch), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 0.0

    return objective


def of_optuna(folder: Path, epochs: int) -> list[float]:
    """Return the seconds of each epoch under `study.optimize`."""
    found: list[float] = []
    study = optuna.create_study(storage=f"sqlite:///{folder}/optuna.db", pruner=optuna.pruners.MedianPruner())
    study.optimize(loop(epochs, found, keeps=False), n_trials=1)
    return found


def of_hpo(folder: Path, epochs: int, checkpoint_every: str | None) -> list[float]:
    """Return the seconds of each epoch in a worker, without checkpoints if `checkpoint_every` is None."""
    found: list[float] = []
    document = {
        "name": "loop",
        "objective": "own_loop.py:objective",
        "direction": "minimize",
        "budget": {"trials": 1},
        "checkpoints": str(folder / "checkpoints"),
        "recovery": {"checkpoint_every": checkpoint_every or "1h"},
    }
    place = connect(f"sqlite:///{folder}/hpo.db", create=True)
    study = studies.create_or_join(place, StudySpec.from_document(document), code_folder=folder, code_digest="")
    objective = loop(epochs, found, keeps=checkpoint_every is not None)
    if worker.work(study, objective, study.ledger("benchmark"), StopSignal()):
        raise SystemExit("the worker did not finish")
    place.close()
    return found


def of_ray(folder: Path, epochs: int, python: str, *arguments: str) -> list[float]:
    """Return the seconds of each epoch under Ray Tune.

    Args:
        python: an interpreter that has Ray.
        arguments: more arguments of `plain_ray_loop.py`.
    """
    output = folder / "seconds.json"
    command = [python, "-m", "benchmarks.plain_ray_loop", "--epochs", str(epochs), "--output", str(output), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-800:]}")
    return list(json.loads(output.read_text()))


SIDES: dict[str, Callable[[Path, int], list[float]]] = {
    "plain Optuna": of_optuna,
    "hpo, range": lambda folder, epochs: of_hpo(folder, epochs, None),
    "hpo.epochs, checkpoint_every = 10 s": lambda folder, epochs: of_hpo(folder, epochs, "10s"),
    "hpo.epochs, checkpoint_every = 0 s": lambda folder, epochs: of_hpo(folder, epochs, "0s"),
}


def main() -> None:
    """Parse the command line, run the sides in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=500, help="of one trial (default 500)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--ray", metavar="PYTHON", help="an interpreter with Ray, which is measured too")
    given = parser.parse_args()
    sides = dict(SIDES)
    if given.ray:
        sides["Ray's tune.report"] = partial(of_ray, python=given.ray)
        sides["the same with a checkpoint each epoch"] = lambda *args: of_ray(*args, given.ray, "--checkpoints")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    medians: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(given.repeats + 1):
        for side, run in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found = median(run(Path(folder), given.epochs))
            if repeat:  # the first run of each is not counted
                medians[side].append(1000 * found)
    load = os.getloadavg()[0]
    print(
        f"load {load:.1f} at the end, {os.cpu_count()} cores; median of {given.repeats} runs of {given.epochs} epochs\n"
    )
    print(f"| side | ms an epoch beside the training (median of {given.repeats}, range) |\n|---|---|")
    for side, found_ms in medians.items():
        print(f"| {side} | {median(found_ms):.2f} ({min(found_ms):.2f} to {max(found_ms):.2f}) |")


if __name__ == "__main__":
    main()
