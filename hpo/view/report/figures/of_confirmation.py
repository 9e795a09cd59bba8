"""The runs of a confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpo.view import confirmed as confirmations
from hpo.view.report.figures.figure import Figure, Trace, axis, begun, label, layout_of
from hpo.view.report.reading import StudyReport


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
                title=f"{begun(title)} of the leaders, trained again",
                data=data,
                layout=layout_of(axis(title), ticks, showlegend=True),
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
