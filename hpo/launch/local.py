"""Worker processes on this machine: started, watched, restarted after a crash, and stopped.

Each worker runs in its own session. So a Ctrl-C in the terminal reaches only the parent, which asks the workers to park their
trials. Each worker writes a log file. Workers get the storage URL, with its password, from the environment.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import uuid
from collections import Counter
from pathlib import Path

from hpo.launch import fork_server, logs
from hpo.launch.exit_codes import USAGE_ERROR
from hpo.launch.placement import Placement, spread
from hpo.launch.releases import Releases
from hpo.launch.slots import KILL_SECONDS, SERVER_GONE, Dead, Slot, last_word, say_last
from hpo.launch.usage import Usage
from hpo.study.study import Study
from hpo.worker import descendants

log = logging.getLogger(__name__)


class Fleet:
    """The local workers of one `hpo run`."""

    def __init__(
        self, study: Study, workers: int | Placement, *, code_folder: Path, allow_code_change: bool = False
    ) -> None:
        """Make the slots of a run.

        Args:
            study: the study.
            workers: their places, or how many there are on all GPUs.
            code_folder: the folder of the user's code.
            allow_code_change: record changed user code instead of refusing it.
        """
        placement = workers if isinstance(workers, Placement) else spread(workers)
        self.study = study
        self.code_folder = code_folder
        self.allow_code_change = allow_code_change
        self.stop_asked_at: float | None = None
        self._releases = Releases(study)
        self._own_children: frozenset[int] = frozenset()  # for example those that user code started during its import
        self.grace = study.spec.recovery.grace_seconds + KILL_SECONDS
        count = len(placement.places)
        self.usage = Usage(lambda: [slot.pid for slot in self.slots if slot.running], count, placement.gpu_count)
        folder = study.logs
        folder.mkdir(parents=True, exist_ok=True)
        logs.delete_old(folder)
        self.slots = [
            Slot(
                index=index,
                place=place,
                log=folder / f"worker-{platform.node()}-{os.getpid()}-{index}.log",
            )
            for index, place in enumerate(placement.places)
        ]

    def start(self) -> None:
        """Start a worker in every slot."""
        spec = self.study.spec
        fork_server.warm_up(spec.executor if spec.is_declared else None, measures=bool(spec.watch.get("metrics")))
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
            slot.start_another(cost_a_trial=False)

    def _environment(self, slot: Slot) -> dict[str, str]:
        threads = str(self.study.spec.training.get("threads", 1))
        threads = threads if threads.isdigit() else "1"  # if it is searched, each trial sets its own
        own = {**self.study.storage.environment, "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return own | slot.place.environment

    def tend(self) -> int:
        """Look after each slot once. Return the number of workers that are alive or will be restarted."""
        if self.stop_asked_at is not None and time.monotonic() - self.stop_asked_at > self.grace:
            self.kill_processes()
        self._releases.retry()
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
        cost_a_trial = self._releases.release(Dead(worker=slot.worker, code=code, in_order=asked or slot.word != ""))
        if not asked and slot.word != "0":
            slot.start_another(cost_a_trial=cost_a_trial)

    def doing(self) -> dict[str, int]:
        """Return {the last line that a worker logged: how many living workers it is of}."""
        said = [logs.last_entry(slot.log) for slot in self.slots if slot.running]
        return Counter(entry or "starting" for entry in said)

    @property
    def failed(self) -> list[Slot]:
        """The slots that were given up: their workers kept crashing or exited with USAGE_ERROR."""
        return [slot for slot in self.slots if slot.given_up]

    @property
    def died_at_start(self) -> list[Slot]:
        """The slots that were given up because their workers died again and again before they had a trial."""
        return [slot for slot in self.failed if not slot.refuses]

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
