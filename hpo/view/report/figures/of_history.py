"""The history of a study: the trials and the best so far, of one study or of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.analysis.columns import Columns, Floats
from hpo.analysis.progress import Progress, sampled
from hpo.view.report.figures.figure import Figure, Trace, axis, label, layout_of, window_of
from hpo.view.report.reading import StudyReport

MOST_POINTS = 1500  # trials in the figure of the history
SECOND, MINUTE, HOUR = 1 / 3600, 1 / 60, 1.0  # hours


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
                layout=layout_of(
                    axis(title, rangemode="tozero"),
                    axis(
                        label(report.metric),
                        range=window_of(columns.finished.values[columns.is_complete], report.direction),
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
                        layout=layout_of(
                            axis(title, rangemode="tozero"),
                            axis(label(metric), range=window_of(values, direction)),
                            showlegend=True,
                        ),
                        height=340,
                    )
                )
    return figures
