"""Workers of a user's own training loop, in a fork of this process: killed at a chosen moment, or left to the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from hpo.queue import reaper
from hpo.storage.connect import connect, plain_url
from hpo.study.study import Study, join
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

EVERY_EPOCH = {"checkpoint_every": "0s"}


def work(study: Study, objective: worker_loop.Objective, stopping: StopSignal | None = None) -> int:
    return worker_loop.work(study, objective, study.ledger("w"), stopping or StopSignal())


def trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    return study.optuna.get_trials(deepcopy=False)


def one(trial: LeasedTrial) -> float:
    """Be an objective whose value is always 1."""
    return 1.0


def timed(objective: Callable[[optuna.Trial], Any], seconds: float) -> Callable[[optuna.Trial], Any]:
    """Return an objective that kills its process so many seconds after its first trial began."""
    bomb = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def begun(trial: optuna.Trial) -> Any:
        if bomb.ident is None:
            bomb.start()
        return objective(trial)

    return begun


def killed(study: Study, objective: Callable[[optuna.Trial], Any], after: float | None = None) -> bool:
    """Run a worker in a fork of this process that is killed; return whether it was, else it has finished the study.

    Args:
        after: kills it so many seconds after its first trial began, else the objective does.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if after is not None:
                objective = timed(objective, after)
            code = work(join(connect(plain_url(study.storage.url)), study.name), objective)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    reaper.fail_leases_of(study.ledger("launcher"), "w", "killed by SIGKILL")
    return True


def once(tmp_path: Path, *moments: tuple[int, int]) -> Callable[[int, int], None]:
    """Return what kills this process at each of these moments, trial and epoch, the first time that it comes."""

    def kill(number: int, epoch: int) -> None:
        mark = tmp_path / f"killed-{number}-{epoch}"
        if (number, epoch) in moments and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def record(study: Study) -> list[tuple[Any, ...]]:
    """Return what is known of each trial of a study at its end."""
    return [(trial.state, trial.params, trial.value, trial.intermediate_values) for trial in trials(study)]
