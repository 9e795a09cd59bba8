"""A worker's process replaced by a fresh interpreter: same command, same process id, none of its memory.

After an out-of-memory or CUDA error, whose leavings fail the next trial too, and when a process has grown or grown old.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

import psutil

from hpo.failures import SPOILING, Kind
from hpo.spec import Recovery

MIB = 2**20


class Wear:
    """How worn this process is: the trials it ran and the memory that it gained since."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._trials = 0
        self._first_size = resident()

    def reason(self, failed_by: Kind | None) -> str | None:
        """Count a trial and return why the process should start afresh, None if it should not.

        Args:
            failed_by: the kind of failure that ended the trial's attempt, if one did.
        """
        self._trials += 1
        if failed_by in SPOILING:
            return f"after {failed_by}"
        if self._trials >= self._recovery.recycle_trials:
            return f"after {self._trials} trials"
        grown = (resident() - self._first_size) // MIB
        return f"after growing by {grown} MiB" if grown >= self._recovery.recycle_growth_mb else None


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def wind_up() -> None:
    """Do what the interpreter does for user code at its end: join threads, run exit handlers, flush streams."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter apart, which with torch loaded takes up to 2 s."""
    wind_up()
    os._exit(code)


def start_afresh() -> NoReturn:
    """Replace this process; open files, CUDA's among them, and child processes do not outlive it."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with them go the driver's contexts, and the memory they hold
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
