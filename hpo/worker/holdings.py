"""What a worker holds: its leases, and the reports of their trials that are not written yet.

All threads of a worker share the holdings. One lock guards them. Nothing here calls the storage, so no thread does while
it has this lock. A list is replaced and never changed, so it may be read without the lock.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Collection, Sequence

from hpo.queue.models import Claim, HasClaim, Token
from hpo.queue.report import Report
from hpo.worker.lease import Lease


class Holdings:
    """The leases of a worker, by their claims, and their unwritten reports in order."""

    def __init__(self) -> None:
        self.unsent: list[Report] = []
        self.without_metrics: list[Report] = []  # reports that are sent without their raw metrics
        self.metrics_since = 0.0  # when the first of these was sent
        self._leases: dict[Token, Lease] = {}
        self._noting = threading.Lock()

    def add(self, claim: Claim) -> Lease:
        """Hold a claimed trial and return its lease. An earlier lease on the same trial is lost."""
        lease = Lease(claim)
        for other in self.leases:
            if other.claim.trial_id == claim.trial_id:
                other.is_lost = True
        with self._noting:
            self._leases[claim.token] = lease
        return lease

    def remove(self, lease: Lease) -> None:
        """Hold this lease no more. Its unsent reports are dropped."""
        with self._noting:
            self._leases.pop(lease.claim.token, None)
            self.unsent, self.without_metrics = self._held(self.unsent), self._held(self.without_metrics)

    @property
    def leases(self) -> list[Lease]:
        """The leases that the worker holds, lost ones included."""
        with self._noting:
            return list(self._leases.values())

    def standing(self) -> dict[Claim, Lease]:
        """Return the leases that are not known to be lost."""
        return {lease.claim: lease for lease in self.leases if not lease.is_lost}

    def of(self, told: Sequence[HasClaim]) -> list[Lease]:
        """Return the leases of these claims that are still held here."""
        with self._noting:
            tokens = {one.claim.token for one in told} & self._leases.keys()
            return [self._leases[token] for token in tokens]

    def note_claims(self, told: Sequence[HasClaim], lost: Collection[Claim], *, renewed_at: float | None) -> None:
        """Note which claims were lost, and when the others were renewed.

        Args:
            renewed_at: None if they were not renewed.
        """
        fallen = {claim.token for claim in lost}
        for lease in self.of(told):
            if lease.claim.token in fallen:
                lease.is_lost = True
            elif renewed_at is not None:
                lease.renewed_at = renewed_at

    def keep(self, reports: Sequence[Report]) -> None:
        """Keep reports until they are written.

        Raises RuntimeError, and keeps nothing, if a report's trial is not held here.
        """
        with self._noting:
            for report in reports:
                if report.claim.token not in self._leases:
                    raise RuntimeError(
                        f"trial {report.claim.number} is not held here any more; report before its objective returns"
                    )
            for report in reports:
                if (unrecorded := self._leases[report.claim.token].unrecorded) is not None:
                    unrecorded.append(report)
            self.unsent = [*self.unsent, *reports]

    def note_sent(self, reports: Sequence[Report], waiting: Sequence[Report]) -> None:
        """Remove reports from the unsent ones.

        Args:
            waiting: those of them whose raw metrics are still to be written.
        """
        with self._noting:
            self.unsent = _without(self.unsent, reports)
            if not self.without_metrics:
                self.metrics_since = time.monotonic()
            self.without_metrics = [*self.without_metrics, *self._held(waiting)]

    def note_metrics_sent(self, reports: Sequence[Report]) -> None:
        """Remove reports from those whose raw metrics are still to be written."""
        with self._noting:
            self.without_metrics = _without(self.without_metrics, reports)

    def _held(self, reports: Sequence[Report]) -> list[Report]:
        return [report for report in reports if report.claim.token in self._leases]


def _without(kept: list[Report], done: Sequence[Report]) -> list[Report]:
    """Return `kept` without `done`, compared by identity: a report may be made twice."""
    if all(map(operator.is_, kept, done)):  # nearly always `done` is the beginning of a long list
        return kept[len(done) :]
    gone = set(map(id, done))
    return [report for report in kept if id(report) not in gone]
