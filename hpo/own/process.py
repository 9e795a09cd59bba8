"""A user's program as a child process: started in a process group of its own, read without waiting, ended with its group.

The group is led by a guard, a shell that waits for the end of a pipe. The pipe ends when this process does, also by
`kill -9`. Then the guard kills the group. So no program outlives its worker, and neither does what it has started.
A program may make a group of its own, as `timeout` does. So the guard and `Program` also end the child and that group.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from hpo.errors import ProgramError

#: Signals to the whole group do not reach the guard. Only SIGKILL does. The pipe's one line is the child's id.
GUARD = """
trap "" HUP INT QUIT PIPE ALRM TERM USR1 USR2 TSTP
read -r child
read -r _
[ -z "$child" ] || kill -KILL "$child" "-$child" 2>/dev/null
kill -KILL 0
"""
END_SECONDS = 5.0  # for which a killed child is waited for; one that waits for a disk may take longer
CHUNK_BYTES = 2**16
LONGEST_LINE = 2**14  # bytes of a line that are looked at
SHELL_OFFSET = 128  # a shell's exit code for a program that a signal killed is this plus the signal's number
SIGNALS = 32  # the numbers below this are those of POSIX


class Program:
    """A running program. Leaving the block kills whatever is left of its group."""

    def __init__(
        self, words: Sequence[str], *, folder: Path, environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> None:
        """Start a program. Its errors come in one stream with its output; its input is empty.

        Args:
            words: the program and its arguments.
            folder: its working directory.
            environment: all of its environment.
            descriptors: open files of this process that it gets too.

        Raises ProgramError if it cannot be started.
        """
        self._guard = subprocess.Popen(["/bin/sh", "-c", GUARD], stdin=subprocess.PIPE, process_group=0)
        try:
            self._child = subprocess.Popen(
                words,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                process_group=self._guard.pid,
                pass_fds=descriptors,
            )
        except (OSError, ValueError) as error:  # ValueError: a null character in a word
            self._end_guard()
            why = getattr(error, "strerror", None) or str(error)
            raise ProgramError(f"command: {words[0]!r} cannot be started: {why}") from None
        assert self._guard.stdin is not None
        self._guard.stdin.write(b"%d\n" % self._child.pid)
        self._guard.stdin.flush()
        assert self._child.stdout is not None
        self._output = self._child.stdout
        os.set_blocking(self._output.fileno(), False)
        self._poll = select.poll()
        self._poll.register(self._output.fileno(), select.POLLIN)
        self.is_open = True  # more output may come

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._output.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(END_SECONDS)
        self._end_guard()

    @property
    def name(self) -> str:
        """How messages call it."""
        return "the program"

    @property
    def last_lines(self) -> list[str] | None:
        """The last lines of the process that has failed; None if they are those of the output."""
        return None

    @property
    def status(self) -> str:
        """What the system says of the process, in words."""
        with suppress(psutil.Error):
            found = psutil.Process(self._child.pid).status()
            return "is stopped" if found == psutil.STATUS_STOPPED else f"is {found}"
        return "has ended"

    def fileno(self) -> int:
        """Return the descriptor of its output."""
        return self._output.fileno()

    @property
    def exit_code(self) -> int | None:
        """None while the program runs; negative if a signal killed it, also if its shell says so."""
        code = self._child.poll()
        if code is not None and SHELL_OFFSET < code < SHELL_OFFSET + SIGNALS:
            return SHELL_OFFSET - code
        return code

    def read(self, seconds: float) -> bytes:
        """Return what the program has printed; b"" if it prints nothing for so many seconds, or has ended."""
        if not self.is_open:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=seconds)
            return b""
        if not self._poll.poll(1000 * seconds):
            return b""
        chunk = os.read(self._output.fileno(), CHUNK_BYTES)
        self.is_open = bool(chunk)
        return chunk

    def terminate(self) -> None:
        """Ask the whole group to end, by SIGTERM, and the program's own group if it has made one."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the whole group, without waiting for its end."""
        self._signal(signal.SIGKILL)
        with suppress(PermissionError):
            self._child.kill()  # it may be in a third group

    def _signal(self, number: int) -> None:
        for group in (self._guard.pid, self._child.pid):  # the second one exists if the program has made it
            with suppress(ProcessLookupError, PermissionError):  # PermissionError on macOS, if only zombies are left
                os.killpg(group, number)

    def _end_guard(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


class Lines:
    """Cuts output into lines. A carriage return ends a line too, since progress bars print it."""

    def __init__(self) -> None:
        self._left = b""

    def of(self, chunk: bytes) -> list[str]:
        """Return the lines that end in this chunk, without empty ones. Of a long line LONGEST_LINE bytes are kept."""
        first, *others = chunk.replace(b"\r", b"\n").split(b"\n")
        self._left = (self._left + first)[:LONGEST_LINE]
        if not others:
            return []
        *between, rest = others
        ended, self._left = [self._left, *(line[:LONGEST_LINE] for line in between)], rest[:LONGEST_LINE]
        return [line.decode(errors="replace") for line in ended if line]

    def rest(self) -> list[str]:
        """Return the last line if no newline has ended it."""
        return self.of(b"\n")


class OutOfMemoryCount:
    """Says whether the system has killed a process for want of memory since this was made. Linux alone counts that."""

    def __init__(self) -> None:
        self._before = self._count()

    def has_grown(self) -> bool:
        return self._count() > self._before

    @staticmethod
    def _count() -> int:
        with suppress(OSError):
            for line in Path("/proc/vmstat").read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        return 0
