"""What a run uses of its machine, and how fast it trains."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpo.launch import gpus, usage
from hpo.launch.usage import LOOK_SECONDS, WINDOW_SECONDS, Usage
from tests.view.test_live import ended, running, summary


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_speed_is_that_of_the_last_seconds() -> None:
    """Epochs of running and of ended trials count, but not those that a checkpoint brought."""
    clock = Clock()
    used = Usage(list, 2, 0, clock=clock)
    told = [used.line(summary(running=[running(0, [0.5] * 7)]), [])]
    clock.now += 2
    told.append(used.line(summary(running=[running(0, [0.5] * 9), running(1, [0.5])]), []))
    clock.now += 2
    told.append(
        used.line(summary(running=[running(2, [0.5] * 30, attempt=2)]), [ended(0, epochs=10), ended(1, epochs=4)])
    )
    assert told == ["2 workers on the CPU"] + [f"2 workers on the CPU · {rate} epochs/s" for rate in ("1.5", "1.75")]
    clock.now += WINDOW_SECONDS + 1
    assert used.line(summary(running=[running(2, [0.5] * 30, attempt=2)]), []) == "2 workers on the CPU"


def test_the_memory_is_that_of_the_living_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up some seconds apart."""
    monkeypatch.setattr(usage, "resident", lambda process: {1: 2**30, 2: 2**29}[process])
    clock, living = Clock(), [1, 2]
    used = Usage(lambda: living, 1, 0, clock=clock)
    told = [used.line(summary(), [])]
    living.remove(2)
    told.append(used.line(summary(), []))
    clock.now += LOOK_SECONDS
    told.append(used.line(summary(), []))
    assert told == [f"1 worker on the CPU · {size} GiB of memory" for size in ("1.5", "1.5", "1.0")]


def test_a_process_has_memory_until_it_is_gone() -> None:
    assert usage.resident(os.getpid()) > 2**20
    assert usage.resident(2**22 + 1) == 0  # above the largest process id


def test_the_memory_of_gpus_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 1024, 4096\necho 2048, 4096\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.memory() == (3 * 2**30, 8 * 2**30)
    assert Usage(list, 2, 2).line(summary(running=[]), []) == "2 workers on 2 GPUs · 3.0 of 8 GiB of the GPUs"
    program.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")
    assert gpus.memory() is None
