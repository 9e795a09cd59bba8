"""One process of a trial that has several: it calls the user's function with a trial whose worker is another process.

`python -m hpo.worker.rank`, which `hpo.own.ranked` starts under torchrun's environment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.errors import Signal
from hpo.own.rank_channel import Answer, Ask, Result, Task
from hpo.spec import program, seeds, usercode
from hpo.worker.rank_loop import RankLoop


class RankTrial(optuna.trial.BaseTrial):
    """The trial as a rank sees it. All ranks get the same values, and the same answer for the same call."""

    def __init__(self, task: Task, channel: Connection) -> None:
        self._task = task
        self._channel = channel
        self._params: dict[str, Any] = {}
        self._distributions: dict[str, BaseDistribution] = {}
        self._user_attrs = dict(task.user_attrs)
        self._constraints: dict[str, float] = {}
        self._reported: set[int] = set()
        self._last_step: int | None = None
        self.loop = RankLoop(task, self.ask)  # what `hpo.epochs` works with

    def ask(self, question: Ask) -> Any:
        """Ask the worker and wait for its answer. Raises a Signal if the attempt ends, and the worker's error."""
        self._channel.send(question)
        answer: Answer = self._channel.recv()
        if answer.ends is not None:
            raise Signal(answer.ends)
        if answer.error is not None:
            raise answer.error
        return answer.value

    # --- parameters -------------------------------------------------------------------------------------------------

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        value = self.ask(Ask(call="suggest", arguments=(name, distribution)))
        self._params[name], self._distributions[name] = value, distribution
        return value

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._suggest(name, FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._suggest(name, IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._suggest(name, CategoricalDistribution(choices))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        return self.suggest_float(name, low, high, step=q)

    # --- the curve --------------------------------------------------------------------------------------------------

    def report(self, value: float, step: int) -> None:
        """Report a value. Rank 0's counts. The others wait for it, and learn there if the attempt ends."""
        try:
            number, place = float(value), int(step)
        except (TypeError, ValueError):
            raise TypeError(f"report: value {value!r} at step {step!r} is not a number at a whole step") from None
        if place in self._reported:
            warnings.warn(f"trial {self.number}: step {place} was reported already; ignored", stacklevel=2)
            return
        self._reported.add(place)
        self._last_step = place
        self.ask(Ask(step="report", arguments=(number, place)))

    def should_prune(self) -> bool:
        """Return whether the pruner ends the trial. It is asked once, for rank 0's last report."""
        return bool(self.ask(Ask(step="prune", arguments=(self._last_step,))))

    # --- what is known of it ----------------------------------------------------------------------------------------

    def set_user_attr(self, key: str, value: Any) -> None:
        """Set an attribute. Rank 0's is recorded."""
        self._user_attrs[key] = value
        self.ask(Ask(call="attribute", arguments=(key, value)))

    def set_constraint(self, key: str, value: float) -> None:
        """Set a constraint. Rank 0's is recorded."""
        self._constraints[key] = float(value)
        self.ask(Ask(call="constraint", arguments=(key, float(value))))

    @property
    def constraints(self) -> dict[str, float]:
        return dict(self._constraints)

    @property
    def number(self) -> int:
        return self._task.number

    @property
    def params(self) -> dict[str, Any]:
        return dict(self._params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        return dict(self._user_attrs)

    @property
    def datetime_start(self) -> datetime | None:
        return None

    @property
    def study(self) -> optuna.Study:
        """Raise RuntimeError: ranks have no database."""
        raise RuntimeError("trial.study: a trial on several processes has no study; ranks have no database")


def main() -> None:
    """Call the user's function for the trial that the worker names, and tell it what came of that."""
    channel = Connection(int(os.environ.pop(program.CHANNEL)))
    task: Task = channel.recv()
    arguments = ("config", "trial") if task.key == "train" else ("trial",)
    function = usercode.load_function(task.reference, task.folder, task.key, arguments)
    trial = RankTrial(task, channel)
    seeds.seed_globals(task.seed)
    try:
        returned = function(task.config, trial) if task.key == "train" else function(trial)
    except optuna.TrialPruned as pruned:
        channel.send(Result(is_pruned=True, reason=str(pruned)))
    except Signal:  # the worker has said so
        return
    else:
        channel.send(Result(value=_plain(returned)))


def _plain(returned: Any) -> Any:
    """Return what a function has returned in a form that another process can read. The worker judges it."""
    if isinstance(returned, list | tuple):
        return [_plain(one) for one in returned]
    if returned is None or isinstance(returned, bool | int | float | str):
        return returned
    try:
        return float(returned)
    except (TypeError, ValueError):
        return repr(returned)


if __name__ == "__main__":
    main()
