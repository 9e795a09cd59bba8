"""Several objectives against each other."""

from __future__ import annotations

import itertools

import numpy as np

from hpo.analysis.progress import sampled
from hpo.view.report.figures.figure import SURFACES, Figure, axis, cloud, label, layout_of
from hpo.view.report.figures.of_history import MOST_POINTS
from hpo.view.report.reading import StudyReport


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
                    cloud("complete", x[others], y[others], columns.numbers[others], "@main", 5, 0.5),
                    cloud("Pareto front", x[on_front], y[on_front], columns.numbers[on_front], "@best", 8, 1.0)
                    | (
                        {"mode": "lines+markers", "line": {"shape": "hv", "color": "@best", "width": 1.5}}
                        if is_line
                        else {}
                    ),
                ],
                layout=layout_of(axis(label(names[first])), axis(label(names[second])), showlegend=True),
                height=380,
            )
        )
    return figures
