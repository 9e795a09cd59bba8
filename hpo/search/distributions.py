"""What an objective asks for under a parameter's name: as a storage keeps it, in words, and beside another in one study."""

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
    """Return a distribution as it comes out of a storage; TypeError or ValueError if it holds what no storage can keep."""
    if not isinstance(distribution, CategoricalDistribution):
        return distribution
    stored = copy.copy(distribution)
    stored.choices = choices.as_stored(name, distribution.choices)
    return stored


def clash(known: BaseDistribution, asked: BaseDistribution) -> bool:
    """Say whether Optuna refuses one in a study that has the other: a change of choices, of the kind, of log."""
    try:
        check_distribution_compatibility(known, asked)
    except ValueError:
        return True
    return False


def words(distribution: BaseDistribution) -> str:
    """Return a distribution as a message has it."""
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
