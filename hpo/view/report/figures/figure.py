"""One figure as plain dicts for plotly, and what all figures share: labels, axes, windows.

A colour that begins with @ is a name, which the page replaces by a colour of its light or dark theme. Positions of categorical
values are numbers, and their names stand at the ticks only. All names are foreign text: `label` makes them safe for plotly,
which reads some HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpo import text
from hpo.analysis.columns import Floats

Trace = dict[str, Any]
LONGEST_LABEL = 28  # characters of a name in a figure
OUTER = 0.1  # share of the worst values that a figure need not show
SURFACES = 3  # pairs of parameters with a contour


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure."""

    name: str  # unique within a study
    title: str
    data: Sequence[Trace]
    layout: dict[str, Any]
    height: int = 300
    width: int = 0  # pixels that it needs; a narrower screen scrolls


def label(foreign: object, longest: int = LONGEST_LABEL) -> str:
    """Return foreign text for a figure, as one short line in which plotly finds no markup."""
    shown = text.safe(foreign)
    return html.escape(shown if len(shown) <= longest else f"{shown[: longest - 1]}…", quote=False)


def begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more} if title else more


def layout_of(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"xaxis": x, "yaxis": y, **more}


def window_of(values: Floats, direction: str) -> list[float] | None:
    """Return an axis range that shows all but the worst OUTER of the values; None if there is nothing to leave out."""
    known = values[np.isfinite(values)]
    if len(known) < 10:
        return None
    sign = -1.0 if direction == "maximize" else 1.0
    losses = np.sort(known * sign)
    best, worst = losses[0], losses[min(len(losses) - 1, math.ceil(len(losses) * (1 - OUTER)))]
    if best == worst:
        return None
    margin = 0.08 * (worst - best)
    ends = [float((best - margin) * sign), float((worst + margin) * sign)]
    return sorted(ends)


def joined(name: str, lines: Iterable[Sequence[tuple[int, float]]], color: str, width: float) -> Trace:
    """Return one trace with several lines, with a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    for line in lines:
        x += [*(step for step, _ in line), None]
        y += [*(value for _, value in line), None]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "connectgaps": False,
        "line": {"color": color, "width": width},
    }


def cloud(name: str, x: Any, y: Any, numbers: Any, color: str, size: int, opacity: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "customdata": numbers,
        "hovertemplate": "trial %{customdata}: %{x}, %{y}<extra></extra>",
        "marker": {"color": color, "size": size, "opacity": opacity},
    }
