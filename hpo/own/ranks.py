"""The processes of one trial, its *ranks*, under the environment that torchrun gives: started, read and ended together.

They look like one `Program`, whose output is that of rank 0. What the other ranks print is kept line by line, with a prefix.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from hpo.errors import Unasked
from hpo.own.process import Lines, Program
from hpo.spec import program

log = logging.getLogger(__name__)
ADDRESS = "127.0.0.1"
LAST_LINES = 20  # of each rank's output, in the reason of a failure
LOOK_SECONDS = 0.05  # between two looks at ranks of which none has an output open


class Port:
    """A free port of this machine, for rank 0. No other process gets it by chance until this is closed.

    The socket is bound and does not listen. SO_REUSEADDR is set after that, so that rank 0 alone, which knows the number, may
    bind it too.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind((ADDRESS, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


class Ranks:
    """The running ranks of one trial. Leaving the block kills whatever is left of them."""

    def __init__(
        self,
        words: Sequence[str],
        count: int,
        *,
        folder: Path,
        environment: Mapping[str, str],
        keep: Callable[[bytes], None],
        timeout: float,
        reports: Path,
        channels: Sequence[socket.socket] = (),
    ) -> None:
        """Start all ranks.

        Args:
            words: the program and its arguments, the same for all.
            count: how many ranks there are.
            folder: their working directory.
            environment: all of their environment but what tells ranks apart.
            keep: keeps what the other ranks print.
            timeout: seconds for which all of them may be silent.
            reports: the file of `hpo.report`; that it grows is a sign of life. What other ranks than 0 send is not read.
            channels: a socket for each rank, which is closed here.

        Raises ProgramError if one cannot be started.
        """
        self._keep = keep
        self._timeout = timeout
        self._reports = reports
        self._sent = 0  # bytes of that file at the last look
        self._signed_at = time.monotonic()
        self._failed: int | None = None  # the rank that failed first
        self._others = bytearray()  # whole lines of other ranks, kept once rank 0 has ended its line
        self._is_amid_line = False  # of rank 0
        self._lines = [Lines() for _ in range(count)]
        self._last: list[deque[str]] = [deque(maxlen=LAST_LINES) for _ in range(count)]
        self._programs: list[Program] = []
        with ExitStack() as undone:
            port = Port()
            undone.callback(port.close)
            for rank in range(count):
                own = {**environment, **variables(rank, count, port.number)}
                if rank:
                    own[program.REPORTS] = "/dev/null"
                passed = []
                if channels:
                    own[program.CHANNEL] = str(channels[rank].fileno())
                    passed = [channels[rank].fileno()]
                started = Program(words, folder=folder, environment=own, descriptors=passed)
                self._programs.append(undone.enter_context(started))
            self._undone = undone.pop_all()
        for channel in channels:
            channel.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep_others(is_last=True)
        for running in self._programs:
            running.kill()  # all at once; each is waited for below
        self._undone.close()

    @property
    def name(self) -> str:
        """How messages call the rank that failed."""
        return f"rank {self._failed or 0}"

    @property
    def last_lines(self) -> list[str] | None:
        """The last lines of the rank that failed."""
        return [*self._last[self._failed or 0]]

    @property
    def exit_code(self) -> int | None:
        """None while ranks run and none has failed; else the exit code of the first that failed, or 0."""
        if self._failed is None:
            ended = {rank: running.exit_code for rank, running in enumerate(self._programs)}
            bad = {rank: code for rank, code in ended.items() if code}
            if not bad:
                return None if None in ended.values() else 0
            self._failed = min(bad, key=lambda rank: (_is_consequence(bad[rank]), rank))
        return self._programs[self._failed].exit_code

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, running in enumerate(self._programs) if running.exit_code is None]

    @property
    def is_open(self) -> bool:
        """Whether more output may come."""
        return any(running.is_open for running in self._programs)

    def read(self, seconds: float, also: Collection[int] = ()) -> bytes:
        """Return what rank 0 has printed; b"" if nothing comes for so many seconds. What other ranks printed is kept.

        Args:
            seconds: how long to wait.
            also: descriptors; something to read on one ends the wait.

        Raises Unasked if all ranks have been silent for too long.
        """
        poll = select.poll()
        for descriptor in [*(running.fileno() for running in self._programs if running.is_open), *also]:
            poll.register(descriptor, select.POLLIN)
        if self.is_open or also:
            poll.poll(1000 * seconds)
        else:
            time.sleep(min(seconds, LOOK_SECONDS))
        chunks = [running.read(0) if running.is_open else b"" for running in self._programs]
        for rank, chunk in enumerate(chunks):
            lines = self._lines[rank].of(chunk)
            self._last[rank].extend(program.cut(line) for line in lines if line.strip())
            if rank:
                self._others += b"".join(f"[rank {rank}] {line}\n".encode() for line in lines)
        if chunks[0]:
            self._is_amid_line = not chunks[0].endswith(b"\n")
        if any(chunks) or self._have_sent():
            self.note_sign()
        elif self.running and time.monotonic() - self._signed_at > self._timeout:
            raise Unasked(self._silence())
        if not chunks[0]:  # what rank 0 printed comes first
            self._keep_others()
        return chunks[0]

    def note_sign(self) -> None:
        """Note that a rank has given a sign of life."""
        self._signed_at = time.monotonic()

    def terminate(self) -> None:
        """Ask all ranks to end, by SIGTERM."""
        for running in self._programs:
            running.terminate()

    def _keep_others(self, *, is_last: bool = False) -> None:
        if is_last:
            for rank, lines in enumerate(self._lines[1:], start=1):
                self._others += b"".join(f"[rank {rank}] {line}\n".encode() for line in lines.rest())
        if self._others and (is_last or not self._is_amid_line):
            self._keep((b"\n" if self._is_amid_line else b"") + bytes(self._others))
            self._others.clear()

    def _have_sent(self) -> bool:
        try:
            size = self._reports.stat().st_size
        except OSError:
            return False
        has_grown, self._sent = size > self._sent, size
        return has_grown

    def _silence(self) -> str:
        """Return in a line that nothing came, with what the ranks do."""
        doing = ", ".join(f"rank {rank} {self._programs[rank].status}" for rank in self.running)
        return f"no rank has printed or reported anything for {self._timeout:g} s (recovery.rank_timeout): {doing}"


def variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank. All ranks of a trial are on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
    }


def _is_consequence(code: int) -> int:
    """Return how probably another rank's end was the cause of this one: least for a signal from outside."""
    if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return 0
    return 1 if code > 0 else 2  # NCCL aborts a rank that waits for one which is gone
