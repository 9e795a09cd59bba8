"""How soon `hpo` with `auto` has a trial as good as the best of a plain Optuna script: wall time and epochs, in turn.

The rival is `plain_optuna.py`: TPE and successive halving, the same trials, space, splits, layers, epochs and processes. Both
are judged by the validation loss of a trial's last epoch, since accuracies tie. `hpo` has reached the rival's best when a
complete trial is at least as good. With `--budgets 4` it may train four times the trials: the same number often does not do.
It tells three shares of the rival's cost. The first is of its whole run, since only its end shows which trial is its best.
The others are of the way to its best trial, in seconds and in epochs. The epochs of trials under way at that moment are a
share of their time.

    python benchmarks/live.py --task digits --repeats 5 --budgets 4
    python benchmarks/live.py --task cnn28 --repeats 3
    python benchmarks/live.py --task digits --trials 64 --repeats 1
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from benchmarks import comparison, tasks
from benchmarks.comparison import Comparison, Pairs, spread
from benchmarks.runs import Result
from benchmarks.sides import HpoSide, OptunaSide

HEADER = """
| task | n | Optuna: whole run s | its best after s | after epochs | hpo as good after s | after epochs | never |
|---|---|---|---|---|---|---|---|"""
SHARES = """
| task | share of Optuna's whole run | of its way to its best, seconds | of its way to its best, epochs |
|---|---|---|---|"""


def pairs_of(results: Sequence[Result], task: str) -> Pairs:
    """Return Optuna's run and ours of each repeat."""
    of_side = {side: [one for one in results if (one.task, one.side) == (task, side)] for side in ("optuna", "hpo")}
    return list(zip(of_side["optuna"], of_side["hpo"], strict=True))


def costs_row(task: str, pairs: Pairs) -> str:
    """Tell the costs of both sides in a row under HEADER."""
    own = [theirs.bests[-1] for theirs, _ in pairs if theirs.bests]
    firsts = [first for theirs, ours in pairs if (first := ours.reaching(theirs.best)) is not None]
    cells = [
        spread([theirs.seconds for theirs, _ in pairs], 1),
        numbers([one.seconds for one in own], 1),
        numbers([one.epochs for one in own], 0),
        numbers([one.seconds for one in firsts], 1),
        numbers([one.epochs for one in firsts], 0),
        f"{len(pairs) - len(firsts)} of {len(pairs)}",
    ]
    return f"| {task} | {len(pairs)} | {' | '.join(cells)} |"


def shares_row(task: str, pairs: Pairs) -> str:
    """Tell our costs as shares of the rival's in a row under SHARES. They are geometric means of the runs that reached it."""
    of_run, of_seconds, of_epochs = [], [], []
    for theirs, ours in pairs:
        first = ours.reaching(theirs.best)
        if first is not None and theirs.bests:
            of_run.append(first.seconds / theirs.seconds)
            of_seconds.append(first.seconds / theirs.bests[-1].seconds)
            of_epochs.append(first.epochs / theirs.bests[-1].epochs)
    return f"| {task} | {' | '.join(map(share, (of_run, of_seconds, of_epochs)))} |"


def share(ratios: Sequence[float]) -> str:
    """Tell ratios as their geometric mean with the lowest and the highest."""
    if not ratios:
        return "never"
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def numbers(values: Sequence[float], digits: int) -> str:
    return spread(values, digits) if values else "-"


def main() -> None:
    """Parse the command line and compare."""
    parser = comparison.parser(__doc__, chosen=["digits", "cnn28"], pruners=list(tasks.PRUNERS))
    parser.set_defaults(metric="loss", repeats=5)
    parser.add_argument(
        "--budgets", type=int, default=1, metavar="N", help="for our side: N times the trials (default 1)"
    )
    given = parser.parse_args()
    found = Comparison(
        sides={"optuna": OptunaSide(), "hpo": HpoSide(is_auto=True, budgets=given.budgets)},
        tasks=comparison.tasks_of(given),
        options=comparison.options_of(given),
        repeats=given.repeats,
        json=given.json,
    ).run()
    pairs = {task: pairs_of(found, task) for task in given.task}
    print(HEADER, *(costs_row(task, runs) for task, runs in pairs.items()), sep="\n")
    print(SHARES, *(shares_row(task, runs) for task, runs in pairs.items()), sep="\n")


if __name__ == "__main__":
    main()
