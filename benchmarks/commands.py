"""What `status`, `export` and `doctor` cost on a large study, two checkouts run in turn on one database: a markdown table.

Each run is a process of its own. Told are processor time (user and system), wall time and peak memory as the operating
system accounts for them: the median, with the lowest and the highest. A first run of each is not counted.

    python benchmarks/large_study.py sqlite:////tmp/large.db
    python benchmarks/commands.py sqlite:////tmp/large.db --before ../other-checkout --runs 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
COMMANDS = {"status": ["status", "large"], "export": ["export", "large"], "doctor": ["doctor", "large"]}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one process."""

    cpu: float  # seconds
    wall: float  # seconds
    peak: float  # MiB


def run(checkout: Path, arguments: Sequence[str], folder: str) -> Cost:
    """Run `hpo` of a checkout to its end."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(Path(folder) / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each run compiles all that it loads
    command = [sys.executable, "-P", "-m", "hpo", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} in {checkout} ended with {os.waitstatus_to_exitcode(status)}")
    wall = time.perf_counter() - started
    return Cost(cpu=used.ru_utime + used.ru_stime, wall=wall, peak=used.ru_maxrss / 1024)


def spread(values: Sequence[float], digits: int) -> str:
    """Tell the median, with the lowest and the highest."""
    middle, low, high = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="URL that holds the study of `large_study.py`")
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted runs of each (default 5)")
    parser.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    given = parser.parse_args()
    print("| command | what | before | now | now / before, by pairs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            arguments = [*COMMANDS[name], "--storage", given.storage]
            pairs = [
                tuple(run(side.absolute(), arguments, folder) for side in (given.before, ROOT))
                for _ in range(given.runs + 1)
            ][1:]
            for what, digits in (("cpu", 2), ("wall", 2), ("peak", 0)):
                before, now = ([getattr(cost, what) for cost in costs] for costs in zip(*pairs, strict=True))
                ratios = [after / earlier for earlier, after in zip(before, now, strict=True)]
                unit = "MiB" if what == "peak" else "s"
                cells = (name, f"{what}, {unit}", spread(before, digits), spread(now, digits), spread(ratios, 2))
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
