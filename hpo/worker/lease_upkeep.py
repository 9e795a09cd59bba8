"""The upkeep of the leases that a worker holds: they are renewed, and what people ordered for their trials is learned."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.storage import clock
from hpo.worker.holdings import Holdings
from hpo.worker.lease import Lease

RENEWALS_PER_LEASE = 3
RECHECK_SECONDS = 10.0  # after which commands are read again, whether their version has changed or not


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Which commands the heartbeat has read last."""

    claims: frozenset[Claim] = frozenset()  # those that stood
    orders: int = -1  # the version of the study's orders
    read_at: float = field(default_factory=time.monotonic)

    def holds(self, claims: Collection[Claim]) -> bool:
        """Whether the commands for these claims are known, unless the orders have changed since."""
        return self.claims.issuperset(claims) and time.monotonic() - self.read_at < RECHECK_SECONDS


class LeaseUpkeep:
    """Renews the leases that are held, and learns their commands."""

    def __init__(self, ledger: Ledger, held: Holdings) -> None:
        self._ledger = ledger
        self._held = held
        self._heard = Heard()

    def is_due(self, leases: Iterable[Lease]) -> bool:
        """Return whether one of these leases is old enough for a renewal."""
        soon = clock.awake_or_asleep() - self._ledger.lease_seconds / RENEWALS_PER_LEASE
        return any(lease.renewed_at <= soon for lease in leases)

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether a lease is old enough for a renewal."""
        return self.is_due(self._held.standing().values())

    def renew(self) -> None:
        """Renew all leases in one statement, and find those that are lost. Raises the storage's errors."""
        leases, asked_at = self._held.standing(), clock.awake_or_asleep()
        for claim in self._ledger.renew_all(leases.keys()):
            leases[claim].is_lost = True
        for lease in leases.values():
            lease.renewed_at = asked_at

    def poll_commands(self) -> None:
        """Learn the commands for the trials, and find lost leases. Raises the storage's errors.

        They are read again only once the study's orders have changed, or RECHECK_SECONDS have passed: an earlier version
        of hpo orders without raising the version.
        """
        leases = self._held.standing()
        if not leases or (self._heard.holds(leases) and self._ledger.orders() == self._heard.orders):
            return
        found = self._ledger.commands_of(leases.keys())
        for claim, commands in found.items():
            leases[claim].commands = commands
            if commands.lost:
                leases[claim].is_lost = True
        standing = {claim: commands.orders for claim, commands in found.items() if not commands.lost}
        self._heard = Heard(claims=frozenset(standing), orders=min(standing.values(), default=-1))
