"""Which sampler and pruner reach the best 1 % of a table in the fewest epochs: markdown tables, from `hpo.lab`.

Each method is replayed with the same seeds on each table of `benchmarks/tables/`. A replay that misses the goal counts as two
budgets (PAR2). The first output is a table for each task: the median of the epochs with quartiles, the share that missed,
the regret at the end and the sampler's CPU time. Its p-values are those of Wilcoxon's signed-rank test against the first
method, corrected by Holm over the methods. The second output compares the epochs of each method with the first method's.
It is the geometric mean of their ratio over seeds and tables, with a 95 % interval by bootstrap over the seeds.

    python benchmarks/search.py
    python benchmarks/search.py --tables mlp --methods "random + halving" "tpe + halving" --seeds 10
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import optuna
from scipy import stats

from hpo.lab import plan as plans
from hpo.lab import report as reports
from hpo.lab import table as tables
from hpo.lab.report import Report
from hpo.strategy.quiet import quiet_warnings
from hpo.study.format import value_text

FOLDER = Path(__file__).parent / "tables"
RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """A sampler, a pruner and their options."""

    sampler: str
    pruner: str
    settings: tuple[str, ...] = ()


METHODS = {
    "random + halving": Method("random", "successive_halving"),
    "random": Method("random", "none"),
    "tpe": Method("tpe", "none"),
    "tpe + median": Method("tpe", "median", ("pruner.n_warmup_steps=3",)),  # the demo's
    "tpe + hyperband": Method("tpe", "hyperband"),
    "tpe + halving": Method("tpe", "successive_halving"),
}


def replayed(name: str, method: Method, seeds: int, processes: int) -> tuple[Report, Floats]:
    """Replay a method on a table; return the report, and the epochs to the goal by seed."""
    found = tables.load(FOLDER / f"{name}{tables.SUFFIX}")
    plan = plans.make(found, sampler=method.sampler, pruner=method.pruner, settings=method.settings)
    report = reports.replay_all(plan, seeds, processes)
    assert plan.epochs is not None
    reached = np.array(report.reached_after)
    return report, np.where(np.isinf(reached), 2.0 * plan.epochs, reached)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979)."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate([(len(p_values) - rank) * p_values[at] for rank, at in enumerate(order)])
    found = np.empty(len(p_values))
    found[order] = np.minimum(corrected, 1.0)
    return list(map(float, found))


def p_value(epochs: Floats, base: Floats) -> float:
    """Return Wilcoxon's two-sided p-value of paired epochs."""
    return 1.0 if (epochs == base).all() else float(stats.wilcoxon(epochs, base).pvalue)


def ratio_text(logs: Floats) -> str:
    """Return the geometric mean of ratios with its interval.

    Args:
        logs: the logarithms of the ratios [tables, seeds].
    """
    draw = np.random.default_rng(0)
    seeds = logs.shape[1]
    means = [logs[:, draw.integers(seeds, size=seeds)].mean() for _ in range(RESAMPLES)]
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return f"{np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})"


def tell_table(name: str, shown: Sequence[tuple[str, Report, Floats]]) -> None:
    base = shown[0][2]
    corrected = holm([p_value(epochs, base) for _, _, epochs in shown[1:]])
    print(f"\n{name}, {shown[0][1].seeds} seeds, {shown[0][1].epochs:,.0f} epochs each\n")
    print("| method | epochs to the top 1 % | missed | regret at the end | sampler's CPU | p | distance |")
    print("|---|---|---|---|---|---|---|")
    for (method, report, _), p in zip(shown, ["", *(f"{one:.2g}" for one in corrected)], strict=True):
        reach = report.reach_epochs
        ends = [f"{one:.0f}" if np.isfinite(one) else "never" for one in (reach.median, reach.low, reach.high)]
        distance = "-" if report.mapping is None else f"{report.mapping.median:.2f}"
        print(
            f"| {method} | {ends[0]} ({ends[1]} to {ends[2]}) | {report.missed:.0%} | {value_text(report.regrets[1.0].median)} "
            f"| {report.sampler_seconds:.2f} s | {p} | {distance} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(file.stem for file in FOLDER.glob(f"*{tables.SUFFIX}"))
    parser.add_argument("--tables", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=30, metavar="N")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args()
    quiet_warnings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    epochs: dict[str, list[Floats]] = {method: [] for method in options.methods}
    for name in options.tables:
        shown = []
        for method in options.methods:
            report, reached = replayed(name, METHODS[method], options.seeds, options.processes)
            shown.append((method, report, reached))
            epochs[method].append(reached)
        tell_table(name, shown)
    base = np.log(epochs[options.methods[0]])
    print(f"\nEpochs as a share of {options.methods[0]}, {len(options.tables)} tables\n")
    print("| method | geometric mean (95 % interval) |\n|---|---|")
    for method in options.methods[1:]:
        print(f"| {method} | {ratio_text(np.log(epochs[method]) - base)} |")


if __name__ == "__main__":
    main()
