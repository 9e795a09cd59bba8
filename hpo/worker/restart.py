"""A worker's process replaced by a fresh interpreter: same command, same process id, none of its memory.

After an out-of-memory or CUDA error, whose leavings fail the next trial too, and when a process has grown or grown old.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import psutil

from hpo.spec.failures import SPOILING, Kind
from hpo.spec.study_file import Recovery
from hpo.worker import descendants
from hpo.worker.signals import HEARD, StopSignal

MIB = 2**20
FOLDER = os.getcwd()  # in which the command was given, whatever user code does later
#: In the environment of a process that had worked before: it knows that the storage is there, and waits for it.
MARK = "HPO_STARTED_AFRESH"
THREADS_SECONDS = 5.0  # that threads of user code may take to end
NOTICE_SECONDS = 0.05  # until a signal that has arrived is known to `StopSignal`


class RestartPolicy:
    """How worn this process is: the trials it ran and the memory that it gained since."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._trials = 0
        self._first_size: int | None = None  # after the first trial, with the data and libraries that every one needs

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
        if self._first_size is None:
            self._first_size = resident()
        grown = (resident() - self._first_size) // MIB
        return f"after growing by {grown} MiB" if grown >= self._recovery.recycle_growth_mb else None


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def leave(code: int) -> NoReturn:
    """End this process, and all beneath it, without taking the interpreter apart, which with torch loaded takes up to 2 s."""
    _wind_up()
    descendants.end()
    os._exit(code)


def start_afresh(stopping: StopSignal, *, at_once: bool = False) -> None:
    """Replace this process; open files, CUDA's among them, and child processes do not outlive it.

    Returns if the process was asked to stop. A signal at the last instant ends it or reaches the fresh interpreter.

    Args:
        at_once: leave out what user code wants done at its end, because the main thread hangs.
    """
    if not at_once:
        _wind_up()
    descendants.end()  # else they are zombies of the fresh program
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    time.sleep(NOTICE_SECONDS)
    if stopping():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        return
    if threading.current_thread() is threading.main_thread():
        for number in HEARD:  # what another thread takes from here on would be forgotten with it
            signal.signal(number, signal.SIG_DFL)
    if stopping():
        os._exit(stopping.exit_code)
    try:
        os.chdir(FOLDER)
        os.environ[MARK] = "1"
        _close_on_exec()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
        os._exit(1)


def _close_on_exec() -> None:
    """Let every descriptor but the standard ones end with this program: the driver's contexts too, and what they hold."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(int(name), False)


def _wind_up() -> None:
    """Do what the interpreter does for user code at its end, but wait for its threads and processes only so long."""
    _send_pools_home()
    deadline = time.monotonic() + THREADS_SECONDS
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    for child in multiprocessing.active_children():  # an exit handler of multiprocessing's would wait for them for ever
        child.kill()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed by user code
            stream.flush()


def _send_pools_home() -> None:
    """Wake the idle threads of user code's pools, as the interpreter does before it waits for them."""
    pools: Any = sys.modules.get("concurrent.futures.thread")
    if pools is not None:
        with pools._global_shutdown_lock:
            pools._shutdown = True
        for queue in list(pools._threads_queues.values()):
            queue.put(None)
