"""A trial with given parameters, in a study that lives in memory: an objective of the user's own runs as it ran in a search.

It is an `optuna.Trial` in every respect, but for three: nothing is sampled, nothing is pruned, and nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import SpecError, nearest
from hpo.spec.objectives import Goals
from hpo.storage import choices


def study_in_memory(
    name: str, goals: Goals, *, attributes: Mapping[str, Any], earlier: Sequence[FrozenTrial] = ()
) -> optuna.Study:
    """Return a study as an objective finds it in a search: with its directions, its user attributes, and the trials before."""
    made = optuna.create_study(
        study_name=name,
        directions=list(goals.directions.values()),
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    if goals.are_several:
        made.set_metric_names(goals.names)
    for key, value in attributes.items():
        made.set_user_attr(key, value)
    made.add_trials(earlier)
    return made


def trials_before(trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Return the trials of a study as the one with this number found them when it began: those that had not ended run."""
    began = next((trial.datetime_start for trial in trials if trial.number == number), None)
    return [_as_of(trial, began) for trial in trials if trial.number < number]


def _as_of(trial: FrozenTrial, moment: Any) -> FrozenTrial:
    if moment is None or (trial.datetime_complete is not None and trial.datetime_complete <= moment):
        return trial
    return optuna.trial.create_trial(state=TrialState.RUNNING)


class PinnedTrial(optuna.trial.Trial):
    """A trial whose parameters are known beforehand."""

    def __init__(
        self,
        study: optuna.Study,
        params: Mapping[str, Any],
        *,
        number: int = 0,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a trial in a study in memory.

        Args:
            params: values as they come out of a storage; a choice of the objective's is found by its JSON text.
            number: from which many an objective takes its seed.
            attributes: user attributes that it begins with, as a queued trial may.
        """
        super().__init__(study, study._storage.create_new_trial(study._study_id))
        self.given = dict(params)
        self.refused: SpecError | None = None  # why a parameter cannot be had; the objective may have caught it
        self._cached_frozen_trial.number = number
        for key, value in (attributes or {}).items():
            self.set_user_attr(key, value)

    @property
    def curve(self) -> list[float]:
        """What was reported, in the order of the steps."""
        return [value for _, value in sorted(self._cached_frozen_trial.intermediate_values.items())]

    @property
    def relative_params(self) -> dict[str, Any]:
        """The parameters, as a sampler gives them that draws all at once."""
        return dict(self.given)

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        frozen = self._cached_frozen_trial
        if name in frozen.distributions:
            check_distribution_compatibility(frozen.distributions[name], distribution)
            return frozen.params[name]
        value = self.value_in(name, distribution)
        internal = distribution.to_internal_repr(value)
        if not distribution._contains(internal):
            warnings.warn(
                f"params.{name} = {value!r} is outside of what the objective asks for: {distribution}", stacklevel=4
            )
        with contextlib.suppress(ValueError):  # the trials before had other choices
            self.storage.set_trial_param(self._trial_id, name, internal, distribution)
        frozen.params[name], frozen.distributions[name] = value, distribution
        return value

    def value_in(self, name: str, distribution: BaseDistribution) -> Any:
        """Return the value of a parameter as this distribution has it: of a choice the objective's own object.

        Raises SpecError for a parameter that is not given, that is no number, or that is none of the choices.
        """
        if name not in self.given:
            raise self._refuse(f"params.{name}: is missing, and the objective asks for it{nearest(name, self.given)}")
        value = self.given[name]
        if isinstance(distribution, CategoricalDistribution):
            place = choices.position(distribution.choices, value)
            if place is None:
                legal = ", ".join(map(repr, distribution.choices))
                raise self._refuse(f"params.{name} = {value!r}: is none of the objective's choices: {legal}")
            return distribution.choices[place]
        is_integer = isinstance(distribution, IntDistribution)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or math.isnan(value)
            or (is_integer and value % 1)
        ):
            raise self._refuse(f"params.{name} = {value!r}: is not {'an integer' if is_integer else 'a number'}")
        return int(value) if is_integer else float(value)

    def _refuse(self, why: str) -> SpecError:
        self.refused = self.refused or SpecError(why)
        return self.refused

    def report(self, value: float, step: int) -> None:
        """Take note of a value, of several objectives too; a step that was reported already is ignored, as in a search."""
        value, step = float(value), int(step)
        if step in self._cached_frozen_trial.intermediate_values:
            return
        self.storage.set_trial_intermediate_value(self._trial_id, step, value)
        self._cached_frozen_trial.intermediate_values[step] = value

    def should_prune(self) -> bool:
        """Return False: this trial has its turn to the end."""
        return False
