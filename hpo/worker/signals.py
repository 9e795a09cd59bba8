"""Signals that ask a worker to stop: the first asks it to save its trials and exit, the second ends it at once.

A separate thread reads them, so they are noticed while the main thread is in C code. The thread also ends a process
that does not exit within its grace. Only C code that holds the interpreter lock delays this thread as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from hpo.worker import descendants

log = logging.getLogger(__name__)
#: SIGUSR1 and SIGUSR2 are Slurm's notice before a time limit, as the job's script chooses. NCCL catches SIGUSR1.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: The signal by which `hpo run` asks its workers to stop. A trial may send the others to its own process.
ORDER = signal.SIGRTMIN + 1 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
HEARD = (*ASKING, ORDER)
CONFIRM_SECONDS = 1.0  # within which a parent passes on a signal that reached the whole group
LAST_ACT_SECONDS = 2.0  # how long the last act may delay the end
LOOK_SECONDS = 1.0  # how soon the thread sees a grace that was set without waking it
SAME_SECONDS = 0.1  # two signals of one number within this time are one request: timeout(1) sends its signal twice


class StopSignal:
    """Returns, when called, whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.grace: float | None = None  # seconds from the request until the process is ended; None for no limit
        self._is_supervised = False
        self._is_confirmed = False  # the request came from the parent or from this process
        self._received_at = 0.0
        self._is_retired = False
        self._last_act: Callable[[], None] | None = None
        self._writer: socket.socket | None = None  # each byte is a signal's number; 0 only wakes the thread
        self._masks = threading.local()

    @classmethod
    def installed(cls, *, grace: float | None = None, is_supervised: bool = False) -> StopSignal:
        """Return a StopSignal that handles this process's signals from now on. The main thread must call this.

        Args:
            grace: seconds from the request until the process is ended; None for no limit.
            is_supervised: whether a parent asks by ORDER. A signal to the whole group, such as Slurm's notice, reaches both,
                and the parent passes it on. So a second signal does not end the process at once. The parent can kill it.
        """
        stopping = cls()
        stopping.grace = grace
        stopping._is_supervised = is_supervised
        reader, stopping._writer = socket.socketpair()
        stopping._writer.setblocking(False)
        threading.Thread(target=stopping._watch, args=(reader,), name="stop-signal", daemon=True).start()
        signal.set_wakeup_fd(stopping._writer.fileno(), warn_on_full_buffer=False)
        for number in HEARD:
            signal.signal(number, stopping._handle)
        os.register_at_fork(
            before=stopping._block, after_in_parent=stopping._unblock, after_in_child=stopping._be_a_mere_flag
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)  # a restarted process blocks them until here
        return stopping

    def request(self) -> None:
        """Ask this process to stop, from any of its threads."""
        self._is_confirmed = True
        if self.received is None:
            self._note(signal.SIGTERM)
        self._tell(0)

    def retire(self) -> None:
        """Ask this process to stop for good, with exit code 0: its engine must not run it again."""
        self._is_retired = True
        self.request()

    def end_within(self, grace: float, last_act: Callable[[], None] | None = None) -> None:
        """End the process `grace` seconds after the request, unless it has exited by then. The request may come before this.

        Args:
            grace: in seconds.
            last_act: called before that end in a thread of its own, which is waited for up to LAST_ACT_SECONDS.
        """
        self._last_act = last_act  # set before the grace, because the thread calls it when the grace is over
        self.grace = grace
        self._tell(0)

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """0 if nothing was received or the process was retired, else 128 + the signal's number."""
        return 128 + self.received if self.received and not self._is_retired else 0

    def is_unasked(self) -> bool:
        """Return whether a supervised process got a signal that its parent did not send.

        This waits up to CONFIRM_SECONDS for the parent's own signal.
        """
        while self.received is not None and self._is_supervised and not self._is_confirmed:
            if time.monotonic() - self._received_at >= CONFIRM_SECONDS:
                return True
            time.sleep(0.01)
        return False

    def _note(self, number: int) -> None:
        self._received_at = time.monotonic()  # set first, because the thread reads it once there is a number
        self.received = number

    def _tell(self, byte: int) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # the buffer is full, so the thread wakes anyway; or user code closed it
                self._writer.send(bytes([byte]))

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's own signature)
        """Pass the signal on if user code has replaced or closed the wakeup descriptor. Otherwise the thread has read it.

        An event loop in user code sets its own wakeup descriptor, and resets it when it ends.
        """
        assert self._writer is not None
        own = self._writer.fileno()
        try:
            current = signal.set_wakeup_fd(own, warn_on_full_buffer=False)
        except (OSError, ValueError):  # closed by user code
            self._receive(number)
            return
        if current == own:
            return
        self._tell(number)
        if current != -1:
            signal.set_wakeup_fd(current)

    def _watch(self, reader: socket.socket) -> None:
        while (left := self._seconds_left()) > 0:
            try:
                reader.settimeout(left)
                for number in reader.recv(4096):
                    self._receive(number)
            except TimeoutError:
                pass
            except OSError:  # closed by user code: from now on the handler calls `_receive`
                time.sleep(min(left, LOOK_SECONDS / 10))
        self._end()

    def _seconds_left(self) -> float:
        if self.received is None or self.grace is None:
            return LOOK_SECONDS
        last_act = min(LAST_ACT_SECONDS, self.grace / 2)  # the last act is part of the grace
        return min(self._received_at + self.grace - last_act - time.monotonic(), LOOK_SECONDS)

    def _receive(self, number: int) -> None:
        if number not in HEARD:  # every signal with a Python handler arrives here, such as torch's SIGCHLD
            return
        if number == ORDER:
            self.request()
        elif self.received is None:
            self._note(number)
        elif not self._is_supervised and (
            number != self.received or time.monotonic() - self._received_at >= SAME_SECONDS
        ):
            descendants.end_with(128 + number)  # at once and without clean-up; the leases expire

    def _end(self) -> None:
        """End the process. Logging has a time limit, too, because the thread that holds the log's lock may hang."""
        try:
            acts = [act for act in (self._say_late, self._last_act) if act is not None]
            threads = [threading.Thread(target=attempt, args=(act,), daemon=True) for act in acts]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + LAST_ACT_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            descendants.end_with(self.exit_code)

    def _say_late(self) -> None:
        late = "the process did not exit within %g s after it was asked to stop: ending it now"
        log.warning(late, self.grace, extra={"action": "grace_over"})

    def _block(self) -> None:
        """Block signals around a fork. Until `_be_a_mere_flag` has run, the child's signals would count as the parent's."""
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _be_a_mere_flag(self) -> None:
        """Restore the default signal handlers in a forked child. For example, torch's DataLoader ends workers with SIGTERM."""
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            for number in HEARD:
                if signal.getsignal(number) == self._handle:  # a handler of user code stays
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            self._writer.close()
            self._writer = None
        self._unblock()


def attempt(act: Callable[[], None]) -> None:
    """Call `act` and ignore its errors, which must not delay the end."""
    with contextlib.suppress(BaseException):
        act()
