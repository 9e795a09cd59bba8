"""The handlers of signals in the test process, which commands replace for good: a real one has a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.worker.signals import HEARD


@dataclass(frozen=True)
class Handlers:
    """The handlers of a process and its wakeup descriptor at one moment.

    A command that was called in this process leaves a thread that reads the descriptor. To it, the second signal of later tests
    means "now", so it would end the test process.
    """

    wakeup: int
    by_number: Mapping[int, Any]

    @classmethod
    def now(cls) -> Handlers:
        """Return those of this moment."""
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return cls(wakeup, {number: signal.getsignal(number) for number in HEARD})

    def restore(self) -> None:
        """Set these again."""
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.by_number.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
