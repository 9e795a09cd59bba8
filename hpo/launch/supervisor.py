"""The supervisor of one worker that an engine started: a process without user code, so that its exit code can be trusted.

User code may exit with any number. The worker writes its own exit code into a file as it leaves in order. The supervisor reads
that file, and ends with a code of `exit_codes`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hpo.launch import exit_codes
from hpo.launch.slots import (
    CRASHES,
    HEALTHY_SECONDS,
    KILL_SECONDS,
    LONGEST_PAUSE_SECONDS,
    RESTART_SECONDS,
    died_of,
    last_word,
    say_last,
)
from hpo.worker.signals import ASKING, ORDER

log = logging.getLogger(__name__)
BY_HAND = (signal.SIGINT,)  # a second one kills the worker


class Supervisor:
    """Runs one worker as a child, starts it again after a crash, and passes on the signals that ask it to leave."""

    def __init__(self, arguments: Sequence[str], mark: Path, grace: float) -> None:
        """Supervise a worker.

        Args:
            arguments: the arguments of `hpo worker`.
            mark: the file for the worker's word.
            grace: seconds from a request to leave until the worker is killed.
        """
        own = ["--parent", str(os.getpid()), "--mark", str(mark)]  # first, since a study's name may stand after `--`
        self._command = [sys.executable, "-P", "-m", "hpo", "worker", *own, *arguments]
        self._mark = mark
        self._grace = grace
        self._child: subprocess.Popen[bytes] | None = None
        self._killing: threading.Timer | None = None
        self._asked = threading.Event()
        self.asked_by: int | None = None  # the first signal that asked

    def run(self) -> int:
        """Run the worker until it leaves in order, is asked to leave, or crashes too often. Return the exit code."""
        for number in ASKING:
            signal.signal(number, self._receive)
        crashes = 0
        while True:
            began = time.monotonic()
            code, word = self._run_once()
            if word.isdecimal() or self._asked.is_set():
                return exit_codes.of(word, self.asked_by)
            crashes = 1 if time.monotonic() - began >= HEALTHY_SECONDS else crashes + 1
            if crashes >= CRASHES:
                log.error(
                    "the worker died %d times in a row, last: %s; it is not started again", crashes, died_of(code)
                )
                return exit_codes.FAILED
            pause = min(RESTART_SECONDS * 2 ** (crashes - 1), LONGEST_PAUSE_SECONDS)
            log.warning("the worker died: %s; it is started again in %g s", died_of(code), pause)
            if self._asked.wait(pause):
                return 128 + (self.asked_by or signal.SIGTERM)

    def _run_once(self) -> tuple[int, str]:
        """Run one worker process. Return its exit code and its word."""
        say_last(self._mark, "")
        self._child = child = subprocess.Popen(self._command, start_new_session=True, stdin=subprocess.DEVNULL)
        if self._asked.is_set():  # before there was a child
            self._ask()
        return child.wait(), last_word(self._mark)

    def _receive(self, number: int, frame: object) -> None:  # noqa: ARG002  (signal's own signature)
        if self._asked.is_set() and number in BY_HAND and self._child is not None:
            self._child.kill()
        if not self._asked.is_set():
            self.asked_by = number
            self._asked.set()
        self._ask()

    def _ask(self) -> None:
        """Ask the worker to park its trials and leave. It is killed if it stays longer than its grace."""
        if self._child is None:
            return
        self._child.send_signal(ORDER)
        if self._killing is None:
            self._killing = threading.Timer(self._grace, self._child.kill)
            self._killing.daemon = True
            self._killing.start()


def supervise(arguments: Sequence[str], grace: float) -> int:
    """Run `hpo worker ARGUMENTS` under a supervisor, which is this process. Return the exit code.

    Args:
        grace: the study's `recovery.grace` in seconds.
    """
    with tempfile.TemporaryDirectory(prefix="hpo-worker-") as folder:
        return Supervisor(arguments, Path(folder) / "word", grace + KILL_SECONDS).run()
