"""A report as one picture, in PNG: history, curves, importance, and the most important slices. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo import text
from hpo.view.report.figures import of_confirmation, of_curves, of_front, of_history, of_parameters
from hpo.view.report.figures.figure import Figure
from hpo.view.report.privacy import Privacy
from hpo.view.report.reading import StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"@best": "#d1491b", "@main": "#1f6fbf", "@curve": "#8fb7df", "@faint": "#c9cdd1", "@idle": "#c3c8cd"}
STUDIES = ("#1f6fbf", "#d1491b", "#2c7d57", "#8a4fbf", "#a66a00", "#0f8b9c")
ACROSS = 3
LONGEST_NAME = 60  # characters


def render(reports: Sequence[StudyReport], privacy: Privacy) -> bytes:
    """Return the picture. Of several studies it shows the best values beside each other."""
    from matplotlib.figure import Figure as Canvas  # pyplot would look for a display

    if len(reports) > 1:
        shown = of_history.compared(reports)
    else:
        (report,) = reports
        shown = (
            [*of_history.history(report), *of_curves.curves(report), *of_front.fronts(report)[:1]]
            if report.are_several
            else [
                *of_history.history(report),
                *of_curves.curves(report),
            ]
        )
        shown = [*of_confirmation.confirmed(report)[:1], *shown]
        shown += [of_parameters.importances(one, place) for place, one in enumerate(report.importances) if one.found]
        shown += of_parameters.slices(report)[: -len(shown) % ACROSS or ACROSS]
    rows = -(-len(shown) // ACROSS)
    canvas = Canvas(figsize=(5.2 * ACROSS, 0.5 + 3.6 * max(rows, 1)), layout="constrained", dpi=110)
    names = ", ".join(text.safe(privacy.clean(one.name), LONGEST_NAME) for one in reports)
    canvas.suptitle(_literal(names), fontsize=13)
    for place, figure in enumerate(privacy.clean(shown)):
        _draw(canvas.add_subplot(rows, ACROSS, place + 1), figure)
    told = io.BytesIO()
    canvas.savefig(told, format="png", metadata={"Software": None})
    return told.getvalue()


def _literal(shown: str) -> str:
    """Return a label as matplotlib shows it: the entities of HTML replaced, a dollar sign not read as mathematics."""
    import html

    return html.unescape(shown).replace("$", r"\$")


def _draw(axes: Axes, figure: Figure) -> None:
    axes.set_title(_literal(figure.title), fontsize=10)
    for trace in figure.data:
        _trace(axes, trace)
    _axis(axes, "x", figure.layout["xaxis"])
    _axis(axes, "y", figure.layout["yaxis"])
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if figure.layout.get("showlegend"):
        axes.legend(fontsize=7, frameon=False)


def _color(name: str) -> str:
    return STUDIES[int(name.removeprefix("@study"))] if name.startswith("@study") else COLORS.get(name, "#646b73")


def _trace(axes: Axes, trace: dict[str, Any]) -> None:
    name = _literal(trace.get("name", ""))
    x, y = (np.array([np.nan if one is None else one for one in trace[key]], dtype=float) for key in ("x", "y"))
    if trace["type"] == "bar":
        error = trace["error_x"]
        axes.barh(y, x, height=0.6, color=_color(trace["marker"]["color"]), label=name)
        axes.errorbar(
            x, y, xerr=[error["arrayminus"], error["array"]], fmt="none", ecolor="#1d2125", elinewidth=1, capsize=2
        )
    elif "line" in trace:
        style = "steps-post" if trace["line"].get("shape") == "hv" else "default"
        axes.plot(
            x,
            y,
            color=_color(trace["line"]["color"]),
            linewidth=0.8 * trace["line"]["width"],
            drawstyle=style,
            label=name,
        )
    elif trace["marker"].get("symbol") == "line-ns":
        axes.plot(x, y, "|", color=COLORS["@best"], markersize=12, markeredgewidth=2, label=name)
    else:
        if error := trace.get("error_x"):
            spread = [error["arrayminus"], error["array"]]
            axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=COLORS["@main"], elinewidth=1.5, capsize=3)
        size = trace["marker"]["size"]
        shape: dict[str, Any] = {"marker": "x"} if trace["marker"].get("symbol") == "x" else {"linewidths": 0}
        axes.scatter(x, y, s=size**2 / 2, color=_color(trace["marker"]["color"]), alpha=0.8, label=name, **shape)


def _axis(axes: Axes, which: str, told: dict[str, Any]) -> None:
    set_to = {key: getattr(axes, f"set_{which}{key}") for key in ("label", "lim", "scale", "ticks")}
    set_to["label"](_literal(told.get("title", {}).get("text", "")), fontsize=8)
    is_log = told.get("type") == "log"
    if is_log:
        set_to["scale"]("log")
    if told.get("range"):
        set_to["lim"](*(10**end if is_log else end for end in told["range"]))
    if "tickvals" in told:
        set_to["ticks"](told["tickvals"], [_literal(one) for one in told["ticktext"]])
