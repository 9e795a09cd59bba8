"""The worker's second thread: it renews leases during an epoch, reaps expired leases of others, and polls commands.

If one of its duties raises an error, the others are still done, and the next tick tries again. A storage that hangs
delays all of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType

from hpo.errors import StorageGone
from hpo.queue import launches, workers
from hpo.queue.reaper import Reaper
from hpo.storage.connect import FAILURES, cause
from hpo.worker.client import QueueClient
from hpo.worker.lease import Lease

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class Heartbeat:
    """Does the duties of a worker that must not wait for its training thread."""

    def __init__(
        self,
        client: QueueClient,
        *,
        parent: int | None = None,
        leave: Callable[[], None] = lambda: None,
        retire: Callable[[], None] = lambda: None,
        overdue: Callable[[Lease], None] = lambda _: None,
    ) -> None:
        """Serve the leases of a client.

        Args:
            parent: the id of the process that must stay this one's parent; None if any may.
            leave: called when this process must end, because its parent or its storage is gone.
            retire: called when this process must leave for good, because its launch was made smaller or recalled.
            overdue: called when a trial is over its time limit by more than a lease. Its thread then hangs.
        """
        self._client = client
        self._ledger = client.ledger
        self._parent = parent
        self._leave = leave
        self._retire = retire
        self._overdue = overdue
        self._reaper = Reaper(client.ledger)
        self._is_registered = False
        self._failing: set[str] = set()
        self._may_renew = True  # in this tick
        self._tick_seconds = min(TICK_SECONDS, client.ledger.lease_seconds / workers.TICKS_PER_LEASE)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._look_for_the_parent()  # it may have died while this process started
        self._try("register", self._register)
        self._try("look for its launch", self._look_for_its_launch)
        self._try("reap", self._reap)  # before the first claim, because parked trials come before new ones
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5)
        self._try("unregister", lambda: workers.unregister(self._ledger))

    def _run(self) -> None:
        while not self._done.wait(self._tick_seconds):
            self._may_renew = True
            self._look_for_the_parent()
            self._keep()
            if not self._is_registered:
                self._do("register", self._register)
            if self._reaper.is_due:
                self._try("look for its launch", self._look_for_its_launch)
                self._do("reap", self._reap)

    def _do(self, duty: str, do: Callable[[], object]) -> None:
        """Do a duty that may wait for a lock. First renew the leases if due, because several waits could outlast them.

        After a failed renewal the next one comes at the next tick.
        """
        if self._may_renew and self._client.upkeep.is_to_be_renewed:
            self._may_renew = self._try("renew", self._client.upkeep.renew)
        self._try(duty, do)

    def _keep(self) -> None:
        client = self._client
        self._do("send", client.send if client.calls.is_cut_off else client.send_metrics)
        self._do("poll commands", client.upkeep.poll_commands)
        if client.has_unheard_claims:
            self._do("release", client.release_unheard)
        if client.has_doubled_a_study:
            self._do("analyze", client.refresh_statistics)
        for lease in client.held.leases:
            if self._is_overdue(lease):
                self._try("overdue", partial(self._overdue, lease))

    def _is_overdue(self, lease: Lease) -> bool:
        if lease.seconds_left is None or self._client.calls.is_cut_off or self._client.calls.retry.is_waiting:
            return False
        return lease.seconds > lease.seconds_left + self._ledger.lease_seconds

    def _register(self) -> None:
        workers.register(self._ledger)
        self._is_registered = True

    def _look_for_its_launch(self) -> None:
        """Leave for good if this worker's slot was retired."""
        post = self._ledger.post
        if post is not None and launches.is_retired(self._ledger.engine, self._ledger.uid, post):
            self._retire()

    def _reap(self) -> None:
        taken = self._reaper()
        if taken:
            log.info("took %d trials from workers that are gone", taken, extra={"action": "reaped"})

    def _look_for_the_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._leave()

    def _try(self, duty: str, do: Callable[[], object]) -> bool:
        """Do a duty and return whether it was done. An error that repeats is logged once."""
        try:
            do()
        except StorageGone as error:
            self._client.calls.note_failure(error)
            self._leave()
        except BaseException as error:  # any error: the next tick tries again
            if duty not in self._failing:
                unexpected = not isinstance(error, FAILURES)
                log.warning("heartbeat: %s failed, trying again: %s", duty, cause(error), exc_info=unexpected)
            self._failing.add(duty)
        else:
            self._failing.discard(duty)
        return duty not in self._failing
