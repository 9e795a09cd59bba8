"""Worker processes on this machine: one per GPU, else one per core; watched, restarted after a crash, stopped in order.

Workers are fresh interpreters in sessions of their own, so a Ctrl-C in the terminal reaches only the parent, which asks
them to park; what they print goes to a log file each. They find the storage, with its password, in the environment.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo import storage
from hpo.fleet import gpus
from hpo.study import Study

RESTARTS = 3  # crashes of one slot in a row before it stays empty
HEALTHY_SECONDS = 60.0  # a worker that lived so long starts a new count of crashes
GRACE_SECONDS = 30.0  # from the request to park until workers are killed
USAGE_ERROR = 2  # a worker's exit code for a fault that a restart would not mend


@dataclass
class Slot:
    """A place for one worker process: its device, its log, the process in it, its crashes so far."""

    index: int
    gpu: str | None
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: int = 0
    exit_codes: list[int] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def name(self) -> str:
        return f"worker {self.index}" + (f" on GPU {self.gpu}" if self.gpu else "")


class Fleet:
    """The local workers of one `hpo run`."""

    def __init__(self, study: Study, workers: int, *, allow_code_change: bool = False) -> None:
        self.study = study
        self.allow_code_change = allow_code_change
        self.asked_to_stop = False
        devices = gpus.visible()
        folder = study.checkpoints / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.slots = [
            Slot(
                index=index,
                gpu=devices[index % len(devices)] if devices else None,
                log=folder / f"worker-{os.getpid()}-{index}.log",
            )
            for index in range(workers)
        ]

    def start(self) -> None:
        """Start a worker in every slot."""
        for slot in self.slots:
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        command = [sys.executable, "-P", "-m", "hpo", "worker", self.study.name, "--with-parent"]
        command += ["--code", str(self.study.code_folder)]
        command += ["--allow-code-change"] if self.allow_code_change else []
        with slot.log.open("ab") as log:
            slot.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(slot),
                start_new_session=True,
            )
        slot.started_at = time.monotonic()

    def _environment(self, slot: Slot) -> dict[str, str]:
        threads = str(self.study.spec.training.get("threads", 1)) if not self.study.spec.objective else "1"
        threads = threads if threads.isdigit() else "1"
        own = {"HPO_STORAGE": storage.plain(self.study.storage.url), "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # one trial, one core
        if slot.gpu is not None:
            own["CUDA_VISIBLE_DEVICES"] = slot.gpu  # before torch is loaded
        return {**os.environ, **own}

    def tend(self) -> int:
        """Give dead workers' trials back, start crashed ones again, and return how many are alive after that."""
        for slot in self.slots:
            if slot.process is None or slot.process.poll() is None:
                continue
            code = slot.process.returncode
            self._release(slot)
            slot.exit_codes.append(code)
            slot.process = None
            if code in (0, USAGE_ERROR) or self.asked_to_stop:
                continue
            lived = time.monotonic() - slot.started_at
            slot.crashes = 1 if lived >= HEALTHY_SECONDS else slot.crashes + 1
            if slot.crashes <= RESTARTS:
                self._start(slot)
        return self.running

    def _release(self, slot: Slot) -> None:
        """Park what a dead worker held, now rather than when its lease runs out."""
        assert slot.process is not None
        self.study.ledger("launcher").park_all_of(f"{platform.node()}:{slot.process.pid}:")

    @property
    def running(self) -> int:
        """How many workers are alive."""
        return sum(slot.running for slot in self.slots)

    @property
    def failed(self) -> list[Slot]:
        """The slots whose last worker ended badly, unasked, and is not coming back."""
        return (
            []
            if self.asked_to_stop
            else [slot for slot in self.slots if not slot.running and slot.exit_codes and slot.exit_codes[-1] != 0]
        )

    @property
    def exit_code(self) -> int:
        """What a run with failed workers ends with: 2 if one refused to work at all, else 1."""
        codes = {slot.exit_codes[-1] for slot in self.failed}
        return USAGE_ERROR if USAGE_ERROR in codes else int(bool(codes))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask every worker to park its trial and leave; none is started again."""
        self.asked_to_stop = True
        for slot in self.slots:
            if slot.running and slot.process is not None:
                slot.process.send_signal(number)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait so long, or only until every worker has left or `until` says so."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not until():
            time.sleep(0.02)

    def kill(self) -> None:
        """End every worker at once and give its trials back."""
        for slot in self.slots:
            if slot.process is None:
                continue
            if slot.process.poll() is None:
                slot.process.kill()
                slot.process.wait()
            self._release(slot)
            slot.exit_codes.append(slot.process.returncode)
            slot.process = None


def default_workers() -> int:
    """Return how many workers to start if nobody says: one per GPU, else one per core this process may use."""
    return len(gpus.visible()) or len(os.sched_getaffinity(0))


def last_words(slots: Sequence[Slot]) -> str:
    """Return the end of the failed workers' logs, where their reasons stand."""
    shown = []
    for slot in slots:
        lines = slot.log.read_text(errors="replace").splitlines()[-12:] if slot.log.exists() else []
        shown.append("\n".join([f"{slot.name} ended with exit code {slot.exit_codes[-1]} (log: {slot.log})", *lines]))
    return "\n".join(shown)
