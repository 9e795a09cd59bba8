"""Lengths of time as people write them: 90s, 30m, 1h30m, 2d."""

from __future__ import annotations

import re

from hpo.errors import SpecError

MAX_SECONDS = 10 * 365 * 86400  # a longer one is a mistake


def seconds(text: str, path: str, *, zero: bool = False) -> float:
    """Read a duration such as "90s", "30m", "1h30m" or "2d"; SpecError for anything else or for nothing at all.

    Args:
        zero: whether "0s" means something.
    """
    match = re.fullmatch(r"(?:(\d{1,12})d)?(?:(\d{1,12})h)?(?:(\d{1,12})m)?(?:(\d{1,12})s)?", text.strip())
    given = match.groups() if match and text.strip() else (None,)
    total = sum(int(n or 0) * unit for n, unit in zip(given, (86400, 3600, 60, 1), strict=False))
    if given == (None,) or not (zero or total) or total > MAX_SECONDS:
        raise SpecError(f"{path}: {text!r} is no duration; write it like 90s, 30m or 1h30m")
    return float(total)
