"""Finds the search space of a user's own objective by calling it.

Each call gets the parameters of an old trial. It ends when the trial does not fit, at the first report, or a few
seconds after the last parameter. So as a rule nothing is trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.trial import FrozenTrial

from hpo.errors import SpecError
from hpo.spec.objectives import Goals
from hpo.storage.optuna_private import as_in_optimize, contains
from hpo.strategy import distributions as asked_for
from hpo.study.pinned_trial import PinnedTrial, study_in_memory

PATIENCE_SECONDS = 5.0  # a call ends so long after the last parameter
ASKING_SECONDS = 60.0  # for all calls; afterwards only new kinds of trials are called

#: What an objective asks a trial for, or why the trial does not fit.
Answer = dict[str, BaseDistribution] | str


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The parameters of a trial that fits."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    is_asked: bool  # whether the objective was called with them


class Unfit(Exception):
    """Raised for a trial that does not fit into the space. The message is the reason."""


class OtherParameters(Unfit):
    """Raised for a trial that lacks a parameter or has one too many."""


class _Enough(BaseException):
    """Raised inside an objective to end the call."""


class _AskedTrial(PinnedTrial):
    """A trial that checks each parameter it is asked for. The call ends at one that does not fit, and at a report."""

    unfit: Unfit | None = None

    def give(self, name: str, distribution: BaseDistribution) -> Any:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS) if _can_be_rung() else None
        stored = asked_for.as_stored(name, distribution)
        if name not in self.given:
            self.unfit = OtherParameters(f"has no {name}, for which the objective asks now")
        elif why := self._why_unfit(name, stored):
            self.unfit = Unfit(why)
        if self.unfit:
            raise _Enough
        return super().give(name, distribution)

    def _why_unfit(self, name: str, distribution: BaseDistribution) -> str | None:
        try:
            value = self.value_in(name, distribution)
        except SpecError:
            value = math.nan
        is_choice = isinstance(distribution, CategoricalDistribution)
        if value is math.nan or not (is_choice or contains(distribution, distribution.to_internal_repr(value))):
            return f"its {name} is not {asked_for.words(distribution)}"
        return None

    def report(self, value: float, step: int) -> None:  # noqa: ARG002  (Optuna's own signature)
        raise _Enough

    def should_prune(self) -> bool:
        raise _Enough


class Asking:
    """The parameters that an objective asks for, found by one call for each trial.

    After ASKING_SECONDS the objective is called only for a new kind of trial. Another trial is assumed to be asked for what
    all earlier ones of its kind were asked for. If they got different answers, the objective branches on a number, and
    the trial does not fit.
    """

    def __init__(
        self,
        objective: Callable[[Any], Any],
        study: str,
        goals: Goals,
        attributes: Mapping[str, Any],
        lacking: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Prepare the calls.

        Args:
            objective: the objective.
            study: the name of the study that the objective sees.
            goals: its objectives.
            attributes: its user attributes.
            lacking: values of parameters that trials may lack.
        """
        self._objective = objective
        self._lacking = lacking
        self._study = study, goals, attributes
        self._known: dict[str, list[Answer]] = {}  # the different answers by kind
        self._seconds = 0.0  # spent in calls
        self.asked = 0  # number of trials for which the objective was called

    def fitted(self, trial: FrozenTrial) -> Fitted:
        """Return the trial's parameters and their distributions as the objective asks for them.

        Raises Unfit if the objective asks for other parameters, or if a value is outside its distribution.
        """
        known = self._known.setdefault(_kind(trial), [])
        is_asked = self._seconds <= ASKING_SECONDS or not known
        if is_asked:
            answer = self._call(trial)
            known += [answer] if answer not in known else []
            if isinstance(answer, str):
                raise Unfit(answer)
        else:
            answer = _assumed(known)
        asked = self._trial(trial)
        for name, distribution in answer.items():
            if why := asked._why_unfit(name, distribution):
                raise Unfit(why)
        params = {name: asked.value_in(name, distribution) for name, distribution in answer.items()}
        return Fitted(params=params, distributions=answer, is_asked=is_asked)

    def _call(self, trial: FrozenTrial) -> Answer:
        self.asked += 1
        began = time.monotonic()
        try:
            return self._ask(trial)
        except OtherParameters as error:
            return str(error)
        finally:
            self._seconds += time.monotonic() - began

    def _trial(self, trial: FrozenTrial) -> _AskedTrial:
        name, goals, attributes = self._study
        study = study_in_memory(name, goals, attributes=attributes)
        return _AskedTrial(study, {**self._lacking, **trial.params}, number=trial.number, attributes=trial.user_attrs)

    def _ask(self, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        asked, failed = self._trial(trial), ""
        try:
            with as_in_optimize(asked.study), _ringing(), contextlib.redirect_stdout(io.StringIO()):
                self._objective(asked)
        except (_Enough, optuna.TrialPruned):
            pass
        except Exception as error:
            failed = f"; the objective failed by {type(error).__name__}: {error}"
        if asked.unfit:
            raise asked.unfit
        found = {name: asked_for.as_stored(name, distribution) for name, distribution in asked.distributions.items()}
        if others := [name for name in trial.params if name not in found]:
            raise OtherParameters(f"has {', '.join(others)}, for which the objective does not ask{failed}")
        return found


def _assumed(known: list[Answer]) -> dict[str, BaseDistribution]:
    """Return what a trial is taken to be asked for. Raises Unfit if the trials of its kind got no answer or different ones."""
    unasked = f"was not asked within {ASKING_SECONDS:.0f} s"
    if len(known) > 1:
        raise Unfit(f"{unasked}, and trials with the same choices are asked for different parameters")
    [answer] = known
    if isinstance(answer, str):
        raise Unfit(f"{unasked}, and a trial with the same choices {answer}")
    return answer


def _kind(trial: FrozenTrial) -> str:
    """Return the kind of a trial: its distributions, and the values of its categorical parameters."""

    def chosen(name: str, distribution: BaseDistribution) -> Any:
        return trial.params[name] if isinstance(distribution, CategoricalDistribution) else None

    asked = sorted(trial.distributions.items())
    return json.dumps([(name, distribution_to_json(one), chosen(name, one)) for name, one in asked])


def _can_be_rung() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _ringing() -> Iterator[None]:
    """End a call PATIENCE_SECONDS after its last parameter, by an alarm. Only the main thread can have one."""

    def ring(number: int, frame: Any) -> None:  # noqa: ARG001  (signal's own signature)
        raise _Enough

    if not _can_be_rung():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
