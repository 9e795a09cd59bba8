"""A worker's restart: a fresh interpreter replaces the process, with the same command and the same process id.

A worker restarts after an out-of-memory or CUDA error, which would make the next trial fail, too. It also restarts
after many trials, and when its memory has grown.
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
from collections.abc import Sequence
from typing import Any, NoReturn

import psutil

from hpo.spec.failures import SPOILING, Kind
from hpo.spec.recovery import Recovery
from hpo.worker import descendants
from hpo.worker.signals import HEARD, StopSignal

MIB = 2**20
FOLDER = os.getcwd()  # where the command was started; user code may change the folder later
#: Set in the environment of a process that has restarted. It knows that the storage exists, and waits for it.
MARK = "HPO_STARTED_AFRESH"
WORKER, NAME_OPTION = "worker", "--as"  # the option of `hpo worker` for the name under which it holds leases
THREADS_SECONDS = 5.0  # for which threads of user code are waited for
NOTICE_SECONDS = 0.05  # after which `StopSignal` has read a signal that arrived


class RestartPolicy:
    """Decides when this process restarts: by its failures, the number of its trials and the growth of its memory."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._trials = 0
        self._first_size: int | None = None  # bytes after the first trial, with the data and libraries that all need

    def reason(self, failed_by: Kind | None) -> str | None:
        """Count a trial and return why the process should restart; None if it should not.

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
    """End this process and its descendants without the interpreter's own clean-up, which takes up to 2 s with torch loaded."""
    _wind_up()
    descendants.end()
    os._exit(code)


def start_afresh(stopping: StopSignal, name: str | None = None, *, at_once: bool = False) -> None:
    """Replace this process by a fresh interpreter. Open files, CUDA's too, are closed, and child processes are killed.

    It returns only if the process was asked to stop. A signal at the last moment ends the process or reaches the new
    one.

    Args:
        name: the name under which the worker holds leases, before and after; None if it has none.
        at_once: skip user code's exit handlers, because the main thread hangs.
    """
    if not at_once:
        _wind_up()
    descendants.end()  # otherwise they would become zombies of the new program
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    time.sleep(NOTICE_SECONDS)
    if stopping():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        return
    if threading.current_thread() is threading.main_thread():
        for number in HEARD:  # a signal that another thread handles from here on would be lost
            signal.signal(number, signal.SIG_DFL)
    if stopping():
        os._exit(stopping.exit_code)
    try:
        os.chdir(FOLDER)
        os.environ[MARK] = "1"
        _close_on_exec()
        os.execv(sys.executable, [sys.executable, *named(sys.orig_argv[1:], name)])
    finally:
        os._exit(1)


def named(command: Sequence[str], name: str | None) -> list[str]:
    """Return the command, with the worker's name added if it is an `hpo worker` without one."""
    if name is None or NAME_OPTION in command or WORKER not in command:
        return list(command)
    place = command.index(WORKER) + 1  # before the arguments, because after `--` it would be an argument itself
    return [*command[:place], NAME_OPTION, name, *command[place:]]


def _close_on_exec() -> None:
    """Mark every descriptor but the standard ones to close at exec. This frees the GPU driver's contexts and their memory."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed
                os.set_inheritable(int(name), False)


def _wind_up() -> None:
    """Do what the interpreter does for user code at exit, but wait at most THREADS_SECONDS for its threads."""
    _send_pools_home()
    deadline = time.monotonic() + THREADS_SECONDS
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    for child in multiprocessing.active_children():  # multiprocessing's exit handler would wait for them without limit
        if child.pid is not None:
            with contextlib.suppress(OSError):  # by id, because joblib's processes have no `kill`
                os.kill(child.pid, signal.SIGKILL)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the disk is full, or user code closed the stream
            stream.flush()


def _send_pools_home() -> None:
    """Wake the idle threads of user code's thread pools so that they end, as the interpreter does at exit."""
    pools: Any = sys.modules.get("concurrent.futures.thread")
    if pools is not None:
        with pools._global_shutdown_lock:
            pools._shutdown = True
        for queue in list(pools._threads_queues.values()):
            queue.put(None)
