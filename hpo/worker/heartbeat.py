"""The worker's second thread: it keeps the leases while an epoch lasts, reaps the dead, and hears what others want.

Whatever a storage throws at one of its duties, the others are done and the next tick tries again; a storage that hangs
holds up all of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType

from hpo.errors import StorageGone
from hpo.queue import workers
from hpo.queue.ledger import Ledger
from hpo.queue.reaper import TICKS_PER_LEASE, Reaper
from hpo.storage.connect import FAILURES, cause
from hpo.worker.client import Lease, QueueClient

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class Heartbeat:
    """Does for a worker what must not wait for its training thread."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        parent: int | None = None,
        leave: Callable[[], None] = lambda: None,
        overdue: Callable[[Lease], None] = lambda _: None,
    ) -> None:
        """Keep leases of `ledger`.

        Args:
            parent: the process that must stay this one's parent, if one is named.
            leave: called when this process is to end: its parent is gone, or its storage for good.
            overdue: called when a trial's time is up and its training thread does not notice within a lease.
        """
        self._ledger = ledger
        self._parent = parent
        self._leave = leave
        self._overdue = overdue
        self._reaper = Reaper(ledger)
        self._client: QueueClient | None = None
        self._is_registered = False
        self._failing: set[str] = set()
        self._tick_seconds = min(TICK_SECONDS, ledger.lease_seconds / TICKS_PER_LEASE)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._look_for_the_parent()  # it may have died while this process was starting
        self._try("register", self._register)
        self._try("reap", self._reap)  # before the first claim: what is parked goes before what is new
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5)
        self._try("unregister", lambda: workers.unregister(self._ledger))

    def hold(self, held: QueueClient | Lease | None) -> None:
        """Keep the leases of a client from now on, as they come and go, or those of a lease's own; None for nothing at hand."""
        self._client = held.client if isinstance(held, Lease) else held

    def _run(self) -> None:
        while not self._done.wait(self._tick_seconds):
            self._look_for_the_parent()
            client = self._client
            if client is not None:
                self._keep(client)
            if not self._is_registered:
                self._try("register", self._register)
            if self._reaper.is_due:
                self._try("reap", self._reap)

    def _keep(self, client: QueueClient) -> None:
        if client.is_cut_off:
            self._try("send", client.send)
        else:
            self._try("send", client.send_metrics)
        self._try("poll commands", client.poll_commands)
        if client.is_to_be_renewed:
            self._try("renew", client.renew)
        for lease in client.leases:
            if self._is_overdue(lease):
                self._try("overdue", partial(self._overdue, lease))

    def _is_overdue(self, lease: Lease) -> bool:
        if lease.seconds_left is None or lease.is_cut_off or lease.retry.is_waiting:
            return False
        return lease.seconds > lease.seconds_left + self._ledger.lease_seconds

    def _register(self) -> None:
        workers.register(self._ledger)
        self._is_registered = True

    def _reap(self) -> None:
        taken = self._reaper()
        if taken:
            log.info("took %d trials from workers that are gone", taken, extra={"action": "reaped"})

    def _look_for_the_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._leave()

    def _try(self, duty: str, do: Callable[[], object]) -> None:
        try:
            do()
        except StorageGone as error:
            if self._client is not None:
                self._client.note_failure(error)
            self._leave()
        except BaseException as error:  # an outage, or anything else: the next tick tries again
            if duty not in self._failing:
                unexpected = not isinstance(error, FAILURES)
                log.warning("heartbeat: %s failed, trying again: %s", duty, cause(error), exc_info=unexpected)
            self._failing.add(duty)
        else:
            self._failing.discard(duty)
