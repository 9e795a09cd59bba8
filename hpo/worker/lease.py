"""What a worker knows of its lease on one trial."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from hpo.errors import LostLease
from hpo.queue.models import Claim, Commands
from hpo.queue.report import Report
from hpo.storage import clock

NOTHING_WANTED = Commands(lost=False, stop=False, park=False)


@dataclass(eq=False)
class Lease:
    """What a worker knows of its lease on one trial, from the claim to the end."""

    claim: Claim
    started_at: float = field(default_factory=time.monotonic)
    seconds_left: float | None = None  # how long this attempt may last; None without a limit
    renewed_at: float = field(default_factory=lambda: clock.awake_or_asleep())
    is_lost: bool = False  # as far as this worker knows; it stays True
    commands: Commands = NOTHING_WANTED
    refused: Exception | None = None  # why the database refused a write of the trial
    has_ended: bool = False  # the heartbeat's thread has found that the trial ended
    #: The reports since the last recorded checkpoint; None for a trial without checkpoints.
    unrecorded: list[Report] | None = None

    @property
    def seconds(self) -> float:
        """How long this attempt has lasted, in seconds."""
        return time.monotonic() - self.started_at

    @property
    def keeps_its_place(self) -> bool:
        """Whether a later attempt may continue the trial: it is neither lost nor ended by a person."""
        return not (self.is_lost or self.commands.stop)

    @property
    def lost_error(self) -> LostLease:
        """The error that a trial without a lease raises at its next check."""
        return LostLease(f"trial {self.claim.number}: another process has claimed or ended it")

    def check(self) -> None:
        """Raise LostLease if the lease is known to be lost. Else raise, once, why the database refused a write."""
        if self.is_lost:
            raise self.lost_error
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused
