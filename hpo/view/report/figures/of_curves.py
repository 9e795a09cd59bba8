"""The trials' curves, and the winner's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpo.view.report.figures.figure import Figure, axis, begun, joined, label, layout_of, window_of
from hpo.view.report.reading import StudyReport


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
        joined(f"{len(among)} {name}", [report.curves[position] for position in among], *styles[name])
        for name, among in groups.items()
        if among
    ]
    if winner in report.curves:
        data.append(joined(f"trial {columns.numbers[winner]}, the best", [report.curves[winner]], "@best", 2.5))
    if not data:
        return []
    values = np.array([value for curve in report.curves.values() for _, value in curve], dtype=np.float64)
    layout = layout_of(
        axis(report.unit),
        axis(label(report.metric), range=window_of(values, report.direction)),
        showlegend=True,
        hovermode=False,
    )
    return [
        Figure(
            name="curves",
            title=f"{begun(label(report.metric))} by {report.unit}",
            data=data,
            layout=layout,
            height=380,
        )
    ]


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
                "metric", begun(label(report.metric)), {report.metric: (told[name], "@best")}, label(report.metric)
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
    name: str, title: str, lines: Mapping[str, tuple[Sequence[float], str]], of_values: str, **more: Any
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
        layout=layout_of(axis("epoch"), axis(of_values, **more), showlegend=len(lines) > 1),
        height=250,
    )
