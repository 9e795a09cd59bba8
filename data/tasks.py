"""What the values of targets say about the task."""

from __future__ import annotations

from collections.abc import Sequence

from hpo.data.names import whole_number

MOST_CLASSES = 20  # different whole numbers that are taken for classes; more are numbers to predict
YES = ("true", "yes", "y", "positive", "pos")  # positive values of a binary target beside 1, in lower case


def positive_of(classes: Sequence[str], wanted: str | None) -> int:
    """Return which of the two classes of a binary target is the positive one; ValueError, without a place, if it is not clear.

    Args:
        classes: the different values.
        wanted: the positive one; None: found by its usual names.
    """
    if len(classes) != 2:
        raise ValueError(
            f'has {len(classes)} different values; task = "binary" has 2, so write task = "classification"'
        )
    if wanted is not None:
        if wanted not in classes:
            raise ValueError(f"positive = {wanted!r} is none of its values {classes[0]!r} and {classes[1]!r}")
        return list(classes).index(wanted)
    meant = [number for number, name in enumerate(classes) if name.casefold() in YES or whole_number(name) == 1]
    if len(meant) != 1:
        raise ValueError(
            f"has the values {classes[0]!r} and {classes[1]!r}; write positive = {classes[1]!r} or {classes[0]!r}"
        )
    return meant[0]
