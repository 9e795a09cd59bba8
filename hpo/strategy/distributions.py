"""Distributions of parameters: as stored, compared, and in words."""

from __future__ import annotations

import copy

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)

from hpo.storage import choices


def as_stored(name: str, distribution: BaseDistribution) -> BaseDistribution:
    """Return a distribution as a storage returns it; TypeError or ValueError if a choice cannot be stored."""
    if not isinstance(distribution, CategoricalDistribution):
        return distribution
    stored = copy.copy(distribution)
    stored.choices = choices.as_stored(name, distribution.choices)
    return stored


def clash(known: BaseDistribution, asked: BaseDistribution) -> bool:
    """Return whether Optuna refuses a distribution in a study that has another: other choices, another kind, another log."""
    try:
        check_distribution_compatibility(known, asked)
    except ValueError:
        return True
    return False


def words(distribution: BaseDistribution) -> str:
    """Return a distribution in words, for a message."""
    if isinstance(distribution, CategoricalDistribution):
        return f"one of {', '.join(map(repr, distribution.choices))}"
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return str(distribution)
    kind = "an integer" if isinstance(distribution, IntDistribution) else "a number"
    has_step = distribution.step is not None and (distribution.step != 1 or isinstance(distribution, FloatDistribution))
    step = f" in steps of {distribution.step}" if has_step else ""
    return (
        f"{kind} from {distribution.low} to {distribution.high}{step}{' by its logarithm' if distribution.log else ''}"
    )
