"""Compares the choices of a categorical parameter by their JSON text, as which Optuna's storage keeps them.

Optuna itself compares choices by `==`. For that 1, 1.0 and True are equal, and a stored list is not the tuple that was
given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SCALARS = (str, int, float, bool, type(None))


def as_stored(name: str, choices: Sequence[Any]) -> tuple[Any, ...]:
    """Return choices as they come out of a storage: a tuple as a list, an enumeration's member as its value.

    Raises TypeError for a choice that no storage can hold, ValueError for two choices with the same JSON text.
    """
    if all(type(choice) in SCALARS for choice in choices):
        return tuple(choices)
    known: dict[str, Any] = {}
    for choice in choices:
        try:
            text = json.dumps(choice)
        except (TypeError, ValueError, RecursionError):
            raise TypeError(
                f"{name}: the choice {choice!r} is of type {type(choice).__name__}, which no storage can hold; "
                "give texts as choices, and look up in the objective what they stand for"
            ) from None
        if repr(known.setdefault(text, choice)) != repr(choice):
            raise ValueError(f"{name}: the choices {known[text]!r} and {choice!r} are both stored as {text}; keep one")
    return tuple(json.loads(json.dumps(choice)) for choice in choices)


def position(choices: Sequence[Any], value: Any) -> int | None:
    """Return the index of a value among choices, by its JSON text, else by `==`. None if it is not among them."""
    texts, text = [_text(choice) for choice in choices], _text(value)
    if text in texts:
        return texts.index(text)
    return next((place for place, choice in enumerate(choices) if choice == value), None)


def internal(distribution: BaseDistribution, value: Any) -> float:
    """Return a value as Optuna's tables hold it. Raises ValueError if it is none of the choices."""
    from optuna.distributions import CategoricalDistribution

    place = position(distribution.choices, value) if isinstance(distribution, CategoricalDistribution) else None
    return distribution.to_internal_repr(value) if place is None else place


def look_alike(choices: Sequence[Any], value: Any) -> list[Any]:
    """Return the choices that Optuna takes for equal to this value."""
    return [choice for choice in choices if choice == value or _text(choice) == _text(value)]


def _text(choice: Any) -> str:
    """Return the JSON text of a choice. Where JSON cannot hold it, its `repr` is taken."""
    return json.dumps(choice, default=repr)
