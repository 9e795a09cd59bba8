"""Which sampler and pruner reach the best 1 % of a table in the fewest epochs: Markdown tables, from `hpo.lab`.

`auto` is compared with its rivals on each table of `benchmarks/tables/`, with the same seeds. A replay that misses the goal
counts as two budgets (PAR2). The first output is a table for each task: epochs to the goal (the median and the quartiles),
the share that missed it, and the epochs of `auto` as a share of the rival's. That is the geometric mean over the seeds with a
95 % interval by bootstrap. p is that of Wilcoxon's signed-rank test of the paired seeds, after Holm's correction over the
rivals. The last output is the same share over all tables, and the share on each of them.
"Second seed" is what the best trial of a replay came to when it was trained again: the medians of its value and of its rank.

Some rivals are replayed with fewer seeds (`--few-seeds`), and compared with the same seeds of `auto`. With `--json FILE` all
replays are kept. What FILE holds already is not replayed again, so delete it after a change of the code.

    python benchmarks/search.py --json results.json
    python benchmarks/search.py --tables mlp --methods auto "random + halving" --seeds 10
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import optuna
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from benchmarks import one_epoch
from hpo.lab import plan as plans
from hpo.lab import replay
from hpo.lab import report as reports
from hpo.lab import table as tables
from hpo.lab.plan import Plan
from hpo.lab.replay import Course
from hpo.lab.report import Quartiles, Retrained
from hpo.lab.table import Table
from hpo.strategy.quiet import quiet_warnings
from hpo.study.format import value_text

FOLDER = Path(__file__).parent / "tables"
RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """A sampler, a pruner and their options, or another way to spend the budget."""

    sampler: str
    pruner: str
    settings: tuple[str, ...] = ()
    has_few_seeds: bool = False
    run: Callable[[Plan, int], Course] = replay.run


SUBJECT = "auto"
FLAT = ("sampler.group=false",)  # the TPE that OptunaHub's AutoSampler takes for spaces with choices
METHODS = {
    SUBJECT: Method("auto", "auto"),
    "random + halving": Method("random", "successive_halving"),
    "tpe + median": Method("tpe", "median", ("pruner.n_warmup_steps=3",)),  # the demo's
    "tpe + hyperband": Method("tpe", "hyperband"),
    "tpe + halving": Method("tpe", "successive_halving"),
    "1-epoch": Method("random", "none", run=one_epoch.run),
    "random": Method("random", "none"),
    "tpe, flat + hyperband": Method("tpe", "hyperband", FLAT, has_few_seeds=True),
    "tpe, flat + halving": Method("tpe", "successive_halving", FLAT, has_few_seeds=True),
    "gp + hyperband": Method("gp", "hyperband", has_few_seeds=True),
}


@dataclass(frozen=True, kw_only=True)
class Replays:
    """What replays of a method on a table showed, by seed."""

    table: str
    method: str
    budget: int  # epochs of a replay
    goal: float
    reached_after: list[float]  # epochs; infinite if a replay missed the goal
    bests: list[list[tuple[int, float]]]  # (epochs, value) of each new best value
    regret: float  # at the end of the budget, the median
    sampler_seconds: float  # CPU time of a replay, the median
    pruner_seconds: float  # likewise
    second: list[float] | None = (
        None  # median value and rank of the best trials, trained again, and the number of such rows
    )

    @property
    def penalized(self) -> Floats:
        """Epochs to the goal by seed, two budgets for a replay that missed it."""
        reached = np.array(self.reached_after)
        return np.where(np.isinf(reached), 2.0 * self.budget, reached)


def replayed(name: str, table: Table, method: Method, seeds: int, processes: int) -> Replays:
    """Replay a method on a table with the seeds 0, 1, ..."""
    plan = plans.make(table, sampler=method.sampler, pruner=method.pruner, settings=method.settings)
    assert plan.epochs is not None
    courses = reports.replay_each(plan, range(seeds), processes, method.run)
    report = reports.summarize(plan, courses)
    return Replays(
        table=table.name,
        method=name,
        budget=plan.epochs,
        goal=report.table.goal,
        reached_after=list(report.reached_after),
        bests=[[(moment.epochs, moment.value) for moment in course.bests] for course in courses],
        regret=report.regrets[1.0].median,
        sampler_seconds=report.sampler_seconds,
        pruner_seconds=report.pruner_seconds,
        second=second_seed(report.retrained),
    )


def second_seed(found: Retrained | None) -> list[float] | None:
    """Return the median value and rank of the replays' best trials when they were trained again, and the number of such rows."""
    if found is None or found.value is None or found.rank is None:
        return None
    return [found.value.median, found.rank.median, found.rows]


# --- statistics -------------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979)."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate([(len(p_values) - rank) * p_values[at] for rank, at in enumerate(order)])
    found = np.empty(len(p_values))
    found[order] = np.minimum(corrected, 1.0)
    return list(map(float, found))


def p_value(subject: Floats, rival: Floats) -> float:
    """Return Wilcoxon's two-sided p-value of paired epochs."""
    return 1.0 if (subject == rival).all() else float(stats.wilcoxon(subject, rival).pvalue)


def log_ratios(subject: Replays, rival: Replays) -> Floats:
    """Return the logarithms of the subject's epochs as a share of the rival's, for the seeds that both have."""
    n = min(len(subject.reached_after), len(rival.reached_after))
    found: Floats = np.log(subject.penalized[:n] / rival.penalized[:n])
    return found


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


# --- what is printed --------------------------------------------------------------------------------------------------


def tell_table(shown: Sequence[Replays]) -> None:
    """Print how the subject, which comes first, compares with its rivals on one table."""
    subject, *rivals = shown
    pairs = [(subject.penalized[: len(rival.reached_after)], rival.penalized) for rival in rivals]
    corrected = holm([p_value(ours, theirs) for ours, theirs in pairs])
    print(f"\n`{subject.table}`, budget {subject.budget:,} epochs\n")
    print(
        f"| method | seeds | epochs to the top 1 % | missed | {subject.method} / method | p | regret | second seed | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(row(subject, "", ""))
    for rival, p in zip(rivals, corrected, strict=True):
        print(row(rival, ratio_text(log_ratios(subject, rival)[None]), f"{p:.2g}"))
    sys.stdout.flush()


def row(one: Replays, ratio: str, p: str) -> str:
    seeds = len(one.reached_after)
    missed = sum(map(math.isinf, one.reached_after)) / seeds
    cpu = one.sampler_seconds + one.pruner_seconds
    cells = [one.method, str(seeds), reach_text(one), f"{missed:.0%}", ratio, p, value_text(one.regret)]
    return f"| {' | '.join([*cells, second_text(one), f'{cpu:.1f}'])} |"


def second_text(one: Replays) -> str:
    """Return what the best trials of the replays came to with the second seed, and their rank; "-" if it is not known."""
    if one.second is None:
        return "-"
    value, rank, rows = one.second
    return f"{value_text(value)}, rank {rank:.0f} of {rows:.0f}"


def reach_text(one: Replays) -> str:
    """Return the median of the epochs to the goal with the quartiles; "more" stands for a missed goal."""
    found = Quartiles.of(one.reached_after)
    middle, low, high = (
        f"{epochs:.0f}" if math.isfinite(epochs) else "more" for epochs in (found.median, found.low, found.high)
    )
    return f"{middle} ({low}-{high})"


def tell_all(methods: Sequence[str], names: Sequence[str], found: Mapping[tuple[str, str], Replays]) -> None:
    """Print the subject's epochs as a share of each rival's, over all tables and on each."""
    subject, *rivals = methods
    print(f"\nEpochs of {subject} as a share of the rival's: the geometric mean (95 % interval), and on each table\n")
    print(f"| rival | all | {' | '.join(f'`{name}`' for name in names)} |\n|---|---|{'---|' * len(names)}")
    for rival in rivals:
        logs = [log_ratios(found[name, subject], found[name, rival]) for name in names]
        each = [f"{np.exp(one.mean()):.2f}" for one in logs]
        print(f"| {rival} | {ratio_text(np.array(logs))} | {' | '.join(each)} |")


# --- the file of replays ----------------------------------------------------------------------------------------------


class Kept:
    """Replays that are kept in a file, by table and method."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        written = json.loads(path.read_text()) if path and path.exists() else []
        self._found = {(one["table"], one["method"]): Replays(**one) for one in written}

    def get(self, table: str, method: str, seeds: int) -> Replays | None:
        """Return replays of these many seeds, None if there are none."""
        found = self._found.get((table, method))
        return found if found and len(found.reached_after) == seeds else None

    def add(self, one: Replays) -> None:
        """Keep replays, and write the file."""
        self._found[one.table, one.method] = one
        if self._path:
            self._path.write_text(json.dumps([asdict(each) for each in self._found.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(file.stem for file in FOLDER.glob(f"*{tables.SUFFIX}"))
    parser.add_argument("--tables", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"the first is compared with the others; of {', '.join(METHODS)}",
    )
    parser.add_argument("--seeds", type=int, default=30, metavar="N")
    parser.add_argument("--few-seeds", type=int, default=10, metavar="N", help="of AutoSampler's TPE and of gp")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the replays here; reuse those that it holds")
    options = parser.parse_args()
    quiet_warnings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = Kept(options.json)
    found: dict[tuple[str, str], Replays] = {}
    for name in options.tables:
        table = tables.load(FOLDER / f"{name}{tables.SUFFIX}")
        for method in options.methods:
            seeds = min(options.seeds, options.few_seeds) if METHODS[method].has_few_seeds else options.seeds
            one = kept.get(name, method, seeds)
            if one is None:
                one = replayed(method, table, METHODS[method], seeds, options.processes)
                kept.add(one)
            found[name, method] = one
        tell_table([found[name, method] for method in options.methods])
    tell_all(options.methods, options.tables, found)


if __name__ == "__main__":
    main()
