"""Signals as a request: the first asks to checkpoint and leave, the second ends the process."""

from __future__ import annotations

import os
import signal
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1 is Slurm's notice before a time limit


class StopSignal:
    """Says whether this process was asked to stop; called like a function."""

    def __init__(self) -> None:
        self.received: int | None = None

    @classmethod
    def installed(cls) -> StopSignal:
        """Return one that handles this process's signals from now on."""
        stopping = cls()
        for number in ASKING:
            signal.signal(number, stopping._receive)
        return stopping

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's own signature)
        if self.received is not None:
            os._exit(128 + number)  # now: nothing is tidied up; a lease runs out by itself
        self.received = number

    def request(self) -> None:
        """Ask for the same from inside the process."""
        self.received = self.received or signal.SIGTERM

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """0 if nothing was received, else 128 + the signal's number."""
        return 128 + self.received if self.received else 0
