"""The processes beneath this one: found wherever they went to, and ended with it.

User code starts processes, and forgets them. One whose parent has ended goes to the nearest ancestor that adopts, which is
this process, so that neither `setsid` nor a double fork hides it. That is Linux; elsewhere such a process is not found.
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
GONE_SECONDS = 1.0  # that killed processes may take to be gone


def adopt() -> None:
    """Adopt the orphans beneath this process from now on, and end all that is beneath it at its own end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    atexit.register(_end_of, os.getpid())  # before user code registers what it does at its end: this comes last


def _end_of(process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        end()


def end(*, but: Collection[int] = ()) -> None:
    """Kill all that is beneath this process and wait a moment until it is gone.

    Args:
        but: ids of children to leave alone, and with them what is beneath them.
    """
    if not _has_children():
        return
    import psutil

    deadline = time.monotonic() + GONE_SECONDS
    while (
        found := _beneath(but)
    ) and time.monotonic() < deadline:  # again: what is killed may just have started others
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=max(0.0, deadline - time.monotonic()))


class Zombies:
    """Dead children whose exit codes nobody asks for: most were adopted, and would stay for as long as this process."""

    def __init__(self) -> None:
        self._seen: frozenset[int] = frozenset()

    def reap(self) -> None:
        """Let those go that were there at the last call already.

        What there is a Python object for keeps its exit code: user code may ask for it at any time.
        """
        import multiprocessing

        multiprocessing.active_children()  # asks for those of its own
        found = _zombies()
        if old := found & self._seen:
            for process in old - _of_subprocess():
                with suppress(ChildProcessError):
                    os.waitpid(process, os.WNOHANG)
        self._seen = found


def _zombies() -> frozenset[int]:
    with suppress(ChildProcessError, AttributeError):  # macOS has it from Python 3.13 on, and adopts nothing
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
    """Say whether a process stands still by a signal, until another one lets it go on."""
    return _status(process) == "stopped"


def is_alive(process: int) -> bool:
    """Say whether there is such a process, and not only its exit code."""
    return _status(process) not in (None, "zombie", "dead")


def _status(process: int) -> str | None:
    import psutil

    with suppress(psutil.Error):
        return str(psutil.Process(process).status())
    return None


def end_orphans(*, but: Collection[int]) -> None:
    """End what this process has adopted, and what is beneath that.

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
    """End all that is beneath this process and the process itself on the spot."""
    try:
        end()
    finally:
        os._exit(code)


def _has_children() -> bool:
    """Ask the kernel, which takes no time, before psutil is loaded."""
    with suppress(AttributeError):  # macOS has it from Python 3.13 on
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
    return True


def _beneath(but: Collection[int]) -> list[psutil.Process]:
    import psutil

    spared = {*but}
    if tracker := sys.modules.get("multiprocessing.resource_tracker"):
        spared.add(
            tracker._resource_tracker._pid
        )  # it ends after all others, and takes away what they left in shared memory
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.pid not in spared:
                found.append(child)
                with suppress(psutil.Error):
                    found += child.children(recursive=True)
    return found


@contextmanager
def ending_forks() -> Iterator[None]:
    """End a process that the block forks where it would leave the block: it is no second worker."""
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
    """End a forked process as the interpreter would."""
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
