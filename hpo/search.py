"""One `hpo run` from start to end: workers started, watched, shown, and stopped in order.

The order of an end: no new trial is claimed, running trials park with a checkpoint, workers leave, the summary is read.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from hpo import results
from hpo.fleet.local import GRACE_SECONDS, Fleet
from hpo.results import Summary
from hpo.study import Study
from hpo.view.live import LiveView

REFRESH_SECONDS = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """The signals that reached this process so far."""

    received: list[int] = field(default_factory=list)

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's own signature)
        self.received.append(number)

    @property
    def exit_code(self) -> int:
        return 128 + self.received[0] if self.received else 0


@contextmanager
def catching_signals() -> Iterator[Interrupt]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def search(study: Study, fleet: Fleet, view: LiveView, *, timeout: float | None) -> int:
    """Run the fleet until the budget is spent, the time is up or a signal says stop; return 0 or 128 + the signal.

    Args:
        timeout: seconds of wall clock for this run; what still trains then is parked.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    seen, summary = results.Cursor(), results.summarize(study)
    with catching_signals() as interrupt, view:
        fleet.start()
        try:
            asked = False
            while fleet.tend():
                summary = results.summarize(study, summary)
                view.update(summary, results.finished(study, seen))
                time_is_up = deadline is not None and time.monotonic() >= deadline
                if not asked and (interrupt.received or time_is_up):
                    asked = True
                    view.say("stopping: running trials are parked with a checkpoint; again to end at once")
                    stop(fleet, interrupt)
                fleet.wait(REFRESH_SECONDS)
        finally:
            fleet.kill()
        view.update(results.summarize(study, summary), results.finished(study, seen))
    return interrupt.exit_code


def stop(fleet: Fleet, interrupt: Interrupt) -> None:
    """Ask the workers to park and wait for them; a second signal or the end of the grace ends them at once."""
    already = len(interrupt.received)
    fleet.stop()
    fleet.wait(GRACE_SECONDS, until=lambda: len(interrupt.received) > max(already, 1))
    fleet.kill()


def is_over(summary: Summary) -> bool:
    """Say whether a run has nothing to do: no trial to go on with, and no new one allowed."""
    unfinished = summary.counts["parked"] + summary.counts["running"]
    return not unfinished and (summary.spent >= summary.budget or summary.stop_reason is not None)
