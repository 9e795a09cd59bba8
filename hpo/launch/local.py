"""Worker processes on this machine: started, watched, restarted after a crash, and stopped.

Each worker runs in its own session. So a Ctrl-C in the terminal reaches only the parent, which asks the workers to park their
trials. Each worker writes a log file. Workers get the storage URL, with its password, from the environment.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from hpo import text
from hpo.errors import SpecError
from hpo.launch import fork_server, gpus, logs
from hpo.launch.exit_codes import TRY_AGAIN, USAGE_ERROR
from hpo.launch.usage import Usage
from hpo.queue import reaper
from hpo.study.study import Study
from hpo.worker import descendants

log = logging.getLogger(__name__)
RESTARTS = 3  # successive crashes of one slot that cost no trial; after them the slot stays empty
RESTART_SECONDS = 0.5  # before the first restart; doubled before each further one
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a worker that lived so long resets the count of crashes
RELEASE_SECONDS = 2.0  # between two attempts to release leases of dead workers while the storage fails
KILL_SECONDS = 5.0  # beyond the study's grace, in which workers exit by themselves
SERVER_GONE = 255  # multiprocessing's exit code for a worker whose server was gone before it
MANY = 4  # workers per core or GPU; on 2 cores, 32 workers did less than 8
OWN_BYTES, DECLARED_BYTES = 25 * 2**20, 150 * 2**20  # least memory of a worker, measured without and with torch
AGAIN = "again"  # a worker's word in place of an exit code: it restarts, or is restarted if that fails


@dataclass
class Slot:
    """A place for one worker process: its device, log, process and crashes."""

    index: int
    gpu: str | None
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
        return f"worker {self.index}" + (f" on GPU {self.gpu}" if self.gpu else "")


@dataclass(frozen=True, kw_only=True)
class Dead:
    """A worker that has ended: its name, its exit code, and whether it exited in order or was asked to."""

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
        self._unreleased: list[Dead] = []  # dead workers whose leases could not be released yet
        self._release_at = 0.0
        self._own_children: frozenset[int] = frozenset()  # for example those that user code started during its import
        self.grace = study.spec.recovery.grace_seconds + KILL_SECONDS
        devices = gpus.visible()
        self.usage = Usage(lambda: [slot.pid for slot in self.slots if slot.running], workers, len(devices))
        folder = study.logs
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
        fork_server.warm_up(self.study.spec.executor if self.study.spec.is_declared else None)
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
            log.warning("%s did not start: %s", slot.name, error or "the server that forks workers is gone")
            slot.exit_codes.append(SERVER_GONE)
            self._start_another(slot, cost_a_trial=False)

    def _environment(self, slot: Slot) -> dict[str, str]:
        threads = str(self.study.spec.training.get("threads", 1))
        threads = threads if threads.isdigit() else "1"  # if it is searched, each trial sets its own
        own = {**self.study.storage.environment, "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if slot.gpu is not None:
            own["CUDA_VISIBLE_DEVICES"] = slot.gpu  # must be set before CUDA is opened
        return own

    def tend(self) -> int:
        """Look after each slot once. Return the number of workers that are alive or will be restarted."""
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
        """Kill a worker that was stopped by SIGSTOP for longer than its lease. It has lost its trial and blocks its slot."""
        if slot.process is None or not descendants.is_stopped(slot.pid):
            slot.stopped_at = None
            return
        slot.stopped_at = slot.stopped_at or time.monotonic()
        if time.monotonic() - slot.stopped_at > self.study.spec.recovery.lease_seconds:
            log.warning("%s was stopped for longer than its lease, probably by SIGSTOP; it is killed", slot.name)
            fork_server.kill(slot.process)

    def _release_slot(self, slot: Slot) -> None:
        """Release the leases of a slot's dead worker, and schedule a restart after a crash."""
        assert slot.process is not None
        slot.word = last_word(slot.mark)
        code = int(slot.word) if slot.word.isdecimal() else slot.process.exitcode
        assert code is not None
        fork_server.forget(slot.process)
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
        """Schedule a restart after a crash, with a growing pause, or give the slot up."""
        lived = time.monotonic() - slot.started_at
        if lived >= HEALTHY_SECONDS:
            slot.crashes = 0
        if not cost_a_trial and slot.word != AGAIN:  # crashes that cost a trial are counted by the trial and the study
            slot.crashes += 1
        waits = slot.word in (AGAIN, str(TRY_AGAIN))
        slot.given_up = slot.refuses or (not waits and slot.crashes > RESTARTS)
        if not slot.given_up:
            pause = RESTART_SECONDS * 2 ** max(0, slot.crashes - 1)
            slot.restart_at = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)

    def _release(self, dead: Dead) -> bool:
        """Release the leases of a dead worker before they expire. Return whether its end cost a trial.

        If the storage fails, a later call of `tend` tries again.
        """
        ledger = self.study.ledger("launcher")
        try:
            if dead.in_order:
                reaper.release_leases_of(ledger, dead.worker)
            else:
                reaper.fail_leases_of(ledger, dead.worker, died_of(dead.code))
            return reaper.has_lost(ledger, dead.worker)
        except Exception:  # no error of the storage may keep the other workers from being looked after
            self._unreleased.append(dead)
            return False

    def doing(self) -> dict[str, int]:
        """Return {the last line that a worker logged: how many living workers it is of}."""
        said = [logs.last_entry(slot.log) for slot in self.slots if slot.running]
        return Counter(entry or "starting" for entry in said)

    @property
    def failed(self) -> list[Slot]:
        """The slots that were given up: their workers kept crashing or exited with USAGE_ERROR."""
        return [slot for slot in self.slots if slot.given_up]

    @property
    def refused(self) -> bool:
        """Whether all workers exited with USAGE_ERROR."""
        return all(slot.given_up and slot.refuses for slot in self.slots)

    @property
    def exit_code(self) -> int:
        """The exit code of a run: 2 if a worker exited with USAGE_ERROR, 1 if others failed, else 0."""
        return USAGE_ERROR if any(slot.refuses for slot in self.failed) else int(bool(self.failed))

    def stop(self) -> None:
        """Ask all workers to park their trials and exit. No worker is restarted. Workers that stay are killed after the grace."""
        self.stop_asked_at = time.monotonic()
        for slot in self.slots:
            slot.restart_at = None
        self.ask_processes()

    def ask_processes(self) -> None:
        """Ask all workers to park their trials and exit. May be called from any thread and repeatedly."""
        for process in [slot.process for slot in self.slots]:
            if process is not None:
                fork_server.ask(process)

    def wait(self, seconds: float) -> None:
        """Wait for so many seconds, or until a worker has exited."""
        deadline = time.monotonic() + seconds
        alive = sum(slot.running for slot in self.slots)
        while time.monotonic() < deadline and sum(slot.running for slot in self.slots) == alive:
            time.sleep(0.02)

    def kill_processes(self) -> None:
        """Kill all workers. May be called from any thread."""
        for process in [slot.process for slot in self.slots]:
            if process is not None:
                fork_server.kill(process)

    def end_orphans(self, *, may_wait: bool = True) -> None:
        """End processes that dead workers have left running.

        Args:
            may_wait: wait while a worker starts. Else those that the server has adopted are left then.
        """
        workers = {
            slot.pid for slot in self.slots if slot.process is not None
        }  # our own children if their server is gone
        fork_server.end_orphans(may_wait=may_wait)
        descendants.end_orphans(but=self._own_children | fork_server.ids() | workers)

    def end(self) -> None:
        """End all workers. Workers that are still alive may park within the grace, then they are killed."""
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


def default_workers() -> int:
    """Return the default number of workers: one per GPU, without a GPU one per core that this process may use."""
    return len(gpus.visible()) or len(os.sched_getaffinity(0))


def check_count(workers: int, *, is_declared: bool) -> str | None:
    """Return a warning if so many workers slow each other down on this machine, else None.

    Args:
        workers: the number of workers to start.
        is_declared: whether the study declares its training, so that each worker loads torch.

    Raises SpecError if the machine's memory cannot hold them.
    """
    cores, devices = len(os.sched_getaffinity(0)), len(gpus.visible())
    memory, each = psutil.virtual_memory().total, DECLARED_BYTES if is_declared else OWN_BYTES
    machine = f"this machine has {cores} cores, {devices} GPUs and {memory / 2**30:.0f} GiB of memory"
    if workers * each > memory:
        raise SpecError(
            f"workers = {workers}: {machine}, and each worker takes {each // 2**20} MiB or more; "
            f"start at most {memory // each}"
        )
    if workers > (many := MANY * max(cores, devices)):
        return f"workers = {workers}: {machine}; more than {many} workers slow each other down"
    return None


def last_words(slots: Sequence[Slot]) -> str:
    """Return the last lines of the failed workers' logs, which hold the reasons. Equal lines are shown once."""
    shown: dict[tuple[str, ...], list[str]] = {}
    for slot in slots:
        lines = logs.last_lines(slot.log, 12)
        said = tuple(f"  {line}" for line in lines if not logs.STAMPED.match(line))
        shown.setdefault(said, []).append(f"{slot.name} ended with exit code {slot.exit_codes[-1]} (log: {slot.log})")
    return text.page(line for said, names in shown.items() for line in [*names, *said])
