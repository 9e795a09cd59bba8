"""One `hpo run` from start to end: starts, watches, shows and stops the workers.

At the end no new trial is claimed. Running trials are parked with a checkpoint, workers exit, and the summary is read.
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
from hpo.launch.slots import CRASHES
from hpo.queue import workers
from hpo.queue.reaper import Reaper
from hpo.storage.connect import FAILURES, cause
from hpo.study import details
from hpo.study.query import trouble
from hpo.study.status import Past, read
from hpo.study.study import Study
from hpo.study.trial_history import finished
from hpo.view.live import LiveView
from hpo.view.picture import Around
from hpo.worker.signals import ASKING, SAME_SECONDS

REFRESH_SECONDS = 0.25


class Interrupt:
    """The reaction of a run to signals. The first one asks workers to stop, the second kills them, the third ends the run.

    A thread handles them, since the main thread may wait for the storage for seconds.

    Args:
        fleet: the workers.
        may_exit: whether the third signal ends this process. A notebook's process, for example, holds more than the run.
    """

    def __init__(self, fleet: Fleet, *, may_exit: bool = True) -> None:
        self.fleet = fleet
        self.may_exit = may_exit
        self.received: list[int] = []
        self._received_at = 0.0

    def listen(self, reader: socket.socket) -> None:
        """Handle signals, which arrive as bytes, until the other end of the socket is closed."""
        while numbers := reader.recv(4096):
            for number in numbers:
                is_same = number in self.received[-1:] and time.monotonic() - self._received_at < SAME_SECONDS
                if number in ASKING and not is_same:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        self.received.append(number)
        self._received_at = time.monotonic()
        if len(self.received) > 2 and self.may_exit:
            self.fleet.end_orphans(may_wait=False)  # the server may take seconds, or be stopped
            os._exit(128 + number)  # works even while a statement waits for the database
        if len(self.received) > 1 or self.fleet.stop_asked_at is not None:
            self.fleet.kill_processes()
        else:
            self.fleet.ask_processes()  # at once, since the main loop may be waiting for the storage

    @property
    def exit_code(self) -> int:
        return 128 + self.received[0] if self.received else 0


@contextmanager
def catching_signals(interrupt: Interrupt) -> Iterator[Interrupt]:
    """Handle the signals that ask a process to stop within this block, then restore the old handlers.

    Outside the main thread nothing is handled, since Python calls handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
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


def run_workers(study: Study, fleet: Fleet, view: LiveView, *, timeout: float | None, may_exit: bool = True) -> int:
    """Run the workers until the budget is spent, the time is up or a signal arrives. Return 0 or 128 + the signal.

    Args:
        study: the study.
        fleet: its workers.
        view: shows the progress.
        timeout: the time limit of this run in seconds. Unfinished trials are parked.
        may_exit: let a third signal end this process at once.

    Raises StorageError if the storage fails for longer than `recovery.outage_patience`.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    outage_since: float | None = None
    past = read(study).past  # trials that have finished before are not shown
    ledger = study.ledger(f"{workers.LAUNCHER}{workers.new_name()}")
    workers.register(ledger)
    reaper = Reaper(ledger)
    with catching_signals(Interrupt(fleet, may_exit=may_exit)) as interrupt, view:
        for held in trouble.held_elsewhere(study):
            view.say(
                f"trial {held.number} is held by {held.worker} on another machine and is left to it; "
                f"if that worker is gone: {text.command('doctor', study.name, options=f'--release {held.number}')}"
            )
        count = len(fleet.slots)
        view.stage(f"{study.name}: starting {count} worker{'s' if count > 1 else ''}, which takes some seconds")
        try:
            fleet.start()
            while fleet.tend():
                try:
                    if reaper.is_due:
                        reaper()
                    past = _show(study, fleet, view, past)
                    outage_since = None
                except FAILURES as error:  # the workers handle the outage themselves
                    outage_since = outage_since or time.monotonic()
                    if time.monotonic() - outage_since > study.spec.recovery.outage_seconds:
                        raise StorageError(f"storage {study.storage.shown}: {cause(error)}") from error
                if fleet.stop_asked_at is None and (why := _why_stop(fleet, interrupt, deadline)):
                    view.say(f"{why}: {_what_becomes_of_trials(study)}; Ctrl-C ends at once")
                    fleet.stop()
                fleet.wait(REFRESH_SECONDS)
        finally:
            fleet.end()
            with suppress(*FAILURES, StorageGone):
                workers.unregister(ledger)
        try:
            _show(study, fleet, view, past)
        except FAILURES:
            if not interrupt.received:
                raise
    return interrupt.exit_code


def _why_stop(fleet: Fleet, interrupt: Interrupt, deadline: float) -> str:
    """Return why the run is to end now, "" if it goes on."""
    if interrupt.received or time.monotonic() >= deadline:
        return "stopping"
    if dead := fleet.died_at_start:
        return f"stopping, since {dead[0].name} died {CRASHES} times at its start"
    return ""


def _what_becomes_of_trials(study: Study) -> str:
    if not study.spec.is_declared:
        return (
            "running trials are parked; each goes on from its last checkpoint, or starts again with the same parameters"
        )
    return "running trials are parked with a checkpoint"


def _show(study: Study, fleet: Fleet, view: LiveView, past: Past) -> Past:
    """Show the study as it is now. Return the past for the next read, which then reads only what is new.

    A read that fails returns no new past, so each finished trial is shown.
    """
    reading = read(study, past)
    ended = finished(study, reading.ended, total=reading.summary.own_finished)
    if not view.live:
        view.update(reading.summary, ended)
        return reading.past
    is_training = bool(reading.ended) or any(trial.epochs for trial in reading.summary.running)
    doing = {} if is_training or fleet.stop_asked_at is not None else fleet.doing()
    machine = fleet.usage.line(reading.summary, ended)
    view.update(reading.summary, ended, Around(details=details.read(study, reading), doing=doing, machine=machine))
    return reading.past
