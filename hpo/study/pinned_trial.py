"""A trial with given parameters in a study in memory. With it a user's own objective runs as in a search.

It differs from an `optuna.Trial` in three ways: nothing is sampled, nothing is pruned, and nothing leaves memory.
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
from hpo.storage.optuna_private import ExtensibleTrial, contains, id_of, storage_of


def study_in_memory(
    name: str, goals: Goals, *, attributes: Mapping[str, Any], earlier: Sequence[FrozenTrial] = ()
) -> optuna.Study:
    """Return a study in memory with the directions, user attributes and earlier trials that an objective sees in a search."""
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
    """Return the earlier trials of a study as they were when this trial began. Trials that ended later are RUNNING."""
    began = next((trial.datetime_start for trial in trials if trial.number == number), None)
    return [_as_of(trial, began) for trial in trials if trial.number < number]


def _as_of(trial: FrozenTrial, moment: Any) -> FrozenTrial:
    if moment is None or (trial.datetime_complete is not None and trial.datetime_complete <= moment):
        return trial
    return optuna.trial.create_trial(state=TrialState.RUNNING)


class PinnedTrial(ExtensibleTrial):
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
            study: the study, made by `study_in_memory`.
            params: values as they come out of a storage; one of the objective's choices is found by its JSON text.
            number: the trial's number, which many objectives use as a seed.
            attributes: the trial's first user attributes, as a queued trial may have them.
        """
        super().__init__(study, storage_of(study).create_new_trial(id_of(study)))
        self.given = dict(params)
        self.loop: object = None  # what a command works with; `hpo.epochs` needs none here
        self.refused: SpecError | None = (
            None  # why a parameter cannot be given; the objective may have caught the error
        )
        self.cached.number = number
        for key, value in (attributes or {}).items():
            self.set_user_attr(key, value)

    @property
    def curve(self) -> list[float]:
        """The reported values, by step."""
        return [value for _, value in sorted(self.cached.intermediate_values.items())]

    @property
    def relative_params(self) -> dict[str, Any]:
        """All parameters, as from a sampler that draws them together."""
        return dict(self.given)

    def give(self, name: str, distribution: BaseDistribution) -> Any:
        frozen = self.cached
        if name in frozen.distributions:
            check_distribution_compatibility(frozen.distributions[name], distribution)
            return frozen.params[name]
        value = self.value_in(name, distribution)
        internal = distribution.to_internal_repr(value)
        if not contains(distribution, internal):
            warnings.warn(
                f"params.{name} = {value!r} is outside of what the objective asks for: {distribution}", stacklevel=4
            )
        with contextlib.suppress(ValueError):  # earlier trials had other choices
            self.storage.set_trial_param(self.own_id, name, internal, distribution)
        frozen.params[name], frozen.distributions[name] = value, distribution
        return value

    def value_in(self, name: str, distribution: BaseDistribution) -> Any:
        """Return the value of a parameter in this distribution. A choice is returned as the objective's own object.

        Raises SpecError for a parameter that is not given, is not a number, or is none of the choices.
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
        """Record a value, also with several objectives. A step that was reported already is ignored, as in a search."""
        value, step = float(value), int(step)
        if step in self.cached.intermediate_values:
            return
        self.storage.set_trial_intermediate_value(self.own_id, step, value)
        self.cached.intermediate_values[step] = value

    def should_prune(self) -> bool:
        """Return False: this trial is never pruned."""
        return False
