"""What a worker knows of a trial that it holds: the claim, the checkpoint, and the commands of people."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

Token = tuple[int, int]  # the trial's id and the attempt number


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A recorded checkpoint file."""

    #: The last step that the trial keeps when it goes on from here. In a declared training that is the number of finished
    #: epochs. In a user's own loop it is the last step reported, -1 before any report.
    epoch: int
    path: str
    digest: str  # the file's SHA-256


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to write for one trial under one attempt number.

    It stands until the trial ends, is given back, or is taken by another.
    """

    trial_id: int
    number: int
    attempt: int
    checkpoint: Checkpoint | None = None
    accumulation: int = 1  # micro-batches per batch; more than 1 after memory ran out
    alone: bool = False  # trained alone, because one more failure that counts for all trials of a worker ends it
    #: The start of the trial in UTC, if this claim created it. Then the trial is empty.
    began: datetime | None = field(default=None, compare=False)

    @property
    def token(self) -> Token:
        """The trial's id and the attempt number, which every write is checked against."""
        return self.trial_id, self.attempt


@dataclass(frozen=True, kw_only=True)
class Post:
    """A worker's place in a launch: an engine runs one worker for each slot, again and again."""

    launch: int
    slot: int


class HasClaim(Protocol):
    """Anything written under a claim."""

    @property
    def claim(self) -> Claim:
        """The claim. If it is lost, nothing is written."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What the database says to the holder of a trial."""

    lost: bool  # the claim no longer stands
    stop: bool  # a person ended the trial
    park: bool  # the study is paused
    orders: int = field(default=0, compare=False)  # the version of the study's orders that this was read from
