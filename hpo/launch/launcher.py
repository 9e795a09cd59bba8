"""One `hpo run` from start to end: workers started, watched, shown, and stopped in order.

The order of an end: no new trial is claimed, running trials park with a checkpoint, workers leave, the summary is read.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpo import text
from hpo.errors import StorageError, StorageGone
from hpo.launch.local import Fleet
from hpo.queue import workers
from hpo.queue.reaper import Reaper
from hpo.storage.connect import FAILURES, cause
from hpo.study import query
from hpo.study.status import Past, read
from hpo.study.study import Study
from hpo.study.trial_history import finished
from hpo.view.live import LiveView
from hpo.worker.signals import ASKING, SAME_SECONDS

REFRESH_SECONDS = 0.25


class Interrupt:
    """What signals do to a run: the first asks it to stop, the next kills the workers, one more ends it at once.

    A thread hears them, since the main thread may wait for a storage for seconds, and its workers for its word meanwhile.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.received: list[int] = []
        self._received_at = 0.0

    def listen(self, reader: socket.socket) -> None:
        """Act on signals, which come as bytes, until the other side is closed."""
        while numbers := reader.recv(4096):
            for number in numbers:
                is_same = number in self.received[-1:] and time.monotonic() - self._received_at < SAME_SECONDS
                if number in ASKING and not is_same:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        self.received.append(number)
        self._received_at = time.monotonic()
        if len(self.received) > 2:
            self.fleet.end_orphans()
            os._exit(128 + number)  # even from amid a statement that waits for the database
        if len(self.received) > 1 or self.fleet.stop_asked_at is not None:
            self.fleet.kill_processes()
        else:
            self.fleet.ask_processes()  # now: the loop may be waiting for a storage that fails

    @property
    def exit_code(self) -> int:
        return 128 + self.received[0] if self.received else 0


@contextmanager
def catching_signals(fleet: Fleet) -> Iterator[Interrupt]:
    """Handle the signals that ask a process to leave, and put the old handlers back."""
    interrupt = Interrupt(fleet)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    listening = threading.Thread(target=interrupt.listen, args=(reader,), name="interrupt", daemon=True)
    listening.start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in ASKING}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        listening.join()
        reader.close()


def run_workers(study: Study, fleet: Fleet, view: LiveView, *, timeout: float | None) -> int:
    """Run the fleet until the budget is spent, the time is up or a signal says stop; return 0 or 128 + the signal.

    Args:
        timeout: seconds of wall clock for this run; what still trains then is parked.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    outage_since: float | None = None
    past = read(study).past  # what has finished by now is not told
    ledger = study.ledger(f"launcher:{workers.new_name()}")
    workers.register(ledger)
    reaper = Reaper(ledger)
    with catching_signals(fleet) as interrupt, view:
        for held in query.held_elsewhere(study):
            view.say(
                f"trial {held.number} is held by {held.worker} of another machine and is left to it; "
                f"if that is gone: {text.command('doctor', study.name, options=f'--release {held.number}')}"
            )
        try:
            fleet.start()
            while fleet.tend():
                try:
                    if reaper.is_due:
                        reaper()
                    past = _show(study, view, past)
                    outage_since = None
                except FAILURES as error:  # the workers look after themselves; there is nothing to show
                    outage_since = outage_since or time.monotonic()
                    if time.monotonic() - outage_since > study.spec.recovery.outage_seconds:
                        raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
                if fleet.stop_asked_at is None and (interrupt.received or time.monotonic() >= deadline):
                    view.say("stopping: running trials are parked with a checkpoint; Ctrl-C to end at once")
                    fleet.stop()
                fleet.wait(REFRESH_SECONDS)
        finally:
            fleet.end()
            with suppress(*FAILURES, StorageGone):
                workers.unregister(ledger)
        try:
            _show(study, view, past)
        except FAILURES:
            if not interrupt.received:
                raise
    return interrupt.exit_code


def _show(study: Study, view: LiveView, past: Past) -> Past:
    """Show the study as it is now; return what the next look need not read again.

    Not moved on by a look that fails half way: no trial that ended goes untold.
    """
    reading = read(study, past)
    view.update(reading.summary, finished(study, reading.ended, total=reading.summary.finished))
    return reading.past
