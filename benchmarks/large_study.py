"""A declared study of many trials, made in bulk: what `benchmarks/commands.py` shows, exports and examines.

Nothing is trained. Each trial has its parameters from the study's own search space, the curves that a declared study
records, and a row of ours with a receipt, as our workers leave them. Some failed and hold tracebacks, some were pruned,
some are parked, and each worker holds one that runs.

    python benchmarks/large_study.py sqlite:////tmp/large.db --trials 10000
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no package that is installed

from hpo.spec import space  # noqa: E402  (after the path)
from hpo.spec.study_file import StudySpec  # noqa: E402
from hpo.storage import sql, tables  # noqa: E402
from hpo.storage.connect import connect  # noqa: E402
from hpo.storage.tables import INTERMEDIATE_TYPE, VALUE_TYPE  # noqa: E402
from hpo.study import study as studies  # noqa: E402
from hpo.study.study import Study  # noqa: E402

NAME = "large"
EPOCHS = 20
WORKERS = 30
PARKED = 20
BATCH = 1000  # trials written at once
LEASE_SECONDS = 1e7  # for which a running trial is held: longer than any measurement
#: Eight parameters, on the digits.
FILE = """
[data]
name = "digits"
[model]
name = "mlp"
widths = { choices = [[64], [64, 32], [128, 64]] }
dropout = { low = 0.0, high = 0.5 }
activation = { choices = ["relu", "gelu", "silu"] }
[training]
epochs = 20
batch_size = { choices = [32, 64, 128] }
[optimizer]
name = "adamw"
lr = { low = 1e-4, high = 1e-1, log = true }
[optimizer.adamw]
weight_decay = { low = 1e-6, high = 1e-2, log = true }
beta1 = { low = 0.8, high = 0.99 }
[schedule]
name = { choices = ["constant", "cosine", "onecycle"] }
[pruner]
name = "median"
[recovery]
lease = "1h"
"""
METRICS = ("learning_rate", "seconds", "train_loss", "validation_accuracy", "validation_loss")
TRACEBACK = "Traceback (most recent call last):\n" + "".join(
    f'  File "/home/user/project/module_{depth}.py", line {10 * depth}, in step_{depth}\n    return step(batch, {depth})\n'
    for depth in range(12)
)
RECEIPT = {
    "commit": "0" * 40,
    "versions": {"python": "3.11.7", "hpo": "0.1.0", "torch": "2.15.0", "torchvision": "0.29.2", "optuna": "5.0.0"},
    "device": "cpu",
    "processor": "AMD EPYC",
    "threads": 1,
    "executor": "stack",
    "accumulation": 1,
    "parameters": 6154,
    "split_seed": 0,
    "data_digest": "9cef978da5613d95a12d04a4d7f08c42f089239102b65632e297f03901576d7e",
}

Rows = dict[sa.Table, list[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class MadeTrial:
    """What a trial is to look like."""

    number: int
    state: TrialState
    epochs: int
    params: Mapping[str, Any]  # by name, internal values with their distributions as JSON
    attempt: int = 1
    worker: str = ""
    is_parked: bool = False


def make(url: str, folder: Path, count: int) -> Study:
    """Make the study with so many trials, the same ones each time."""
    place = connect(url, create=True)
    document = tomllib.loads(FILE) | {"name": NAME, "budget": {"trials": 2 * count}, "checkpoints": str(folder)}
    made = studies.create_or_join(place, StudySpec.from_document(document), code_folder=folder, code_digest="")
    source, sampled = random.Random(0), optuna.create_study(sampler=RandomSampler(seed=0))
    numbers = list(range(count))
    for start in range(0, count, BATCH):
        trials = [_trial(made, number, count, source, sampled) for number in numbers[start : start + BATCH]]
        with sql.writing(place.engine) as connection:
            _write(connection, made, trials, source)
    with sql.writing(place.engine) as connection:
        _workers(connection, made)
    if not place.is_sqlite:
        with place.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    return made


def _trial(made: Study, number: int, count: int, source: random.Random, sampled: optuna.Study) -> MadeTrial:
    asked = sampled.ask()
    space.suggest(made.spec.tree, asked)
    params = {
        name: (distribution.to_internal_repr(asked.params[name]), distribution_to_json(distribution))
        for name, distribution in asked.distributions.items()
    }
    worker = f"host-{number % WORKERS // 8}:{4000 + number % WORKERS}:{number % WORKERS:08x}"
    if number >= count - WORKERS:
        return MadeTrial(number=number, state=TrialState.RUNNING, epochs=number % 20, params=params, worker=worker)
    if number % (count // PARKED) == count // PARKED // 2:
        return MadeTrial(
            number=number, state=TrialState.RUNNING, epochs=7, params=params, worker=worker, is_parked=True, attempt=2
        )
    drawn = source.random()
    if drawn < 0.05:
        return MadeTrial(number=number, state=TrialState.FAIL, epochs=5, params=params, worker=worker)
    if drawn < 0.35:
        epochs = source.randint(3, EPOCHS - 1)
        return MadeTrial(number=number, state=TrialState.PRUNED, epochs=epochs, params=params, worker=worker)
    retried = 2 if drawn > 0.97 else 1
    return MadeTrial(
        number=number, state=TrialState.COMPLETE, epochs=EPOCHS, params=params, worker=worker, attempt=retried
    )


def _write(connection: sa.Connection, made: Study, trials: list[MadeTrial], source: random.Random) -> None:
    rows = [_row(made, trial) for trial in trials]
    connection.execute(tables.trials.insert(), rows)
    numbered = sa.select(tables.trials.c.number, tables.trials.c.trial_id).where(
        tables.trials.c.study_id == made.study_id, tables.trials.c.number >= trials[0].number
    )
    ids = {row.number: row.trial_id for row in connection.execute(numbered)}
    children: Rows = defaultdict(list)
    for trial in trials:
        for table, row in _children(made, trial, ids[trial.number], source):
            children[table].append(row)
    for table, found in children.items():
        connection.execute(table.insert(), found)


def _row(made: Study, trial: MadeTrial) -> dict[str, Any]:
    started = tables.utc() - timedelta(hours=100) + timedelta(seconds=trial.number)
    ended = started + timedelta(seconds=30) if trial.state.is_finished() else None
    return {
        "study_id": made.study_id,
        "number": trial.number,
        "state": trial.state,
        "datetime_start": started,
        "datetime_complete": ended,
    }


def _children(
    made: Study, trial: MadeTrial, trial_id: int, source: random.Random
) -> Iterator[tuple[sa.Table, Mapping[str, Any]]]:
    """Yield the rows that hang on one trial."""
    of_trial, ours = {"trial_id": trial_id}, {"trial_id": trial_id, "study_uid": made.uid}
    for name, (value, distribution) in trial.params.items():
        yield (
            tables.trial_params,
            of_trial | {"param_name": name, "param_value": value, "distribution_json": distribution},
        )
    best, ceiling = 0.0, source.uniform(0.6, 0.99)
    for epoch in range(1, trial.epochs + 1):
        accuracy = ceiling * (1 - math.exp(-epoch / 4)) + source.gauss(0, 0.01)
        best = max(best, accuracy)
        point = {
            "step": epoch,
            "intermediate_value": accuracy,
            "intermediate_value_type": INTERMEDIATE_TYPE.FINITE,
        }
        yield tables.intermediate_values, of_trial | point
        measured = (0.01 / epoch, 1.5 + source.random(), 2 - accuracy, accuracy, 2.1 - accuracy)
        for metric, value in zip(METRICS, measured, strict=True):
            yield tables.hpo_curves, ours | {"metric": metric, "epoch": epoch, "value": value}
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        yield tables.trial_values, of_trial | {"objective": 0, "value": best, "value_type": VALUE_TYPE.FINITE}
    yield tables.hpo_trials, ours | _our_row(trial, source)
    if trial.attempt > 1 or trial.state == TrialState.FAIL:
        fails = trial.state == TrialState.FAIL
        yield (
            tables.hpo_failures,
            ours
            | {
                "attempt": 1,
                "kind": "exception" if fails else "lost_worker",
                "verdict": "fail" if fails else "retry",
                "failed_at": 1.7e9 + trial.number,
                "worker": trial.worker,
                "message": f"RuntimeError: trial {trial.number} could not be trained" if fails else "its lease ran out",
                "traceback": f"{TRACEBACK}RuntimeError: trial {trial.number}\n" if fails else None,
            },
        )


def _our_row(trial: MadeTrial, source: random.Random) -> dict[str, Any]:
    is_running = trial.state == TrialState.RUNNING
    lease_until = time.time() + LEASE_SECONDS if is_running and not trial.is_parked else None
    return {
        "attempt": trial.attempt,
        "settled": not is_running,
        "worker": trial.worker,
        "lease_until": lease_until,
        "checkpoint_epoch": trial.epochs or None,
        "checkpoint_path": f"/no-such-folder/trial-{trial.number:06d}/attempt-1-epoch-{trial.epochs}.pt",
        "checkpoint_digest": f"{source.getrandbits(256):064x}",
        "checkpoint_attributes": "{}",
        "outcome": None if is_running else "exception" if trial.state == TrialState.FAIL else trial.state.name.lower(),
        "receipt": json.dumps(RECEIPT | {"host": trial.worker.split(":")[0], "seed": source.getrandbits(60)}),
        "stack_key": f"{source.getrandbits(3):016x}",
    }


def _workers(connection: sa.Connection, made: Study) -> None:
    now = time.time()
    connection.execute(
        tables.hpo_workers.insert(),
        [
            {
                "study_uid": made.uid,
                "study_id": made.study_id,
                "worker": f"host-{place // 8}:{4000 + place}:{place:08x}",
                "host": f"host-{place // 8}",
                "pid": 4000 + place,
                "started_at": now - 3600,
                "seen_at": now + LEASE_SECONDS,  # so that they live for as long as their trials
                "left_at": None,
                "clock_skew": 0.001,
                "versions": json.dumps(RECEIPT["versions"]),
            }
            for place in range(WORKERS)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="URL, with or without a study in it")
    parser.add_argument("--trials", type=int, default=10_000, metavar="N", help="default 10000")
    parser.add_argument("--checkpoints", type=Path, default=Path("large-checkpoints"), metavar="FOLDER")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given.checkpoints.mkdir(parents=True, exist_ok=True)
    make(given.storage, given.checkpoints.absolute(), given.trials)


if __name__ == "__main__":
    main()
