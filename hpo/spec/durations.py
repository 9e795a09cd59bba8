"""Durations as text: 90s, 30m, 1h30m, 2d."""

from __future__ import annotations

import re

from hpo.errors import SpecError

MAX_SECONDS = 10 * 365 * 86400  # a longer duration is a mistake


def seconds(text: str, path: str, *, zero: bool = False) -> float:
    """Return the seconds of a duration such as "90s", "30m", "1h30m" or "2d".

    Args:
        path: the key in the study file, for the message.
        zero: whether "0s" is allowed.

    Raises SpecError for any other text, for zero if it is not allowed, and for more than ten years.
    """
    match = re.fullmatch(r"(?:(\d{1,12})d)?(?:(\d{1,12})h)?(?:(\d{1,12})m)?(?:(\d{1,12})s)?", text.strip())
    given = match.groups() if match and text.strip() else (None,)
    total = sum(int(n or 0) * unit for n, unit in zip(given, (86400, 3600, 60, 1), strict=False))
    if given == (None,) or not (zero or total) or total > MAX_SECONDS:
        raise SpecError(f"{path}: {text!r} is not a duration; write it like 90s, 30m or 1h30m")
    return float(total)
