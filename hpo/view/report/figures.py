"""The figures of a report as plain dicts for plotly, drawn from a study's columns.

A colour that begins with @ is a name, which the page replaces by a colour of its light or dark theme. Positions of categorical
values are numbers, and their names stand at the ticks only. All names are foreign text: `label` makes them safe for plotly,
which reads some HTML.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpo import text
from hpo.analysis import surface
from hpo.analysis.columns import Column, Columns, Floats
from hpo.analysis.effects import Importance, Importances
from hpo.analysis.progress import Progress, sampled
from hpo.view import confirmed as confirmations
from hpo.view.report.reading import StudyReport

Trace = dict[str, Any]
MOST_POINTS = 1500  # trials in the figure of the history
MOST_IN_SLICE = 500  # trials in a slice
MOST_SLICES = 12  # parameters with a slice, and axes of the parallel coordinates
MOST_BARS = 20  # parameters in the figure of the importance
MOST_LINES = 100  # trials in parallel coordinates
BINS = 5  # colours of parallel coordinates
SURFACES = 3  # pairs of parameters with a contour
LONGEST_LABEL = 28  # characters of a name in a figure
OUTER = 0.1  # share of the worst values that a figure need not show
SECOND, MINUTE, HOUR = 1 / 3600, 1 / 60, 1.0  # hours


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


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more} if title else more


def _layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"xaxis": x, "yaxis": y, **more}


def _window(values: Floats, direction: str) -> list[float] | None:
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


# --- history ----------------------------------------------------------------------------------------------------------


def history(report: StudyReport) -> list[Figure]:
    """Return the values of all trials and the best so far, by epochs and by hours."""
    went, columns = report.progress, report.columns
    if not went.order.size:
        return []
    shown_hours, unit = _hours(went)
    figures = []
    for name, spent, title in (
        ("by-epochs", went.epochs, f"{report.unit}s of all trials"),
        ("by-hours", shown_hours, f"{unit} in which trials ran"),
    ):
        data = [*_points(report, spent), *_best_lines(columns, went, spent)]
        if not data or not spent.any():
            continue
        figures.append(
            Figure(
                name=name,
                title=f"Best {label(report.metric)} by {unit if name == 'by-hours' else report.unit + 's'}",
                data=data,
                layout=_layout(
                    _axis(title, rangemode="tozero"),
                    _axis(
                        label(report.metric),
                        range=_window(columns.finished.values[columns.is_complete], report.direction),
                    ),
                    showlegend=True,
                ),
                height=340,
            )
        )
    return figures


def _hours(went: Progress) -> tuple[Floats, str]:
    """Return the hours in a unit in which they are not tiny, and the unit."""
    whole = float(went.hours.max(initial=0.0))
    if whole >= 2 * HOUR:
        return went.hours, "hours"
    return (went.hours / MINUTE, "minutes") if whole >= 2 * MINUTE else (went.hours / SECOND, "seconds")


def _points(report: StudyReport, spent: Any) -> list[Trace]:
    columns, order = report.columns, report.progress.order
    keep = report.progress.improvements(columns)
    found = []
    for name, mask, color, size in (
        ("pruned", columns.is_pruned, "@faint", 4),
        ("complete", columns.is_feasible, "@main", 5),
    ):
        places = np.flatnonzero(mask[order] & np.isfinite(columns.finished.values[order])).tolist()
        places = sampled(places, MOST_POINTS if name == "complete" else MOST_POINTS // 2, keep=keep)
        if places:
            at = order[places]
            found.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": spent[places],
                    "y": columns.finished.values[at],
                    "customdata": columns.numbers[at],
                    "hovertemplate": "trial %{customdata}: %{y}<extra></extra>",
                    "marker": {"color": color, "size": size, "opacity": 0.75},
                }
            )
    return found


def _best_lines(
    columns: Columns, went: Progress, spent: Any, name: str = "best so far", color: str = "@best"
) -> list[Trace]:
    places = went.improvements(columns)
    if not places:
        return []
    x, y = spent[places].tolist(), columns.finished.values[went.order[places]].tolist()
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [*x, spent[-1] if len(spent) else x[-1]],
            "y": [*y, y[-1]],
            "line": {"shape": "hv", "color": color, "width": 2.5},
            "hovertemplate": "%{y}<extra></extra>",
        }
    ]


def compared(reports: Sequence[StudyReport]) -> list[Figure]:
    """Return the best so far of several studies beside each other. Studies of one metric share a figure."""
    figures = []
    goals = dict.fromkeys((one.metric, one.direction) for one in reports)
    for place, (metric, direction) in enumerate(goals):
        among = [one for one in reports if (one.metric, one.direction) == (metric, direction)]
        hours = [_hours(one.progress)[1] for one in among]
        unit = next(known for known in ("hours", "minutes", "seconds") if known in hours)
        scale = {"hours": HOUR, "minutes": MINUTE, "seconds": SECOND}[unit]
        values = np.concatenate([one.columns.finished.values[one.columns.is_complete] for one in among])
        for name, title in (("epochs", f"{among[0].unit}s of all trials"), ("hours", f"{unit} in which trials ran")):
            data = []
            for number, one in enumerate(among):
                spent = one.progress.epochs if name == "epochs" else one.progress.hours / scale
                if spent.any():
                    data += _best_lines(one.columns, one.progress, spent, label(one.name), f"@study{number % 6}")
            if data:
                figures.append(
                    Figure(
                        name=f"compared-{place}-{name}",
                        title=f"Best {label(metric)} by {among[0].unit + 's' if name == 'epochs' else unit}",
                        data=data,
                        layout=_layout(
                            _axis(title, rangemode="tozero"),
                            _axis(label(metric), range=_window(values, direction)),
                            showlegend=True,
                        ),
                        height=340,
                    )
                )
    return figures


# --- a confirmation ---------------------------------------------------------------------------------------------------


def confirmed(report: StudyReport) -> list[Figure]:
    """Return each leader's value in the search, its new runs, and their mean with its interval; for each objective."""
    found = report.confirmation
    if found is None:
        return []
    figures = []
    for place, name in enumerate(found.objectives):
        shown = [one for one in reversed(confirmations.by_mean(found, place)) if one.means]
        at = list(range(len(shown)))
        means = [one.means[place] for one in shown]
        runs = [(run[place], y) for y, one in enumerate(shown) for run in one.runs]
        data = [
            _dots("a new run", [value for value, _ in runs], [y for _, y in runs], {"color": "@faint", "size": 7}),
            _dots(
                "in the search", [one.seen[place] for one in shown], at, {"color": "@best", "size": 9, "symbol": "x"}
            ),
            _dots("mean and 95 %", [mean.value for mean in means], at, {"color": "@main", "size": 10})
            | {
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [mean.high - mean.value for mean in means],
                    "arrayminus": [mean.value - mean.low for mean in means],
                    "color": "@main",
                    "thickness": 2,
                    "width": 6,
                }
            },
        ]
        ticks = {"tickvals": at, "ticktext": [f"trial {one.number}" for one in shown], "range": [-0.6, len(at) - 0.4]}
        title = label(name) if found.several else label(report.metric)
        figures.append(
            Figure(
                name=f"confirmed-{place}",
                title=f"{_begun(title)} of the leaders, trained again",
                data=data,
                layout=_layout(_axis(title), ticks, showlegend=True),
                height=110 + 34 * max(len(at), 3),
            )
        )
    return figures


def _dots(name: str, x: Sequence[float], y: Sequence[float], marker: dict[str, Any]) -> Trace:
    shown = "%{x:.5g}<extra></extra>"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "marker": marker,
        "hovertemplate": shown,
    }


# --- several objectives -----------------------------------------------------------------------------------------------


def fronts(report: StudyReport) -> list[Figure]:
    """Return the Pareto front over each pair of objectives, first ones first."""
    columns, names = report.columns, report.columns.goals.names
    front = columns.leaders
    others = sampled(np.flatnonzero(columns.is_feasible).tolist(), MOST_POINTS, keep=front.tolist())
    figures = []
    for first, second in list(itertools.combinations(range(len(names)), 2))[:SURFACES]:
        x, y = columns.finished.values_of(first), columns.finished.values_of(second)
        on_front = front[np.argsort(x[front], kind="stable")]
        is_line = len(names) == 2
        figures.append(
            Figure(
                name=f"front-{first}-{second}",
                title=f"{label(names[first])} and {label(names[second])}",
                data=[
                    _cloud("complete", x[others], y[others], columns.numbers[others], "@main", 5, 0.5),
                    _cloud("Pareto front", x[on_front], y[on_front], columns.numbers[on_front], "@best", 8, 1.0)
                    | (
                        {"mode": "lines+markers", "line": {"shape": "hv", "color": "@best", "width": 1.5}}
                        if is_line
                        else {}
                    ),
                ],
                layout=_layout(_axis(label(names[first])), _axis(label(names[second])), showlegend=True),
                height=380,
            )
        )
    return figures


def _cloud(name: str, x: Any, y: Any, numbers: Any, color: str, size: int, opacity: float) -> Trace:
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


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(report: StudyReport) -> list[Figure]:
    """Return the curves of the best trials and of some others, those of pruned trials faint."""
    columns = report.columns
    winner = int(columns.leaders[0]) if len(columns.leaders) and not report.are_several else -1
    groups: dict[str, list[int]] = {"pruned": [], "complete": [], "failed": []}
    for position in report.curves:
        if position != winner:
            group = (
                "complete" if columns.is_complete[position] else "pruned" if columns.is_pruned[position] else "failed"
            )
            groups[group].append(position)
    styles = {"pruned": ("@faint", 1.0), "complete": ("@curve", 1.0), "failed": ("@failed", 1.0)}
    data = [
        _joined(f"{len(among)} {name}", [report.curves[position] for position in among], *styles[name])
        for name, among in groups.items()
        if among
    ]
    if winner in report.curves:
        data.append(_joined(f"trial {columns.numbers[winner]}, the best", [report.curves[winner]], "@best", 2.5))
    if not data:
        return []
    values = np.array([value for curve in report.curves.values() for _, value in curve], dtype=np.float64)
    layout = _layout(
        _axis(report.unit),
        _axis(label(report.metric), range=_window(values, report.direction)),
        showlegend=True,
        hovermode=False,
    )
    return [
        Figure(
            name="curves",
            title=f"{_begun(label(report.metric))} by {report.unit}",
            data=data,
            layout=layout,
            height=380,
        )
    ]


def _joined(name: str, lines: Iterable[Sequence[tuple[int, float]]], color: str, width: float) -> Trace:
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


# --- parameters -------------------------------------------------------------------------------------------------------


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
        layout=_layout(
            _axis("share of the importance", tickformat=".0%", range=[0, min(1.0, most) * 1.1], rangemode="tozero"),
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
    window = _window(columns.finished.values[columns.is_feasible], report.direction)
    figures = []
    for place, parameter in enumerate(by_importance(report)[:MOST_SLICES]):
        has = np.flatnonzero(columns.is_feasible & ~np.isnan(parameter.values)).tolist()
        at = sampled(has, MOST_IN_SLICE, keep=columns.leaders[:50].tolist())
        if not at:
            continue
        x = parameter.values[at].copy()
        if parameter.choices is not None:  # points of one choice side by side
            x += np.random.default_rng(0).uniform(-0.22, 0.22, len(at))
        data = [_cloud("complete", x, columns.finished.values[at], columns.numbers[at], "@main", 4, 0.6)]
        chosen = [position for position in best if position in set(at)]
        if chosen:
            x_best = [x[at.index(position)] for position in chosen]
            name = "Pareto front" if report.are_several else "best"
            data.append(_cloud(name, x_best, columns.finished.values[chosen], columns.numbers[chosen], "@best", 9, 1.0))
        for trace in data:
            trace["hovertemplate"] = "trial %{customdata}: %{y}<extra></extra>"
        figures.append(
            Figure(
                name=f"slice-{place}",
                title=label(parameter.name, 40),
                data=data,
                layout=_layout(_of_parameter(parameter), {"range": window, "nticks": 5}, showlegend=False),
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
    window = _window(values, report.direction)
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
            data.append(_cloud("best", across.values[best], up.values[best], columns.numbers[best], "@best", 10, 1.0))
        figures.append(
            Figure(
                name=f"contour-{place}",
                title=f"{label(up.name)} over {label(across.name)}",
                data=data,
                layout=_layout(
                    _axis(label(across.name)) | _of_parameter(across),
                    _axis(label(up.name)) | _of_parameter(up),
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
        data.append(_joined("", lines, f"@level{level}", 1.0 + 0.25 * number))
    layout = _layout(
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


# --- the winner -------------------------------------------------------------------------------------------------------


def winner(report: StudyReport) -> list[Figure]:
    """Return the best trial's learning curves, its generalization gap and its norms, as far as they were recorded."""
    if report.winner is None:
        return []
    told = report.winner.curves
    figures = []
    if "train_loss" in told and "validation_loss" in told:
        both: dict[str, tuple[Sequence[float], str]] = {
            "training": (told["train_loss"], "@main"),
            "validation": (told["validation_loss"], "@best"),
        }
        figures.append(_by_epoch("losses", "Losses", both, "loss"))
        gap = [v - t for t, v in zip(told["train_loss"], told["validation_loss"], strict=False)]
        figures.append(
            _by_epoch("gap", "Generalization gap", {"validation - training": (gap, "@third")}, "loss", zeroline=True)
        )
    name = f"validation_{report.columns.goals.first}"
    if name in told and name != "validation_loss":
        figures.append(
            _by_epoch(
                "metric", _begun(label(report.metric)), {report.metric: (told[name], "@best")}, label(report.metric)
            )
        )
    norms = {
        word: (told[key], color)
        for word, key, color in (
            ("gradient", "gradient_norm", "@main"),
            ("parameters", "parameter_norm", "@second"),
        )
        if key in told
    }
    if norms:
        figures.append(_by_epoch("norms", "2-norms", norms, "norm", type="log"))
    if "learning_rate" in told:
        figures.append(
            _by_epoch(
                "rate", "Learning rate", {"learning rate": (told["learning_rate"], "@third")}, "", rangemode="tozero"
            )
        )
    return figures


def _by_epoch(
    name: str, title: str, lines: Mapping[str, tuple[Sequence[float], str]], of_values: str, **axis: Any
) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(word),
            "x": list(range(1, len(values) + 1)),
            "y": list(values),
            "line": {"color": color, "width": 2},
            "hovertemplate": "%{y:.4g}<extra></extra>",
        }
        for word, (values, color) in lines.items()
    ]
    return Figure(
        name=f"winner-{name}",
        title=title,
        data=data,
        layout=_layout(_axis("epoch"), _axis(of_values, **axis), showlegend=len(lines) > 1),
        height=250,
    )
