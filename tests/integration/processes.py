"""Worker processes for fault tests: `hpo worker` itself, forked from a server that has torch loaded already.

Only the interpreter's start is saved: fifty killed workers would else load torch fifty times. A worker started this way
cannot recycle itself, since there is no command line to repeat; tests of that start a real process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial

from hpo.launch import fork_server
from hpo.storage.connect import plain_url
from hpo.storage.retry import Retry
from hpo.storage.tables import hpo_curves, hpo_failures, hpo_trials, intermediate_values, trials
from hpo.study.study import Study
from tests.support.waiting import PATIENCE

CONTEXT = multiprocessing.get_context("forkserver")
#: What a declared study needs, the optimizers' own imports among it, and commands of all kinds. The plots of `hpo train` and
#: the migrations of a new database took a second of each.
PRELOAD = [
    "alembic.command",
    "hpo.cli.run",
    "hpo.final.openings",
    "hpo.final.train",
    "hpo.launch.launcher",
    "hpo.launch.launching",
    "hpo.launch.local",
    "hpo.launch.search",
    "hpo.study.export",
    "hpo.worker.loop",
    "hpo.worker.objective",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "sklearn.datasets.data",
    "sklearn.datasets.descr",
    "sklearn.model_selection",
    "sqlalchemy.orm",
    "torch._dynamo",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "yaml",
]


def context() -> ForkServerContext:
    """Return what starts processes in forks of the server. All tests ask here: the first of them decides what it loads."""
    CONTEXT.set_forkserver_preload(PRELOAD)  # hpo.launch.fork_server has a server of its own
    return CONTEXT


def fork(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Start a process that calls this in a fork of the server."""
    process = context().Process(target=target, args=arguments)
    process.start()
    return process


def main(arguments: list[str], environment: dict[str, str], log: str, busy_seconds: float | None = None) -> None:
    """Be `hpo ARGUMENTS`; what it says goes to a log file.

    Args:
        busy_seconds: how long SQLite waits for a lock, if otherwise than usual.
    """
    gc.freeze()  # as a worker of `hpo run` does: the server's objects are no garbage
    os.environ.update(environment)
    fork_server.SERVER = forkserver._forkserver  # the one that this process comes from
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["hpo", *arguments]
    from hpo.cli import main
    from hpo.storage import engine, sql

    if busy_seconds is not None:
        for module in (engine, sql):
            vars(module)["BUSY_SECONDS"] = busy_seconds
    main()


class WorkerProcesses:
    """Workers of one study, and what they said."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.folder = folder
        self.started: list[ForkServerProcess] = []

    def start(self, *, busy_seconds: float | None = None) -> ForkServerProcess:
        environment = {"HPO_STORAGE": plain_url(self.study.storage.url)}
        log = self.folder / f"worker-{len(self.started)}.log"
        worker = fork(main, ["worker", self.study.name], environment, str(log), busy_seconds)
        self.started.append(worker)
        return worker

    def leave(self, workers: Sequence[ForkServerProcess], seconds: float = PATIENCE) -> list[int | None]:
        """Wait until these workers have left by themselves; return their exit codes."""
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        codes = [worker.exitcode for worker in workers]
        assert None not in codes, f"still there after {seconds} s:\n{self.said[-4000:]}"
        return codes

    def end(self) -> None:
        """Leave no process behind."""
        for worker in self.started:
            worker.kill()
            worker.join()

    @property
    def said(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("worker-*.log")))


def rows(study: Study) -> list[Any]:
    """Return our rows of the study's trials, by number."""
    with study.storage.engine.connect() as connection:
        return list(
            connection.execute(
                sa.select(hpo_trials, trials.c.number, trials.c.state)
                .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
                .where(hpo_trials.c.study_uid == study.uid)
                .order_by(trials.c.number)
            )
        )


def failures(study: Study) -> list[Any]:
    """Return the failures that were recorded, with the number of the trial of each, in their order."""
    with study.storage.engine.connect() as connection:
        return list(
            connection.execute(
                sa.select(hpo_failures, trials.c.number)
                .join(trials, trials.c.trial_id == hpo_failures.c.trial_id)
                .where(hpo_failures.c.study_uid == study.uid)
                .order_by(hpo_failures.c.failed_at)
            )
        )


def curves(study: Study) -> dict[int, dict[str, list[float]]]:
    """Return the raw curves of every trial by number and metric, but for the times."""
    found: dict[int, dict[str, list[float]]] = {}
    with study.storage.engine.connect() as connection:
        for row in connection.execute(
            sa.select(hpo_curves, trials.c.number)
            .join(trials, trials.c.trial_id == hpo_curves.c.trial_id)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.metric != "seconds")
            .order_by(trials.c.number, hpo_curves.c.metric, hpo_curves.c.epoch)
        ):
            found.setdefault(row.number, {}).setdefault(row.metric, []).append(row.value)
    return found


def reported(study: Study) -> int:
    """Return how many epochs the study's trials have reported so far, once the storage says so."""
    of_study = sa.select(sa.func.count()).select_from(intermediate_values).join(trials)

    def count() -> int:
        with study.storage.engine.connect() as connection:
            return int(connection.execute(of_study.where(trials.c.study_id == study.study_id)).scalar_one())

    return Retry(60.0)(count)


def trials_of(study: Study) -> list[FrozenTrial]:
    return study.optuna.get_trials(deepcopy=False)
