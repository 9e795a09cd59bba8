"""The choices of a categorical parameter, told apart by the JSON text under which Optuna's storage keeps them.

Optuna finds a value among choices by `==`, for which 1, 1.0 and True are one, and by its own type, for which the list that
comes out of the storage is not the tuple that went in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

SCALARS = (str, int, float, bool, type(None))


def as_stored(name: str, choices: Sequence[Any]) -> tuple[Any, ...]:
    """Return choices as they come out of a storage: a tuple as a list, an enumeration's member as its value.

    Raises TypeError for a choice that no storage can hold, ValueError for two that are one there.
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
    """Return the place of a value among choices, by its JSON text, else by `==`; None if it is none of them."""
    texts, text = [_text(choice) for choice in choices], _text(value)
    if text in texts:
        return texts.index(text)
    return next((place for place, choice in enumerate(choices) if choice == value), None)


def internal(distribution: BaseDistribution, value: Any) -> float:
    """Return a value as Optuna's tables hold it; ValueError for none of the choices."""
    place = position(distribution.choices, value) if isinstance(distribution, CategoricalDistribution) else None
    return distribution.to_internal_repr(value) if place is None else place


def look_alike(choices: Sequence[Any], value: Any) -> list[Any]:
    """Return the choices that Optuna takes for this value."""
    return [choice for choice in choices if choice == value or _text(choice) == _text(value)]


def _text(choice: Any) -> str:
    """Return what tells a choice from others, whatever it is: the JSON text of all that a storage can hold."""
    return json.dumps(choice, default=repr)
