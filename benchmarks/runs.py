"""One run of one side: its processes timed from start to end, and what its trials came to."""

from __future__ import annotations

import ctypes
import datetime
import math
import os
import resource
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Command = list[str]
PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>
ORPHANS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial as its side left it."""

    epochs: int  # trained
    value: float | None  # of its last epoch, if it went through all of them or its side calls it complete
    at: float | None  # seconds since 1970 when it ended
    began: float | None = None  # likewise, if its side knows

    def epochs_by(self, moment: float) -> float:
        """Return the epochs that were trained at a moment. Those of a trial under way are a share of its time."""
        if self.at is None or (self.began is None and moment < self.at):
            return 0.0
        if moment >= self.at:
            return float(self.epochs)
        assert self.began is not None
        return self.epochs * max(moment - self.began, 0.0) / (self.at - self.began)


@dataclass(frozen=True, kw_only=True)
class Best:
    """A complete trial that beat all before it."""

    seconds: float  # since the start of its side
    epochs: float  # of all trials until then
    value: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a side's study holds in the end."""

    trials: list[Ended]
    distributions: frozenset[str]  # that were drawn from, as Optuna's JSON


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of one side."""

    task: str
    side: str
    repeat: int
    seconds: float
    cpu_seconds: float | None  # of all its processes, where they can be counted: steadier where others use the machine
    trials: int
    complete: int
    epochs: int  # trained, over all trials
    maximizes: bool  # whether higher values are better
    bests: list[Best]
    load_before: float  # the machine's load average (1 min) when the run began; the runs themselves are in it

    @property
    def epochs_per_second(self) -> float:
        return self.epochs / self.seconds

    @property
    def best(self) -> float:
        """The best final value of a complete trial; not a number if none is complete."""
        return self.bests[-1].value if self.bests else math.nan

    def reaching(self, value: float) -> Best | None:
        """Return the first complete trial that was as good as this; None if none ever was."""
        sign = 1 if self.maximizes else -1
        return next((best for best in self.bests if sign * best.value >= sign * value), None)


def bests(trials: Sequence[Ended], started: float, *, maximizes: bool) -> list[Best]:
    """Return each complete trial that beat those before it, in the order in which they ended."""
    sign, found = 1 if maximizes else -1, list[Best]()
    complete = sorted((one.at, one.value) for one in trials if one.at is not None and one.value is not None)
    for at, value in complete:
        if not found or sign * value > sign * found[-1].value:
            epochs = sum(one.epochs_by(at) for one in trials)
            found.append(Best(seconds=at - started, epochs=epochs, value=value))
    return found


def seconds_since_1970(moment: datetime.datetime | None) -> float | None:
    """Return Optuna's local time as a number."""
    return None if moment is None else moment.timestamp()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the processes of a run took."""

    started: float  # seconds since 1970
    seconds: float
    cpu_seconds: float  # of those and of all below them, as far as they ended in order


def timed(commands: Sequence[Command], folder: Path, env: Mapping[str, str]) -> Timing:
    """Start the commands side by side and wait until the last has ended; ChildProcessError if one fails."""
    adopt_orphans()
    logs = [folder / f"output-{index}.log" for index in range(len(commands))]
    used, started, first = cpu_of_children(), time.time(), time.perf_counter()
    processes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:  # only after a Ctrl-C is there one left
            process.terminate()
    seconds = time.perf_counter() - first
    wait_for_orphans()
    timing = Timing(started=started, seconds=seconds, cpu_seconds=cpu_of_children() - used)
    for command, code, log in zip(commands, codes, logs, strict=True):
        if code:
            raise ChildProcessError(f"{shlex.join(command)}\nended with exit code {code}:\n{log.read_text()[-3000:]}")
    return timing


def adopt_orphans() -> None:
    """Become the parent of all below this process whose parent ends, so that their CPU time is counted. Linux alone."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_orphans() -> None:
    """Wait until all that was adopted has ended, but not for ever: a daemon stays."""
    deadline = time.monotonic() + ORPHANS_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)


def cpu_of_children() -> float:
    """Return the CPU seconds of every process below this one that has ended and was waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
