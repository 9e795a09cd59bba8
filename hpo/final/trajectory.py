"""A plot of a training: loss and norms by step, losses by epoch. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

FILE = "trajectory.svg"
#: Of the figure's size. A layout that matplotlib computes takes as long as the drawing itself.
MARGINS = {"left": 0.08, "right": 0.98, "top": 0.95, "bottom": 0.08, "wspace": 0.22, "hspace": 0.32}


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(path: Path, steps: Sequence[Sequence[float]], history: Sequence[Mapping[str, float]], *, kept: int) -> None:
    """Write an SVG of a training.

    Args:
        path: the file to write.
        steps: loss, gradient norm and parameter norm of each step.
        history: the metrics of each epoch.
        kept: the epoch whose weights were kept.
    """
    from matplotlib.figure import Figure  # pyplot would look for a display

    figure = Figure(figsize=(10, 7))
    by_step, norms, path_of, by_epoch = figure.subplots(2, 2, gridspec_kw=MARGINS).flat
    numbers = range(1, len(steps) + 1)
    loss, gradient, weights = ([step[which] for step in steps] for which in range(3))
    by_step.plot(numbers, loss, linewidth=0.8)
    by_step.set(title="loss of each step", xlabel="step", ylabel="nats")
    norms.plot(numbers, gradient, linewidth=0.8, label="gradient")
    norms.plot(numbers, weights, linewidth=0.8, label="parameters")
    norms.set(title="2-norms at each step", xlabel="step", yscale="log")
    norms.legend()
    path_of.scatter(weights, gradient, c=list(numbers), s=4)
    path_of.set(
        title="norms of all steps, first dark, last light", xlabel="|parameters|", ylabel="|gradient|", yscale="log"
    )
    for name in ("train_loss", "validation_loss"):
        by_epoch.plot([one["epoch"] for one in history], [one[name] for one in history], label=name)
    by_epoch.axvline(kept, color="grey", linewidth=0.8, label="kept")
    by_epoch.set(title="losses", xlabel="epoch")
    by_epoch.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
