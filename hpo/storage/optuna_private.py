"""Public names for all private names of Optuna that we use. Optuna 5.0 has no public API for these.

No other module may use a private name of Optuna: `tests/test_optuna_private.py` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space.group_decomposed import _SearchSpaceGroup as SearchSpaceGroup
from optuna.storages import BaseStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

__all__ = ["FrozenStudy", "SearchSpaceGroup"]

# --- studies ----------------------------------------------------------------------------------------------------------


def storage_of(study: optuna.Study) -> BaseStorage:
    return study._storage


def id_of(study: optuna.Study) -> int:
    """Return the study's id in its storage."""
    return study._study_id


@contextmanager
def as_in_optimize(study: optuna.Study) -> Iterator[None]:
    """Run a trial as `study.optimize` does: `study.stop()` is allowed, and the sampler reads the trials again."""
    look_anew(study)
    study._thread_local.in_optimize_loop = True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def look_anew(study: optuna.Study) -> None:
    """Let the sampler read the trials again.

    Optuna caches a sampler's list of trials until `ask` or `tell` is called, and we call neither. Without this, a
    worker's TPE and CMA-ES would always see the study as it was at their first trial.
    """
    study._thread_local.cached_all_trials = None


def forget_stop(study: optuna.Study) -> None:
    """Clear a stop request after it was passed on. The study may be resumed in this process."""
    study._stop_flag = False


def stop_was_requested(study: optuna.Study) -> bool:
    """Return whether a sampler or an objective called `study.stop()` in this process."""
    return bool(study._stop_flag)


# --- trials and their parameters --------------------------------------------------------------------------------------


def trial_id_of(trial: FrozenTrial) -> int:
    """Return the trial's id in its storage."""
    return trial._trial_id


def contains(distribution: BaseDistribution, internal: float) -> bool:
    """Return whether a distribution contains a value in Optuna's internal representation."""
    return distribution._contains(internal)


def bracket_of(study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
    """Return the study as the trial's sampler sees it: with Hyperband, the trials of one bracket."""
    return optuna.pruners._filter_study(study, trial)


class ExtensibleTrial(optuna.trial.Trial):
    """An Optuna trial whose subclass may give the parameters."""

    @property
    def own_id(self) -> int:
        """The trial's id in its storage."""
        return self._trial_id

    @property
    def cached(self) -> FrozenTrial:
        """The trial as this object knows it."""
        return self._cached_frozen_trial

    @property
    def queued_with(self) -> dict[str, Any]:
        """The values with which the trial was queued."""
        values: dict[str, Any] = self._fixed_params
        return values

    def read_anew(self) -> FrozenTrial:
        """Return the cached trial, whose attributes are read again."""
        return self._get_latest_trial()

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        return self.give(name, distribution)

    def give(self, name: str, distribution: BaseDistribution) -> Any:
        """Return the value of a parameter that the objective asks for."""
        return super()._suggest(name, distribution)


# --- pruners ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PercentileSettings:
    """What a percentile pruner was built with."""

    percentile: float
    startup_trials: int
    warmup_steps: int
    interval_steps: int
    min_trials: int

    @classmethod
    def of(cls, pruner: optuna.pruners.PercentilePruner) -> PercentileSettings:
        return cls(
            percentile=pruner._percentile,
            startup_trials=pruner._n_startup_trials,
            warmup_steps=pruner._n_warmup_steps,
            interval_steps=pruner._interval_steps,
            min_trials=pruner._n_min_trials,
        )


@dataclass(frozen=True, kw_only=True)
class HalvingSettings:
    """What a pruner by successive halving was built with."""

    min_resource: int | None  # None: Optuna takes it from the first trial
    factor: int
    min_early_stopping_rate: int
    bootstrap: int

    @classmethod
    def of(cls, pruner: optuna.pruners.SuccessiveHalvingPruner) -> HalvingSettings:
        return cls(
            min_resource=pruner._min_resource,
            factor=pruner._reduction_factor,
            min_early_stopping_rate=pruner._min_early_stopping_rate,
            bootstrap=pruner._bootstrap_count,
        )


def max_resource_of(pruner: optuna.pruners.HyperbandPruner) -> int | None:
    """Return the last step of Hyperband's trials, None if Optuna takes it from the first trial."""
    return pruner._max_resource if isinstance(pruner._max_resource, int) else None


def brackets_of(
    pruner: optuna.pruners.HyperbandPruner, study: optuna.Study
) -> tuple[Sequence[optuna.pruners.SuccessiveHalvingPruner], Sequence[int]]:
    """Return Hyperband's pruner and share of the trials for each bracket. `max_resource` must be known."""
    if not pruner._pruners:
        pruner._try_initialization(study)
    return pruner._pruners, pruner._trial_allocation_budgets


# --- samplers ---------------------------------------------------------------------------------------------------------


class NumberedQMC(optuna.samplers.QMCSampler):
    """A QMC sampler that uses the trial's number as the place in the sequence.

    Optuna counts places in a study attribute without a lock, so parallel workers may get the same place.
    """

    def __init__(self, *, number: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.number = number

    def _find_sample_id(self, study: optuna.Study, search_space: Any) -> int:  # noqa: ARG002  (Optuna's own signature)
        return self.number


class ExtensibleTPE(optuna.samplers.TPESampler):
    """Optuna's TPESampler, whose subclass may replace its steps."""

    # --- how it was built -------------------------------------------------------------------------------------------

    def draws_together(self, study: optuna.Study) -> bool:
        """Return whether parameters are drawn from one joint distribution."""
        return self._is_multivariate(study)

    @property
    def is_grouped(self) -> bool:
        """Whether parameters are drawn in groups."""
        return self._group

    @property
    def warns_of_independent(self) -> bool:
        return self._warn_independent_sampling

    @property
    def startup_trials(self) -> int:
        """The number of trials that are drawn at random first."""
        return self._n_startup_trials

    @property
    def has_liars(self) -> bool:
        """Whether running trials count as bad ones."""
        return self._constant_liar

    def count_good(self, trials: int) -> int | None:
        """Return how many of so many finished trials count as good, None for Optuna's default."""
        return None if self._gamma is None else self._gamma(trials)

    # --- its steps --------------------------------------------------------------------------------------------------

    def keep_groups(self, groups: SearchSpaceGroup) -> None:
        """Draw parameters in these groups from now on."""
        self._search_space_group = groups

    def _sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.sample_group(study, trial, search_space)

    def sample_group(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample one group of parameters."""
        return super()._sample_relative(study, trial, search_space)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.sample_from_history(study, trial, search_space)

    def sample_from_history(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample parameters as Optuna does, from its own list of trials."""
        return super()._sample(study, trial, search_space)

    def sample_at_random(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self._random_sampler.sample_independent(study, trial, name, distribution)

    def draw(
        self, good: dict[str, Any], bad: dict[str, Any], search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw a group of parameters as TPESampler._sample does (Bergstra et al., 2011; Watanabe, 2023).

        Args:
            good: the internal values of the good trials by parameter, one array each.
            bad: those of the others.
        """
        below, above = (
            self._parzen_estimator_cls(values, search_space, self._parzen_estimator_parameters)
            for values in (good, bad)
        )
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {name: found.to_external_repr(best[name]) for name, found in search_space.items()}
