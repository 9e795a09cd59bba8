"""Training on one GPU: whether it computes what the CPU computes, and how fast; one Markdown table to paste.

For each task it trains one configuration in turn by a plain script, by our loop, and as a stack of trials.
First it holds each of our ways against the CPU and exits 1 at the first difference. `make gpu` runs it.
A search on a GPU against plain Optuna is `vs_optuna.py --gpu`.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --task digits --repeats 1 --seconds 0.2      # without a GPU: tries the script
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

import torch

from benchmarks import gpu_agreement, gpu_ways, tasks
from benchmarks.gpu_agreement import Disagreement
from benchmarks.gpu_ways import Plain, Training
from benchmarks.tasks import Task
from hpo.receipt import git_commit, processor
from hpo.train import devices

SLOTS = {"digits": 64, "mlp28": 64, "cnn28": 32, "resnet18": 8}  # trials in a stack
MINUTES = 5.0  # after the start, checks included
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """How fast one way trains one task."""

    task: Task
    way: str
    slots: int
    images: int  # of all trials in an epoch
    steps: int  # of an epoch
    launches: int  # of an epoch
    peak: int | None  # bytes
    seconds: list[float]  # of an epoch, by repeat

    def line(self) -> str:
        """Return the row as Markdown."""
        rates = [3600 * self.slots / (self.task.epochs * seconds) for seconds in self.seconds]
        trials = f"{median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        pixels = f"{self.images / median(self.seconds):,.0f}"
        held = "-" if self.peak is None else f"{self.peak / MEBIBYTE:,.0f}"
        cells = (self.task.name, self.way, self.slots, trials, pixels, f"{self.launches / self.steps:.1f}", held)
        return "| " + " | ".join(map(str, (*cells, len(rates)))) + " |"


HEADER = """\
| task | way | trials at once | trials/h (lowest-highest) | images/s | launches a step | peak MiB | n |
|---|---|---|---|---|---|---|---|"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check and measure. Return the exit code."""
    given = parsed(arguments)
    with plugged_in(given.device):
        return compared(given, torch.device(given.device))


def plugged_in(device: str) -> AbstractContextManager[Any]:
    """Make the pretended accelerator of the tests available, if it is asked for."""
    if device != "twin":
        return nullcontext()
    from tests.support import twin_graphs

    return twin_graphs.plugged_in()


def compared(given: argparse.Namespace, device: torch.device) -> int:
    """Check and measure on a device. Return the exit code."""
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here; --device cpu tries the script without one", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * given.minutes
    chosen = [tasks.load(name).resized(trials=None, epochs=None, images=given.images) for name in given.task]
    if not given.no_check:
        try:
            for task in chosen:
                for line in gpu_agreement.check_all(task, device):
                    print(f"agrees with the CPU: {line}", flush=True)
        except Disagreement as difference:
            print(f"DIFFERENCE: {difference}", flush=True)
            return 1
    print(f"\n{setting(device)}\n\n{HEADER}", flush=True)
    late = []
    for task in chosen:
        if time.monotonic() > deadline:
            late.append(task.name)
            continue
        for row in measured(task, device, given):
            print(row.line(), flush=True)
    print(f"\n{words(device)}")
    if late:
        print(f"not measured, since {given.minutes:g} minutes were over: {', '.join(late)}; name them with --task")
        return 1
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = list(tasks.STUDY_FILES)
    parser.add_argument("--task", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument(
        "--device", default="cuda", help="where to train (default cuda); twin: the pretended one of the tests"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timings of each way, in turn (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing, at least one epoch (default 2)")
    parser.add_argument("--images", type=int, help="of a task that makes them; default: the task's own number")
    parser.add_argument("--slots", type=int, help="trials in a stack; default: " + str(SLOTS))
    parser.add_argument(
        "--loader-workers", type=int, default=4, help="processes of the script's DataLoaders (default 4)"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"no task begins later (default {MINUTES:g})")
    parser.add_argument("--no-check", action="store_true", help="do not hold the results against the CPU's")
    return parser.parse_args(arguments)


def measured(task: Task, device: torch.device, given: argparse.Namespace) -> list[Row]:
    """Return a row for each way of training a task."""
    splits = gpu_ways.splits_of(task, device)
    trainings: dict[str, Training] = {}
    launches: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    ways = {way.name: way for way in gpu_ways.ways_on(device)}
    for name in ("plain script", *ways):
        devices.begin_peak(device)
        before = devices.peak_bytes(device)
        if name == "plain script":
            trainings[name] = Plain(task, device, given.loader_workers)
        else:
            trainings[name] = gpu_ways.ours(ways[name], task, splits, given.slots or SLOTS[task.name], device)
        trainings[name].epoch()  # warm-up
        with gpu_ways.counted_launches(device) as counted:
            trainings[name].epoch()
        launches[name] = counted.count
        peak = devices.peak_bytes(device)
        peaks[name] = None if peak is None or before is None else peak - before
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(given.repeats):
        for name, training in trainings.items():
            seconds[name].append(gpu_ways.seconds_of(training, device, given.seconds))
    return [
        Row(
            task=task,
            way=name,
            slots=training.slots,
            images=training.slots * training.steps * task.batch_size,
            steps=training.steps,
            launches=launches[name],
            peak=peaks[name],
            seconds=seconds[name],
        )
        for name, training in trainings.items()
    ]


def setting(device: torch.device) -> str:
    """Return where and with what the numbers were taken, in a line."""
    return f"{devices.name(device)}; {processor()}; torch {torch.__version__}; commit {git_commit(tasks.ROOT)[:12]}"


def words(device: torch.device) -> str:
    """Return what the columns mean."""
    known = {"cuda": "calls of CUDA that launch or copy", "twin": "kernels and copies"}
    counted = known.get(device.type, "operations that are not views")
    return (
        "A trial has the task's epochs, each with its validation. Medians over n timings, taken in turn. "
        f"Launches: {counted}, in an epoch with its validation, by steps. Peak: tensors of the device, by its allocator."
    )


if __name__ == "__main__":
    sys.exit(main())
