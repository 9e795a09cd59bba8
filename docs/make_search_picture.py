"""Draws the picture of the page Search from kept replays: how `auto` ranks trials, and how soon it finds a good one.

The replays of the four methods on `mlp`, `cnn` or both come from `benchmarks/search.py --json FILE`.

    python docs/make_search_picture.py replays.json docs/assets/search.svg
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hpo.lab import plan as plans
from hpo.lab import replay
from hpo.lab import table as tables
from hpo.lab.table import Table
from hpo.strategy import pruners
from hpo.strategy.fidelity import ENOUGH
from hpo.strategy.quiet import quiet_warnings

TABLES = Path(__file__).parent.parent / "benchmarks" / "tables"
COLORS = {"auto": "#00838f", "tpe + median": "#8e24aa", "tpe + hyperband": "#ef6c00", "random + halving": "#607d8b"}
MARKS = {"auto": "-", "tpe + median": "--", "tpe + hyperband": "-.", "random + halving": ":"}
TITLE = "How auto ranks trials, and how soon it finds a good one"
SHOWN = ("mlp", "cnn")  # tables
GOOD_SHARE = 0.1  # of the compared trials, as in `fidelity_tpe`
TRIALS = 60  # of a replay whose curves are drawn
GREY, GOOD, BAD, INK = "#b0bec5", "#00838f", "#c62828", "#37474f"
Floats = npt.NDArray[np.float64]


def rungs_panel(axes: Axes, table: Table) -> None:
    """Draw the curves of the first trials of a replay, up to where the pruner ended them, and where the sampler ranks them."""
    plan = plans.make(table, sampler="auto", pruner="auto", epochs=TRIALS * 5)
    rows = {row.number: row for row in table.rows}
    ended = [(rows[end.number], end.epochs) for end in replay.run(plan, seed=0).ends[:TRIALS]]
    ladder = pruners.ladder(plan.spec)
    steps = [int(ladder.steps(rung, np.array([math.nan]))[0]) for rung in ladder.up_to(table.longest)]
    for row, epochs in ended:
        color, width = (GOOD, 1.3) if epochs == len(row.curve) else (GREY, 0.8)
        axes.plot(row.steps[:epochs], row.curve[:epochs], color=color, linewidth=width)
    pruned = [(epochs, row.curve[epochs - 1]) for row, epochs in ended if epochs < len(row.curve)]
    axes.plot(*zip(*pruned, strict=True), "x", color=BAD, markersize=3, linestyle="none", label="pruned")
    for step in steps:
        axes.axvline(step, color=INK, linewidth=0.6, linestyle=":")
    ranked = max(step for step in (*steps, table.longest) if sum(epochs >= step for _, epochs in ended) >= ENOUGH)
    values = sorted(row.curve[ranked - 1] for row, epochs in ended if epochs >= ranked)
    good = math.ceil(GOOD_SHARE * len(values))
    axes.plot(
        [ranked] * (len(values) - good),
        values[good:],
        "o",
        color=BAD,
        markersize=4,
        fillstyle="none",
        label="ranked as bad",
    )
    axes.plot([ranked] * good, values[:good], "o", color=GOOD, markersize=6, label="ranked as good")
    axes.set(xscale="log", yscale="log", xlabel="epochs of a trial", ylabel="validation loss")
    axes.set_title(f"{TRIALS} trials, ranked at epoch {ranked}")
    axes.set_xticks([*steps, table.longest], labels=[f"{step}" for step in (*steps, table.longest)])
    axes.minorticks_off()
    axes.legend(frameon=False)


def by_table(kept: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the replays of the four methods by table and method, for each table of SHOWN that has all of them."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in json.loads(kept.read_text()):
        found.setdefault(one["table"], {})[one["method"]] = one
    shown = {name: found[name] for name in SHOWN if COLORS.keys() <= found.get(name, {}).keys()}
    if not shown:
        raise SystemExit(
            f"{kept}: has the replays of {', '.join(COLORS)} on none of the tables {', '.join(SHOWN)}; make them with "
            "benchmarks/search.py"
        )
    return shown


def best_so_far(bests: Sequence[Sequence[tuple[int, float]]], epochs: Floats) -> Floats:
    """Return the best value of each replay after so many epochs [replays, epochs]; NaN before the first."""
    found = np.full((len(bests), len(epochs)), math.nan)
    for place, steps in enumerate(bests):
        at = np.searchsorted([epoch for epoch, _ in steps], epochs, side="right") - 1
        values = np.array([value for _, value in steps])
        found[place] = np.where(at >= 0, values[np.maximum(at, 0)], math.nan)
    return found


def search_panel(axes: Axes, name: str, of_method: Mapping[str, dict[str, Any]]) -> None:
    """Draw the best value so far of each method on a table: the median, and the quartiles as a band."""
    for method, color in COLORS.items():
        one = of_method[method]
        epochs = np.linspace(40, one["budget"], 105)
        low, middle, high = np.nanquantile(best_so_far(one["bests"], epochs), [0.25, 0.5, 0.75], axis=0)
        axes.fill_between(epochs, low, high, color=color, alpha=0.25 if method == "auto" else 0.1, linewidth=0)
        axes.plot(epochs, middle, MARKS[method], color=color, linewidth=2 if method == "auto" else 1.3, label=method)
    axes.axhline(of_method["auto"]["goal"], color=INK, linewidth=0.6)
    axes.annotate(
        "best 1 %", (0.99, of_method["auto"]["goal"]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    axes.set(yscale="log", xlabel="epochs of all workers", ylabel="best validation loss so far", title=f"Table {name}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def main(kept: Path, target: Path) -> None:
    quiet_warnings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shown = by_table(kept)
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "hpo",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.edgecolor": INK,
        }
    ):
        figure = Figure(figsize=(3.7 * (1 + len(shown)), 3.6), layout="constrained")
        rungs, *others = figure.subplots(1, 1 + len(shown))
        rungs_panel(rungs, tables.load(TABLES / f"{next(iter(shown))}{tables.SUFFIX}"))
        for axes, name in zip(others, shown, strict=True):
            search_panel(axes, name, shown[name])
        others[0].legend(frameon=False)
        for axes in (rungs, *others):
            axes.spines[["top", "right"]].set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Title": TITLE})
    short = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", drawn.getvalue())
    short = re.sub(r"font-family: '[^;\"]*", "font-family: sans-serif", short)
    target.write_text("\n".join(line.rstrip() for line in short.splitlines()) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
