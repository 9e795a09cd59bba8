"""Worker processes on this machine: one per GPU, else one per core; watched, restarted after a crash, stopped in order.

Workers are in sessions of their own, so a Ctrl-C in the terminal reaches only the parent, which asks them to park; what
they print goes to a log file each. They find the storage, with its password, in the environment.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from hpo import text
from hpo.launch import fork_server, gpus, logs
from hpo.queue import reaper
from hpo.study.study import Study
from hpo.worker import descendants

log = logging.getLogger(__name__)
STAMPED = re.compile(r"\d{4}-\d\d-\d\d ")  # a line of a worker's own log, not of what ended it
RESTARTS = 3  # crashes of one slot in a row that cost no trial before it stays empty
RESTART_SECONDS = 0.5  # until the first restart; twice as long before each next one
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a worker that lived so long starts a new count of crashes
RELEASE_SECONDS = 2.0  # between two tries to take the leases of the dead from a storage that fails
KILL_SECONDS = 5.0  # beyond the study's grace, within which workers end themselves
SERVER_GONE = 255  # multiprocessing's exit code for a worker whose end the server did not live to tell
TRY_AGAIN = 75  # a worker's exit code when the storage failed: EX_TEMPFAIL of sysexits.h
USAGE_ERROR = 2  # a worker's exit code for a fault that a restart would not mend
AGAIN = "again"  # a worker's word in the place of an exit code: it starts afresh, or another one does if that fails


@dataclass
class Slot:
    """A place for one worker process: its device, its log, the process in it, its crashes so far."""

    index: int
    gpu: str | None
    log: Path
    process: BaseProcess | None = None
    worker: str = ""  # the name under which the process in it holds leases; another one for every process
    started_at: float = 0.0
    stopped_at: float | None = None  # since when the process in it stands still, by SIGSTOP
    restart_at: float | None = None  # when a crashed worker is started again
    crashes: int = 0
    word: str = ""  # of the last process, as it left in order: its exit code, or AGAIN; none after a crash
    exit_codes: list[int] = field(default_factory=list)
    given_up: bool = False

    @property
    def running(self) -> bool:
        if self.process is None or self.process.exitcode is None:
            return self.process is not None
        # A worker outlives a server that was killed, to park its trial.
        return self.process.exitcode == SERVER_GONE and descendants.is_alive(self.pid)

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    @property
    def mark(self) -> Path:
        """A file for the word of the process in it; the exit code of a process may be user code's."""
        return self.log.with_name(f"{self.log.name}.{self.worker.rpartition(':')[2]}")

    @property
    def refuses(self) -> bool:
        return self.word == str(USAGE_ERROR)

    @property
    def name(self) -> str:
        return f"worker {self.index}" + (f" on GPU {self.gpu}" if self.gpu else "")


@dataclass(frozen=True, kw_only=True)
class Dead:
    """A worker that is gone: the name under which it held leases, its exit code, whether it left in order or was asked to."""

    worker: str
    code: int
    in_order: bool


class Fleet:
    """The local workers of one `hpo run`."""

    def __init__(self, study: Study, workers: int, *, code_folder: Path, allow_code_change: bool = False) -> None:
        self.study = study
        self.code_folder = code_folder
        self.allow_code_change = allow_code_change
        self.stop_asked_at: float | None = None
        self._unreleased: list[Dead] = []  # their leases could not be taken yet
        self._release_at = 0.0
        self._own_children: frozenset[int] = frozenset()  # which code of the user's started as it was imported, for one
        self.grace = study.spec.recovery.grace_seconds + KILL_SECONDS
        devices = gpus.visible()
        folder = study.checkpoints / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        logs.delete_old(folder)
        self.slots = [
            Slot(
                index=index,
                gpu=devices[index % len(devices)] if devices else None,
                log=folder / f"worker-{platform.node()}-{os.getpid()}-{index}.log",
            )
            for index in range(workers)
        ]

    def start(self) -> None:
        """Start a worker in every slot."""
        fork_server.warm_up(None if self.study.spec.objective else self.study.spec.executor)
        self._own_children = descendants.children()
        for slot in self.slots:
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        slot.worker = f"{platform.node()}:{slot.index}:{uuid.uuid4().hex[:8]}"
        arguments = [
            self.study.name,
            "--as",
            slot.worker,
            "--code",
            str(self.code_folder),
            "--fleet",
            str(len(self.slots)),
            "--mark",
            str(slot.mark),
        ]
        arguments += ["--allow-code-change"] if self.allow_code_change else []
        slot.started_at, slot.restart_at, slot.word = time.monotonic(), None, ""
        try:
            say_last(slot.mark, "")
            slot.process = fork_server.start(arguments, self._environment(slot), slot.log)
        except (EOFError, OSError) as error:
            log.warning("%s did not start: %s", slot.name, error or "the server that workers are forked from is gone")
            slot.exit_codes.append(SERVER_GONE)
            self._start_another(slot, cost_a_trial=False)

    def _environment(self, slot: Slot) -> dict[str, str]:
        threads = str(self.study.spec.training.get("threads", 1))
        threads = threads if threads.isdigit() else "1"  # where it is searched, each trial sets its own
        own = {**self.study.storage.environment, "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if slot.gpu is not None:
            own["CUDA_VISIBLE_DEVICES"] = slot.gpu  # before CUDA is opened
        return {**os.environ, **own}

    def tend(self) -> int:
        """Look after every slot once; return how many workers are alive or about to be started again."""
        if self.stop_asked_at is not None and time.monotonic() - self.stop_asked_at > self.grace:
            self.kill_processes()
        if self._unreleased and time.monotonic() >= self._release_at:
            unreleased, self._unreleased = self._unreleased, []
            for dead in unreleased:
                self._release(dead)
            self._release_at = time.monotonic() + RELEASE_SECONDS
        for slot in self.slots:
            logs.bound(slot.log)
            if slot.process is not None and not slot.running:
                self._release_slot(slot)
            self._end_stopped(slot)
            if slot.restart_at is not None and time.monotonic() >= slot.restart_at:
                self._start(slot)
        return sum(slot.process is not None or slot.restart_at is not None for slot in self.slots)

    def _end_stopped(self, slot: Slot) -> None:
        """Kill a worker that has stood still for longer than its lease: its trial is taken, and the slot would stay empty."""
        if slot.process is None or not descendants.is_stopped(slot.pid):
            slot.stopped_at = None
            return
        slot.stopped_at = slot.stopped_at or time.monotonic()
        if time.monotonic() - slot.stopped_at > self.study.spec.recovery.lease_seconds:
            log.warning("%s was stopped for longer than its lease, by SIGSTOP as a rule: it is killed", slot.name)
            fork_server.kill(slot.process)

    def _release_slot(self, slot: Slot) -> None:
        """Give a dead worker's trials back; after a crash have another one started."""
        assert slot.process is not None
        slot.word = last_word(slot.mark)
        code = int(slot.word) if slot.word.isdecimal() else slot.process.exitcode
        assert code is not None
        slot.process = None
        slot.exit_codes.append(code)
        slot.mark.unlink(missing_ok=True)
        self.end_orphans()
        asked = self.stop_asked_at is not None
        cost_a_trial = self._release(Dead(worker=slot.worker, code=code, in_order=asked or slot.word != ""))
        if not asked and slot.word != "0":
            self._start_another(slot, cost_a_trial=cost_a_trial)

    @staticmethod
    def _start_another(slot: Slot, *, cost_a_trial: bool) -> None:
        """Have another worker started after a crash, with a growing pause, or give the slot up."""
        lived = time.monotonic() - slot.started_at
        if lived >= HEALTHY_SECONDS:
            slot.crashes = 0
        if not cost_a_trial and slot.word != AGAIN:  # a trial has its own count of lost workers, the study of failures
            slot.crashes += 1
        waits = slot.word in (AGAIN, str(TRY_AGAIN))
        slot.given_up = slot.refuses or (not waits and slot.crashes > RESTARTS)
        if not slot.given_up:
            pause = RESTART_SECONDS * 2 ** max(0, slot.crashes - 1)
            slot.restart_at = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)

    def _release(self, dead: Dead) -> bool:
        """Take what a dead worker held, now rather than when its lease runs out; return whether its end cost a trial.

        If the storage fails, it is tried again: a worker that left because of an outage has lost its trial to nobody.
        """
        ledger = self.study.ledger("launcher")
        try:
            if dead.in_order:
                reaper.release_leases_of(ledger, dead.worker)
            else:
                reaper.fail_leases_of(ledger, dead.worker, died_of(dead.code))
            return reaper.has_lost(ledger, dead.worker)
        except Exception:  # whatever the storage has to say: it must not keep the other workers from being looked after
            self._unreleased.append(dead)
            return False

    @property
    def failed(self) -> list[Slot]:
        """The slots whose workers kept crashing, or refused to work."""
        return [slot for slot in self.slots if slot.given_up]

    @property
    def refused(self) -> bool:
        """Whether every worker refused to work at all."""
        return all(slot.given_up and slot.refuses for slot in self.slots)

    @property
    def exit_code(self) -> int:
        """What a run with failed workers ends with: 2 if one refused to work at all, else 1."""
        return USAGE_ERROR if any(slot.refuses for slot in self.failed) else int(bool(self.failed))

    def stop(self) -> None:
        """Ask every worker to park its trial and leave; none is started again, and what stays is killed after the grace."""
        self.stop_asked_at = time.monotonic()
        for slot in self.slots:
            slot.restart_at = None
        self.ask_processes()

    def ask_processes(self) -> None:
        """Ask every worker to park its trial and leave, and nothing else: safe in any thread, and more than once."""
        for process in [slot.process for slot in self.slots]:
            if process is not None:
                fork_server.ask(process)

    def wait(self, seconds: float) -> None:
        """Wait so long, or only until some worker has left."""
        deadline = time.monotonic() + seconds
        alive = sum(slot.running for slot in self.slots)
        while time.monotonic() < deadline and sum(slot.running for slot in self.slots) == alive:
            time.sleep(0.02)

    def kill_processes(self) -> None:
        """Kill every worker, and nothing else: safe in any thread."""
        for process in [slot.process for slot in self.slots]:
            if process is not None:
                fork_server.kill(process)

    def end_orphans(self) -> None:
        """End what dead workers have left running."""
        workers = {slot.pid for slot in self.slots if slot.process is not None}  # our own children without their server
        descendants.end_orphans(but=self._own_children | fork_server.ids() | workers)

    def end(self) -> None:
        """Leave no worker behind, whatever happened: those still alive may park within the grace, then they are killed."""
        if self.stop_asked_at is None:
            self.stop()
        deadline = time.monotonic() + self.grace
        while any(slot.running for slot in self.slots) and time.monotonic() < deadline:
            self.wait(deadline - time.monotonic())
        self.kill_processes()
        for slot in self.slots:
            slot.restart_at = None
            if slot.process is not None:
                slot.process.join()
                self._release_slot(slot)


def say_last(mark: Path | None, word: int | str) -> None:
    """Write the word of a worker that leaves in order into its mark, if it has one; an empty word takes it back.

    In place: a disk that is full has no room for another file. It is read when the process is gone.
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
    """Return the word of a worker that is gone; empty if it did not leave in order."""
    try:
        return mark.read_text().strip()
    except OSError:
        return ""


def died_of(code: int) -> str:
    """Return in words what a process with this exit code died of."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def default_workers() -> int:
    """Return how many workers to start if nobody says: one per GPU, else one per core this process may use."""
    return len(gpus.visible()) or len(os.sched_getaffinity(0))


def last_words(slots: Sequence[Slot]) -> str:
    """Return the end of the failed workers' logs, where their reasons stand."""
    shown: dict[tuple[str, ...], list[str]] = {}
    for slot in slots:
        lines = logs.last_lines(slot.log, 12)
        said = tuple(f"  {line}" for line in lines if not STAMPED.match(line))
        shown.setdefault(said, []).append(f"{slot.name} ended with exit code {slot.exit_codes[-1]} (log: {slot.log})")
    return text.page(line for said, names in shown.items() for line in [*names, *said])
