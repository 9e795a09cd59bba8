"""The parameters: their importance, a slice of each, pairs of them, and all together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.analysis import surface
from hpo.analysis.columns import Column, Floats
from hpo.analysis.effects import Importance, Importances
from hpo.analysis.progress import sampled
from hpo.view.report.figures.figure import SURFACES, Figure, Trace, axis, cloud, joined, label, layout_of, window_of
from hpo.view.report.reading import StudyReport

MOST_IN_SLICE = 500  # trials in a slice
MOST_SLICES = 12  # parameters with a slice, and axes of the parallel coordinates
MOST_BARS = 20  # parameters in the figure of the importance
MOST_LINES = 100  # trials in parallel coordinates
BINS = 5  # colours of parallel coordinates


def importances(found: Importances, place: int) -> Figure:
    """Return the importance of the parameters for one objective, with ranges and the level of chance."""
    shown = list(reversed(found.found[:MOST_BARS]))
    at = list(range(len(shown)))
    data = [
        _bars(name, [(y, one) for y, one in zip(at, shown, strict=True) if one.has_effect == has_effect], color)
        for name, has_effect, color in (("effect", True, "@main"), ("within chance", False, "@idle"))
        if any(one.has_effect == has_effect for one in shown)
    ]
    data += [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "reached by chance",
            "x": [one.chance for one in shown],
            "y": at,
            "marker": {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": "@best"}},
            "hovertemplate": "chance reaches %{x:.1%}<extra></extra>",
        },
    ]
    ticks = {
        "tickvals": at,
        "ticktext": [label(one.name) for one in shown],
        "automargin": True,
        "range": [-0.6, len(at) - 0.4],
    }
    most = max((max(one.high, one.share) for one in shown), default=1.0)
    return Figure(
        name=f"importance-{place}",
        title=f"Importance for {label(found.objective)}",
        data=data,
        layout=layout_of(
            axis("share of the importance", tickformat=".0%", range=[0, min(1.0, most) * 1.1], rangemode="tozero"),
            ticks,
            showlegend=True,
            bargap=0.35,
        ),
        height=120 + 26 * max(len(at), 3),
    )


def _bars(name: str, among: Sequence[tuple[int, Importance]], color: str) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": [one.share for _, one in among],
        "y": [y for y, _ in among],
        "marker": {"color": color},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [one.high - one.share for _, one in among],
            "arrayminus": [one.share - one.low for _, one in among],
            "color": "@ink",
            "thickness": 1.2,
            "width": 4,
        },
        "hovertemplate": "%{x:.1%}<extra></extra>",
    }


def by_importance(report: StudyReport) -> list[Column]:
    """Return the parameters with more than one value, the most important ones for the first objective first."""
    order = {one.name: place for place, one in enumerate(report.importances[0].found)} if report.importances else {}
    searched = [one for one in report.columns.parameters if not one.is_fixed]
    return sorted(searched, key=lambda one: order.get(one.name, len(order)))


def slices(report: StudyReport) -> list[Figure]:
    """Return the value over each of the most important parameters."""
    columns = report.columns
    best = columns.leaders[:1].tolist() if not report.are_several else columns.leaders.tolist()
    window = window_of(columns.finished.values[columns.is_feasible], report.direction)
    figures = []
    for place, parameter in enumerate(by_importance(report)[:MOST_SLICES]):
        has = np.flatnonzero(columns.is_feasible & ~np.isnan(parameter.values)).tolist()
        at = sampled(has, MOST_IN_SLICE, keep=columns.leaders[:50].tolist())
        if not at:
            continue
        x = parameter.values[at].copy()
        if parameter.choices is not None:  # points of one choice side by side
            x += np.random.default_rng(0).uniform(-0.22, 0.22, len(at))
        data = [cloud("complete", x, columns.finished.values[at], columns.numbers[at], "@main", 4, 0.6)]
        chosen = [position for position in best if position in set(at)]
        if chosen:
            x_best = [x[at.index(position)] for position in chosen]
            name = "Pareto front" if report.are_several else "best"
            data.append(cloud(name, x_best, columns.finished.values[chosen], columns.numbers[chosen], "@best", 9, 1.0))
        for trace in data:
            trace["hovertemplate"] = "trial %{customdata}: %{y}<extra></extra>"
        figures.append(
            Figure(
                name=f"slice-{place}",
                title=label(parameter.name, 40),
                data=data,
                layout=layout_of(_of_parameter(parameter), {"range": window, "nticks": 5}, showlegend=False),
                height=220,
            )
        )
    return figures


def _of_parameter(parameter: Column) -> dict[str, Any]:
    """Return the axis of a parameter over its whole range."""
    low, high = parameter.ends
    if parameter.choices is not None:
        names = [label(choice, 16) for choice in parameter.choices]
        return {"tickvals": list(range(len(names))), "ticktext": names, "range": [low - 0.5, high + 0.5]}
    if parameter.is_log:
        ends = [math.log10(low), math.log10(high)]
        margin = 0.03 * (ends[1] - ends[0])
        ticks: dict[str, Any] = (
            {"dtick": math.ceil((ends[1] - ends[0]) / 6)} if ends[1] - ends[0] >= 2 else {"nticks": 5}
        )
        return {"type": "log", "range": [ends[0] - margin, ends[1] + margin], "exponentformat": "power", **ticks}
    margin = 0.03 * (high - low)
    return {"range": [low - margin, high + margin], "nticks": 5}


def contours(report: StudyReport) -> list[Figure]:
    """Return the smoothed value over pairs of the most important numeric parameters."""
    columns = report.columns
    values = np.where(columns.is_feasible, columns.finished.values, np.nan)
    numeric = [one for one in by_importance(report) if one.choices is None][:SURFACES]
    window = window_of(values, report.direction)
    figures = []
    for place, (across, up) in enumerate(itertools.combinations(numeric, 2)):
        both = np.isfinite(across.values) & np.isfinite(up.values) & np.isfinite(values)
        if both.sum() < 20:
            continue
        clipped = values if window is None else np.clip(values, window[0], window[1])
        found = surface.smooth(across, up, clipped)
        if not np.isfinite(found.values).any():
            continue
        dots = sampled(np.flatnonzero(both).tolist(), 150, keep=columns.leaders[:1].tolist())
        data: list[Trace] = [
            {
                "type": "contour",
                "x": _unplaced(across, found.x),
                "y": _unplaced(up, found.y),
                "z": np.round(found.values, 6),
                "colorscale": "@scale" if report.direction == "maximize" else "@elacs",
                "ncontours": 14,
                "contours": {"coloring": "fill"},
                "line": {"width": 0.5, "color": "@card"},
                "connectgaps": False,
                "hovertemplate": "%{z:.4g}<extra></extra>",
                "colorbar": {"thickness": 10, "outlinewidth": 0, "nticks": 6},
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": across.values[dots],
                "y": up.values[dots],
                "marker": {"color": "@ink", "size": 3, "opacity": 0.55},
                "hoverinfo": "skip",
            },
        ]
        best = columns.leaders[:1]
        if both[best].all() and not report.are_several:
            data.append(cloud("best", across.values[best], up.values[best], columns.numbers[best], "@best", 10, 1.0))
        figures.append(
            Figure(
                name=f"contour-{place}",
                title=f"{label(up.name)} over {label(across.name)}",
                data=data,
                layout=layout_of(
                    axis(label(across.name)) | _of_parameter(across),
                    axis(label(up.name)) | _of_parameter(up),
                    showlegend=False,
                ),
                height=320,
            )
        )
    return figures


def _unplaced(parameter: Column, places: Floats) -> Floats:
    low, high = parameter.ends
    if parameter.is_log:
        return np.exp(math.log(low) + places * (math.log(high) - math.log(low)))
    return low + places * (high - low)


def parallel(report: StudyReport) -> list[Figure]:
    """Return the best trials as lines over their parameters, the better the stronger."""
    columns = report.columns
    at = (columns.leaders if report.are_several else columns.leaders[:MOST_LINES]).tolist()[:MOST_LINES]
    axes = by_importance(report)[:MOST_SLICES]
    if len(at) < 2 or not axes:
        return []
    values = columns.finished.values
    worst, best = sorted(values[at].tolist(), reverse=report.direction == "minimize")[:: len(at) - 1]
    source = np.random.default_rng(0)
    heights = {  # lines of one choice side by side
        one.name: one.places + (0 if one.choices is None else source.uniform(-0.02, 0.02, len(one.values)))
        for one in axes
    }
    data = []
    for number, among in enumerate(np.array_split(np.array(at), min(BINS, len(at)))[::-1]):
        lines = []
        for position in among.tolist():
            share = 0.5 if best == worst else (values[position] - worst) / (best - worst)
            lines.append([*((x, heights[one.name][position]) for x, one in enumerate(axes)), (len(axes), share)])
        level = BINS - min(BINS, len(at)) + number
        data.append(joined("", lines, f"@level{level}", 1.0 + 0.25 * number))
    layout = layout_of(
        {
            "tickvals": list(range(len(axes) + 1)),
            "ticktext": [_broken(one.name) for one in axes] + [_broken(report.metric)],
            "range": [-0.35, len(axes) + 0.35],
            "tickangle": 0,
            "showgrid": False,
            "fixedrange": True,
            "automargin": True,
        },
        {"visible": False, "range": [-0.1, 1.1], "fixedrange": True},
        shapes=[
            {
                "type": "line",
                "x0": x,
                "x1": x,
                "y0": 0,
                "y1": 1,
                "line": {"color": "@line", "width": 1},
                "layer": "below",
            }
            for x in range(len(axes) + 1)
        ],
        annotations=[*_marks(axes), *_ends(len(axes), [f"{worst:.4g}", f"{best:.4g}"])],
        showlegend=False,
        hovermode=False,
    )
    return [
        Figure(
            name="parallel",
            title=f"The best {len(at)} trials",
            data=data,
            layout=layout,
            height=420,
            width=90 * (len(axes) + 1),
        )
    ]


def _broken(name: str) -> str:
    """Return a name in several lines."""
    return label(name, 36).replace(".", ".<br>").replace(" ", "<br>").replace("_", "_<br>" if len(name) > 20 else "_")


def _marks(axes: Sequence[Column]) -> list[dict[str, Any]]:
    """Return the ends of each range, and the names of each choice, beside the axes."""
    found = []
    for x, one in enumerate(axes):
        if one.choices is None:
            found += _ends(x, [f"{end:.4g}" for end in one.ends])
            continue
        for number, choice in enumerate(one.choices):
            y = number / max(1, len(one.choices) - 1)
            found.append(_annotation(x, y, label(choice, 12), "left", "middle"))
    return found


def _ends(x: int, ends: Sequence[str]) -> list[dict[str, Any]]:
    return [_annotation(x, 0, ends[0], "center", "top"), _annotation(x, 1, ends[1], "center", "bottom")]


def _annotation(x: int, y: float, shown: str, across: str, up: str) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "text": shown,
        "showarrow": False,
        "xanchor": across,
        "yanchor": up,
        "xshift": 4 if across == "left" else 0,
        "font": {"size": 10, "color": "@ink" if across == "left" else "@muted"},
        **({"bgcolor": "@card", "borderpad": 1, "opacity": 0.9} if across == "left" else {}),
    }
