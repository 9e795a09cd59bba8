"""A thread that keeps a worker's lease alive while an epoch lasts, and watches for what should stop the worker."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from hpo.ledger import Claim, Ledger

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class Keeper:
    """Renews the lease of the trial at hand three times a lease, whatever errors the storage gives meanwhile."""

    def __init__(self, ledger: Ledger, *, parent: int | None, orphaned: Callable[[], None]) -> None:
        """Keep leases of `ledger`; call `orphaned` if the process `parent`, if one is named, is not the parent any more."""
        self._ledger = ledger
        self._parent = parent
        self._orphaned = orphaned
        self._claim: Claim | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._look_for_the_parent()  # it may have died while this process was starting
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def hold(self, claim: Claim | None) -> None:
        """Renew this claim from now on; None when there is no trial at hand."""
        self._claim = claim

    def _run(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(TICK_SECONDS):
            self._look_for_the_parent()
            claim = self._claim
            is_due = time.monotonic() - renewed >= self._ledger.lease_seconds / 3
            if claim is not None and is_due and self._renew(claim):
                renewed = time.monotonic()

    def _look_for_the_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._orphaned()

    def _renew(self, claim: Claim) -> bool:
        try:
            self._ledger.renew(claim)
        except Exception:  # an outage must not end this thread: the next tick tries again, and reports renew as well
            log.warning("trial %d: the lease could not be renewed", claim.number, exc_info=True)
            return False
        return True
