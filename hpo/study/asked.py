"""The space of an objective of the user's own, which nobody knows but the objective: it is called, and asks for its parameters.

A call has the parameters of an old trial. It ends where the trial turns out not to fit, at the first report, or some seconds
after the last parameter, so that as a rule nothing is trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.trial import FrozenTrial

from hpo.errors import SpecError
from hpo.search import distributions as asked_for
from hpo.spec.objectives import Goals
from hpo.study.pinned_trial import PinnedTrial, study_in_memory
from hpo.study.study import as_in_optimize

PATIENCE_SECONDS = 5.0  # for another parameter, once an objective was given some


class Unfit(Exception):
    """Raised for a trial that does not fit into a space, with the reason."""


class _Enough(BaseException):
    """Raised inside an objective once it has asked for all that is of interest."""


class _AskedTrial(PinnedTrial):
    """A trial that takes note of what it is asked for, and ends there."""

    unfit: str | None = None

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS) if _can_be_rung() else None
        stored = asked_for.as_stored(name, distribution)
        self.unfit = self._why_unfit(name, stored)
        if self.unfit:
            raise _Enough
        return super()._suggest(name, distribution)

    def _why_unfit(self, name: str, distribution: BaseDistribution) -> str | None:
        if name not in self.given:
            return f"has no {name}, for which the objective asks now"
        try:
            value = self.value_in(name, distribution)
        except SpecError:
            value = math.nan
        is_choice = isinstance(distribution, CategoricalDistribution)
        if value is math.nan or not (is_choice or distribution._contains(distribution.to_internal_repr(value))):
            return f"its {name} is not {asked_for.words(distribution)}"
        return None

    def report(self, value: float, step: int) -> None:  # noqa: ARG002  (Optuna's own signature)
        raise _Enough

    def should_prune(self) -> bool:
        raise _Enough


class Asking:
    """What an objective asks for, by calls of it as few as may do: trials that had all choices alike were asked alike."""

    def __init__(
        self, objective: Callable[[Any], Any], study: str, goals: Goals, attributes: Mapping[str, Any]
    ) -> None:
        self._objective = objective
        self._study = study, goals, attributes
        self._known: dict[str, dict[str, BaseDistribution]] = {}

    def distributions(self, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what the objective asks for with this trial's parameters; Unfit if it is not exactly what the trial has."""
        kind = _kind(trial)
        if kind not in self._known:
            self._known[kind] = self._ask(trial)
        return self._known[kind]

    def fitted(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the trial's parameters as the objective asks for them; Unfit if they are not such."""
        found = self.distributions(trial)
        asked = self._trial(trial)
        for name, distribution in found.items():
            if why := asked._why_unfit(name, distribution):
                raise Unfit(why)
        return {name: asked.value_in(name, distribution) for name, distribution in found.items()}

    def _trial(self, trial: FrozenTrial) -> _AskedTrial:
        name, goals, attributes = self._study
        study = study_in_memory(name, goals, attributes=attributes)
        return _AskedTrial(study, trial.params, number=trial.number, attributes=trial.user_attrs)

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
            raise Unfit(asked.unfit)
        found = {name: asked_for.as_stored(name, distribution) for name, distribution in asked.distributions.items()}
        if others := [name for name in trial.params if name not in found]:
            raise Unfit(f"has {', '.join(others)}, for which the objective does not ask{failed}")
        return found


def _kind(trial: FrozenTrial) -> str:
    """Return what an objective's questions may depend on: its choices, and what it asked for before."""

    def chosen(name: str, distribution: BaseDistribution) -> Any:
        return trial.params[name] if isinstance(distribution, CategoricalDistribution) else None

    asked = sorted(trial.distributions.items())
    return json.dumps([(name, distribution_to_json(one), chosen(name, one)) for name, one in asked])


def _can_be_rung() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _ringing() -> Iterator[None]:
    """End what goes on for PATIENCE_SECONDS after the objective has asked for a parameter, where signals can be had."""

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
