"""Numbers as float32, which models compute with: what cannot be held, and what loses its digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = float(np.finfo(np.float32).max)
MOST_WHOLE = 2**53  # larger floats cannot represent every whole number
LOST = 1e-3  # most that rounding may move a value, relative to the spread of its column


def said_of(value: float) -> str | None:
    """Return why float32 cannot hold a value, None if it can. NaN stands for a missing value."""
    if np.isinf(value):
        return "is infinite; remove it, or leave it empty if it is not known"
    if abs(value) > LARGEST:
        return f"is beyond {LARGEST:.2g}, the largest number of float32; scale the values down"
    return None


def first_beyond(values: npt.NDArray[Any]) -> int | None:
    """Return the place of the first value that float32 cannot hold, in the flat array; None if there is none."""
    is_small = values.dtype.kind != "f" or values.dtype.itemsize <= 4  # then only an infinity is beyond
    beyond = np.flatnonzero(np.isinf(values) if is_small else np.abs(values) > LARGEST)
    return int(beyond[0]) if len(beyond) else None


def lost_digits(values: npt.NDArray[np.float64]) -> str | None:
    """Return why the values of one column lose what tells them apart in float32, None if they do not."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    spread, moved = float(known.std()), float(np.abs(known.astype(np.float32) - known).max())
    if moved <= LOST * spread or not spread:
        return None
    return (
        f"has numbers about {known.mean():.6g} that differ by about {spread:.3g}; float32, which models compute with, "
        f"rounds them by up to {moved:.2g}; subtract {known.min():.6g} from all"
    )
