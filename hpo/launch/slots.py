"""A place for one worker process: its GPUs, its log, its crashes, when it is started again, and its process's last word."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from hpo import text
from hpo.launch import fork_server, logs
from hpo.launch.exit_codes import TRY_AGAIN, USAGE_ERROR
from hpo.launch.placement import Place
from hpo.worker import descendants

CRASHES = 3  # successive crashes of one slot that cost no trial; then the slot stays empty and the run ends
RESTART_SECONDS = 0.5  # before the first restart; doubled before each further one
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a worker that lived so long resets the count of crashes
KILL_SECONDS = 5.0  # beyond the study's grace, in which workers exit by themselves
SERVER_GONE = 255  # multiprocessing's exit code for a worker whose server was gone before it
AGAIN = "again"  # a worker's word in place of an exit code: it restarts, or is restarted if that fails


@dataclass(frozen=True, kw_only=True)
class Dead:
    """A worker that has ended: its name, its exit code, and whether it exited in order or was asked to."""

    worker: str
    code: int
    in_order: bool


@dataclass
class Slot:
    """A place for one worker process."""

    index: int
    place: Place
    log: Path
    process: BaseProcess | None = None
    worker: str = ""  # the name under which the process holds leases; new for each process
    started_at: float = 0.0
    stopped_at: float | None = None  # the time since which the process is stopped by SIGSTOP
    restart_at: float | None = None  # when a crashed worker is started again
    crashes: int = 0
    word: str = ""  # the last process's exit code or AGAIN, if it exited in order; "" after a crash
    exit_codes: list[int] = field(default_factory=list)
    given_up: bool = False

    @property
    def running(self) -> bool:
        if self.process is None or self.process.exitcode is None:
            return self.process is not None
        # A worker outlives a killed server, to park its trials.
        return self.process.exitcode == SERVER_GONE and descendants.is_alive(self.pid)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return fork_server.pid_of(self.process)

    @property
    def mark(self) -> Path:
        """The file for the process's word. User code may set the exit code, so the exit code alone is not reliable."""
        return self.log.with_name(f"{self.log.name}.{self.worker.rpartition(':')[2]}")

    @property
    def refuses(self) -> bool:
        return self.word == str(USAGE_ERROR)

    @property
    def name(self) -> str:
        return f"worker {self.index}{self.place.said}"

    def start_another(self, *, cost_a_trial: bool) -> None:
        """Schedule a restart after a crash, with a growing pause, or give the slot up."""
        lived = time.monotonic() - self.started_at
        if lived >= HEALTHY_SECONDS:
            self.crashes = 0
        if not cost_a_trial and self.word != AGAIN:  # crashes that cost a trial are counted by the trial and the study
            self.crashes += 1
        waits = self.word in (AGAIN, str(TRY_AGAIN))
        self.given_up = self.refuses or (not waits and self.crashes >= CRASHES)
        if not self.given_up:
            pause = RESTART_SECONDS * 2 ** max(0, self.crashes - 1)
            self.restart_at = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)


def say_last(mark: Path | None, word: int | str) -> None:
    """Write the word of a worker that exits in order into its mark file, if it has one. An empty word clears it.

    The file is written in place, since a full disk has no room for another file. It is read after the process has ended.
    """
    if mark is None:
        return
    with suppress(OSError):
        descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, f"{word:<8}".encode())
        finally:
            os.close(descriptor)


def last_word(mark: Path) -> str:
    """Return the word of a worker that has ended, "" if it did not exit in order."""
    try:
        return mark.read_text().strip()
    except OSError:
        return ""


def died_of(code: int) -> str:
    """Return the cause of a process's end in words, from its exit code."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_words(slots: Sequence[Slot]) -> str:
    """Return the last lines of the failed workers' logs, which hold the reasons. Equal lines are shown once."""
    shown: dict[tuple[str, ...], list[str]] = {}
    for slot in slots:
        lines = logs.last_lines(slot.log, 12)
        said = tuple(f"  {line}" for line in lines if not logs.STAMPED.match(line))
        shown.setdefault(said, []).append(f"{slot.name} ended with exit code {slot.exit_codes[-1]} (log: {slot.log})")
    return text.page(line for said, names in shown.items() for line in [*names, *said])
