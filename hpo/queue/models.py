"""What a worker holds: its right to a trial, the file to go on from, and what others want of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

Token = tuple[int, int]  # a trial's id, and the attempt


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file to go on from: epochs finished when it was written, where it lies, its SHA-256."""

    epoch: int
    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to one trial, for as long as the lease is renewed and nobody takes it over."""

    trial_id: int
    number: int
    attempt: int
    checkpoint: Checkpoint | None = None
    accumulation: int = 1  # micro-batches to a batch; more than one after memory ran out
    stack_key: str | None = None  # which kind of stack it trains in; None if nobody has opened it yet
    alone: bool = False  # its last attempt, after others that took a whole worker along: not beside innocent trials
    began: datetime | None = field(
        default=None, compare=False
    )  # UTC; set if this very claim made the trial, which is empty

    @property
    def token(self) -> Token:
        """What a write is checked against, whatever else is known of the claim."""
        return self.trial_id, self.attempt


class HasClaim(Protocol):
    """What the holder of a claim has to say of its trial."""

    @property
    def claim(self) -> Claim:
        """Under which it is written, if that stands."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What the database has to say to the holder of a trial."""

    lost: bool  # another worker has it by now, or nobody
    stop: bool  # a person ended it
    park: bool  # the study is paused
