"""Signals as a request: the first asks to checkpoint and leave, the second ends the process.

A thread of its own reads them, so they are noticed however deep in C code the main thread is, and ends a process that
does not come to an end within its grace. Only C code that keeps the interpreter lock holds that thread up as well.
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
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1 is Slurm's notice before a time limit
#: What `hpo run` asks its workers by. The others a trial may send to its own process, and nobody can tell who sent one.
ORDER = signal.SIGRTMIN + 1 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
HEARD = (*ASKING, ORDER)
CONFIRM_SECONDS = 1.0  # within which a parent passes on a signal that reached the whole group
LAST_ACT_SECONDS = 2.0  # how long the last act may hold up the end
LOOK_SECONDS = 1.0  # how soon a grace is seen that was set without a word to the thread
SAME_SECONDS = 0.1  # signals of one number so close are one request: timeout(1) sends its signal twice


class StopSignal:
    """Says whether this process was asked to stop; called like a function."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.grace: float | None = None  # seconds from the request until the process is ended; None leaves it alone
        self._is_supervised = False
        self._is_confirmed = False  # the request came from who may ask
        self._received_at = 0.0
        self._last_act: Callable[[], None] | None = None
        self._writer: socket.socket | None = None  # its bytes are signals' numbers; 0 only wakes the thread
        self._masks = threading.local()

    @classmethod
    def installed(cls, *, grace: float | None = None, is_supervised: bool = False) -> StopSignal:
        """Return one that handles this process's signals from now on; the main thread must call it.

        Args:
            is_supervised: whether a parent asks by ORDER. It passes on what reaches the whole group, as Slurm's notice does,
                so a second signal does not end the process at once. That parent can kill.
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)  # a process that started afresh holds them back until here
        return stopping

    def request(self) -> None:
        """Ask for the same from inside the process, from any thread."""
        self._is_confirmed = True
        if self.received is None:
            self._note(signal.SIGTERM)
        self._tell(0)

    def end_within(self, grace: float, last_act: Callable[[], None] | None = None) -> None:
        """End the process so many seconds after the request, which may have come already, unless it has ended by then.

        Args:
            last_act: called before that end in a thread of its own, and waited for LAST_ACT_SECONDS.
        """
        self._last_act = last_act  # first: the thread calls it once the grace is over
        self.grace = grace
        self._tell(0)

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """0 if nothing was received, else 128 + the signal's number."""
        return 128 + self.received if self.received else 0

    def is_unasked(self) -> bool:
        """Say whether a supervised process was signalled by somebody who may not ask; waits a moment for its parent's word."""
        while self.received is not None and self._is_supervised and not self._is_confirmed:
            if time.monotonic() - self._received_at >= CONFIRM_SECONDS:
                return True
            time.sleep(0.01)
        return False

    def _note(self, number: int) -> None:
        self._received_at = time.monotonic()  # first: the thread reads it once there is a number
        self.received = number

    def _tell(self, byte: int) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # full: the thread has enough to wake up for; or closed by user code
                self._writer.send(bytes([byte]))

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's own signature)
        """Do nothing, as a rule, for the thread knows.

        An event loop in user code takes the wakeup descriptor, then drops it.
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
            except OSError:  # closed by user code: from now on the handler tells
                time.sleep(min(left, LOOK_SECONDS / 10))
        self._end()

    def _seconds_left(self) -> float:
        if self.received is None or self.grace is None:
            return LOOK_SECONDS
        last_act = min(LAST_ACT_SECONDS, self.grace / 2)  # within the grace too
        return min(self._received_at + self.grace - last_act - time.monotonic(), LOOK_SECONDS)

    def _receive(self, number: int) -> None:
        if number not in HEARD:  # every signal with a handler comes by, such as the SIGCHLD that torch handles
            return
        if number == ORDER:
            self.request()
        elif self.received is None:
            self._note(number)
        elif not self._is_supervised and (
            number != self.received or time.monotonic() - self._received_at >= SAME_SECONDS
        ):
            descendants.end_with(128 + number)  # now: nothing is tidied up; a lease runs out by itself

    def _end(self) -> None:
        """End the process; whoever holds the log's lock may hang as well, so saying it is not waited for either."""
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
        late = "asked to stop, the process did not come to an end within %g s: ending it now"
        log.warning(late, self.grace, extra={"action": "grace_over"})

    def _block(self) -> None:
        """Hold signals back around a fork: until the child is a mere flag, its signals would count as the parent's."""
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _be_a_mere_flag(self) -> None:
        """Leave a forked child its own signals: torch's DataLoader, for one, ends its workers with SIGTERM."""
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            for number in HEARD:
                if signal.getsignal(number) == self._handle:  # a handler of user code stays
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            self._writer.close()
            self._writer = None
        self._unblock()


def attempt(act: Callable[[], None]) -> None:
    """Do it; a failure is no reason to put off the end."""
    with contextlib.suppress(BaseException):
        act()
