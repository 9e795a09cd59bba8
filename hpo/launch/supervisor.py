"""The supervisor of one worker that an engine started: a process without user code, so that its exit code can be trusted.

User code may exit with any number. The worker writes its own exit code into a file as it leaves in order. The supervisor reads
that file, and ends with a code of `exit_codes`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from hpo.launch import exit_codes
from hpo.launch.slots import (
    CRASHES,
    HEALTHY_SECONDS,
    KILL_SECONDS,
    LONGEST_PAUSE_SECONDS,
    RESTART_SECONDS,
    Dead,
    died_of,
    last_word,
    say_last,
)
from hpo.worker import descendants
from hpo.worker.signals import ASKING, HEARD, ORDER

log = logging.getLogger(__name__)
BY_HAND = (signal.SIGINT,)  # a second one kills the worker
LOOK_SECONDS = 0.1  # between two looks for a request, in a pause


class Supervisor:
    """Runs one worker as a child, starts it again after a crash, and passes on the signals that ask it to leave."""

    def __init__(
        self, arguments: Sequence[str], mark: Path, *, grace: float | None, release: Callable[[Dead], bool]
    ) -> None:
        """Supervise a worker.

        Args:
            arguments: the arguments of `hpo worker`.
            mark: the file for the worker's word.
            grace: seconds from a request to leave until the worker is killed; None for no limit.
            release: releases the leases of a dead worker, and returns whether its end cost a trial.
        """
        self._arguments = arguments
        self._mark = mark
        self._grace = grace
        self._release = release
        self._own_children = descendants.children()
        self._child: subprocess.Popen[bytes] | None = None
        self._killing: threading.Timer | None = None
        self.asked_by: int | None = None  # the first signal that asked

    def run(self) -> int:
        """Run the worker until it leaves in order, is asked to leave, or crashes too often. Return the exit code."""
        for number in ASKING:
            signal.signal(number, self._receive)
        crashes = 0
        while True:
            began = time.monotonic()
            dead, word = self._run_once()
            if word.isdecimal():
                return exit_codes.of(word, self.asked_by)
            cost_a_trial = self._release(dead)
            if self.asked_by is not None:
                return exit_codes.of(word, self.asked_by)
            # A crash that cost a trial is counted by the trial and the study.
            crashes = (crashes if time.monotonic() - began < HEALTHY_SECONDS else 0) + (not cost_a_trial)
            if crashes >= CRASHES:
                how = died_of(dead.code)
                log.error("the worker died %d times in a row, last: %s; it is not started again", crashes, how)
                return exit_codes.FAILED
            pause = min(RESTART_SECONDS * 2 ** max(0, crashes - 1), LONGEST_PAUSE_SECONDS)
            log.warning("the worker died: %s; it is started again in %g s", died_of(dead.code), pause)
            if self._is_asked_within(pause):
                return exit_codes.of("", self.asked_by)

    def _run_once(self) -> tuple[Dead, str]:
        """Run one worker process. Return its end and its word."""
        say_last(self._mark, "")
        name = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        own = ["--parent", str(os.getpid()), "--mark", str(self._mark), "--as", name]  # before a `--`
        command = [sys.executable, "-P", "-m", "hpo", "worker", *own, *self._arguments]
        # The worker inherits this mask. A signal waits until the worker can answer it; before that it would kill the worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            self._child = child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.asked_by is not None:  # perhaps before there was a child
            self._ask()
        code = child.wait()
        descendants.end_orphans(but=self._own_children)  # what a killed worker has left running
        word = last_word(self._mark)
        return Dead(worker=name, code=code, in_order=self.asked_by is not None or word != ""), word

    def _is_asked_within(self, seconds: float) -> bool:
        """Wait. Return at once if this process is asked to leave. An Event could deadlock with the signal's handler."""
        deadline = time.monotonic() + seconds
        while self.asked_by is None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return self.asked_by is not None

    def _receive(self, number: int, frame: object) -> None:  # noqa: ARG002  (signal's own signature)
        if self.asked_by is not None and number in BY_HAND:
            self._kill()
        if self.asked_by is None:
            self.asked_by = number
        self._ask()

    def _ask(self) -> None:
        """Ask the worker to park its trials and leave. It is killed if it stays longer than its grace."""
        if self._child is None:
            return
        self._child.send_signal(ORDER)
        if self._killing is None and self._grace is not None:
            self._killing = threading.Timer(self._grace, self._kill)
            self._killing.daemon = True
            self._killing.start()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()


def supervise(arguments: Sequence[str], *, grace: float | None, release: Callable[[Dead], bool]) -> int:
    """Run `hpo worker ARGUMENTS` under a supervisor, which is this process. Return the exit code.

    Args:
        arguments: the arguments.
        grace: the study's `recovery.grace` in seconds; None if it is not known, then the engine alone kills.
        release: releases the leases of a dead worker, and returns whether its end cost a trial.
    """
    with tempfile.TemporaryDirectory(prefix="hpo-worker-") as folder:
        limit = None if grace is None else grace + KILL_SECONDS
        return Supervisor(arguments, Path(folder) / "word", grace=limit, release=release).run()
