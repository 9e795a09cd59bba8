"""Launches, waits and copies of an epoch on a device, counted on the twin device of the tests; one Markdown table to paste.

Nothing is timed, and no GPU is needed or used.

    python benchmarks/launches.py
    python benchmarks/launches.py mlp cnn
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from tests.support import twin
from tests.support.launches import TASKS, Epoch, of_loop, of_plain_torch, of_stack

TRIALS = (1, 4, 16, 64)


def ways(name: str) -> Iterator[tuple[str, Epoch]]:
    """Yield each way of training a task, with what an epoch of it asks of the device."""
    task = TASKS[name]
    yield "plain torch", of_plain_torch(task)
    yield "loop", of_loop(task)
    for trials in TRIALS if name != "resnet18" else TRIALS[:2]:
        yield f"stack of {trials}", of_stack(task, trials)


def main(names: list[str]) -> None:
    """Print the table of these tasks."""
    print("| task | way | launches a step | waits an epoch | copies to the device an epoch |\n|---|---|---|---|---|")
    with twin.plugged_in():
        for name in names or TASKS:
            for way, found in ways(name):
                print(f"| {name} | {way} | {found.launches_a_step:.1f} | {found.waits} | {found.copies} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
