"""The descendants of this process: they are found and ended with it.

User code may start processes and not end them. On Linux an orphan goes to the nearest ancestor that is a subreaper,
which is this process. So neither `setsid` nor a double fork hides it. On other systems such a process is not found.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from hpo import text

if TYPE_CHECKING:
    import psutil

PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>
PR_GET_CHILD_SUBREAPER = 37
GONE_SECONDS = 1.0  # for which killed processes are waited for


def adopt() -> None:
    """Adopt orphaned descendants from now on, and end all descendants when this process ends."""
    adopt_orphans()
    atexit.register(_end_of, os.getpid())  # registered before user code's own, so it runs last


def adopt_orphans() -> None:
    """Become the parent of all below this process whose parent ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def letting_go() -> Iterator[None]:
    """Adopt no process whose parent ends within this block. So it outlives this process, as a daemon does."""
    adopts = _adopts()
    if adopts:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    try:
        yield
    finally:
        if adopts:
            adopt_orphans()


def _end_of(process: int) -> None:
    if os.getpid() == process:  # not in a fork of it
        end()


def end(*, of: int | None = None, but: Collection[int] = ()) -> None:
    """Kill all descendants of a process and wait up to GONE_SECONDS until they are gone.

    Args:
        of: the id of the process. By default it is this one.
        but: ids of children to spare, with their own descendants.
    """
    if of is None and not _has_children():
        return
    import psutil

    deadline = time.monotonic() + GONE_SECONDS
    # In a loop, because a process may start another one just before it is killed.
    while (found := _beneath(of, but)) and time.monotonic() < deadline:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=max(0.0, deadline - time.monotonic()))


class Zombies:
    """Reaps dead children whose exit codes nobody reads. Most were adopted and would stay as long as this process lives."""

    def __init__(self) -> None:
        self._seen: frozenset[int] = frozenset()

    def reap(self) -> None:
        """Reap the dead children that were already there at the last call.

        A child with a Python object keeps its exit code, because user code may read it at any time.
        """
        import multiprocessing

        multiprocessing.active_children()  # reaps multiprocessing's own
        found = _zombies()
        if old := found & self._seen:
            for process in old - _of_subprocess():
                with suppress(ChildProcessError):
                    os.waitpid(process, os.WNOHANG)
        self._seen = found


def _zombies() -> frozenset[int]:
    with suppress(ChildProcessError, AttributeError):  # macOS has waitid from Python 3.13 on, and adopts nothing
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return frozenset()
        return frozenset(child for child in children() if not is_alive(child))
    return frozenset()


def _of_subprocess() -> frozenset[int]:
    import subprocess

    return frozenset(found.pid for found in gc.get_objects() if issubclass(type(found), subprocess.Popen))


def children() -> frozenset[int]:
    """Return the ids of this process's children."""
    if not _has_children():
        return frozenset()
    import psutil

    return frozenset(child.pid for child in psutil.Process().children())


def is_stopped(process: int) -> bool:
    """Return whether a process is stopped by a signal such as SIGSTOP."""
    return _status(process) == "stopped"


def is_alive(process: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    return _status(process) not in (None, "zombie", "dead")


def _status(process: int) -> str | None:
    import psutil

    with suppress(psutil.Error):
        return str(psutil.Process(process).status())
    return None


def end_orphans(*, but: Collection[int]) -> None:
    """Kill the orphans that this process has adopted, with their descendants.

    Args:
        but: ids of its own children.
    """
    if _adopts():
        end(but=but)


def _adopts() -> bool:
    if sys.platform != "linux":
        return False
    answer = ctypes.c_int(0)
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return bool(answer.value)


def end_with(code: int) -> NoReturn:
    """Kill all descendants of this process, and exit at once without clean-up."""
    try:
        end()
    finally:
        os._exit(code)


def _has_children() -> bool:
    """Return whether this process has children. The kernel answers at once, so psutil is often not loaded."""
    with suppress(AttributeError):  # macOS has waitid from Python 3.13 on
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
    return True


def _beneath(top: int | None, but: Collection[int]) -> list[psutil.Process]:
    import psutil

    spared = {*but}
    if tracker := sys.modules.get("multiprocessing.resource_tracker"):
        # It ends after all others and removes what they left in shared memory.
        spared.add(tracker._resource_tracker._pid)
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for child in psutil.Process(top).children():
            if child.pid not in spared:
                found.append(child)
                with suppress(psutil.Error):
                    found += child.children(recursive=True)
    return found


@contextmanager
def ending_forks() -> Iterator[None]:
    """End a process that the block forks when it leaves the block, so that it does not become a second worker."""
    process = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != process:
            _leave_fork(error)
        raise
    if os.getpid() != process:
        _leave_fork(None)


def _leave_fork(error: BaseException | None) -> None:
    """Exit a forked process with the output and the exit code that the interpreter would give."""
    code: object = 0
    if isinstance(error, SystemExit):
        code = error.code
    elif error is not None:
        text.say_page(text.traceback_page(error), to=sys.stderr)
        code = 1
    if code is not None and not isinstance(code, int):
        text.say(code, to=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit((code or 0) & 0xFF)
