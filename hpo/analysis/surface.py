"""The value over two parameters: a kernel regression (Nadaraya and Watson, 1964) on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpo.analysis.columns import Column, Floats

GRID = 40  # points along each parameter
WIDTH = 0.08  # of the kernel, in shares of a parameter's range
LEAST_WEIGHT = 0.6  # of the trials around a point; with less nothing is said there
MOST = 2000  # trials that are smoothed over


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Smoothed values over two parameters."""

    across: str
    up: str
    x: Floats  # [GRID], where the points lie: 0 at the low end of the range, 1 at its high end
    y: Floats  # [GRID]
    values: Floats  # [GRID of y, GRID of x], NaN where no trial is near


def smooth(across: Column, up: Column, values: Floats) -> Surface:
    """Return the surface of a value over two parameters. Trials without one of the three are left out."""
    x, y = across.places, up.places
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(values))
    if len(known) > MOST:
        known = np.random.default_rng(0).choice(known, MOST, replace=False)
    line = np.linspace(0.0, 1.0, GRID)
    near_x, near_y = (
        np.exp(-0.5 * ((line[:, None] - places[known][None, :]) / WIDTH) ** 2) for places in (x, y)
    )  # [GRID, trials]
    weight = near_y @ near_x.T
    summed = (near_y * values[known]) @ near_x.T
    with np.errstate(invalid="ignore", divide="ignore"):
        smoothed = np.where(weight >= LEAST_WEIGHT, summed / weight, np.nan)
    return Surface(across=across.name, up=up.name, x=line, y=line, values=smoothed)
