"""Who trains the trials that a worker claims: one after the other, or several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hpo.queue.models import Claim
from hpo.spec.failures import Kind
from hpo.study.study import Study
from hpo.worker import descendants
from hpo.worker.attempt import Attempt
from hpo.worker.client import Lease, QueueClient
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial


@dataclass(frozen=True, kw_only=True)
class ClaimRequest:
    """What a runner asks its worker to claim."""

    count: int  # trials, at most
    stack_key: str | None = None  # of the stack that is open, if one is
    waiting_at_most: int | None = None  # trials that may wait for another stack


class TrialRunner(Protocol):
    """What a worker asks of whoever trains its trials."""

    def wants(self) -> ClaimRequest | None:
        """Return what to claim now; None for nothing."""

    def take(self, claims: Sequence[Claim]) -> None:
        """Begin with these trials."""

    def go_without(self) -> None:
        """Take note that there is nothing to claim just now."""

    @property
    def is_busy(self) -> bool:
        """Whether there are trials in training."""

    def advance(self) -> list[Kind | None]:
        """Train on to where trials may end; return of each attempt that ended by what it failed, None if it did not."""

    def park(self) -> None:
        """Let go of all trials between epochs, for this process is to start afresh."""

    def leave(self, error: BaseException) -> None:
        """Keep the place of every trial, as well as may be, for this worker leaves with an error."""


class SequentialRunner:
    """Runs an objective of the user's own, which keeps the thread until its trial has ended: one trial at a time."""

    def __init__(
        self, study: Study, objective: Callable[[LeasedTrial], Any], client: QueueClient, stopping: StopSignal
    ) -> None:
        self._study = study
        self._objective = objective
        self._client = client
        self._stopping = stopping
        self._lease: Lease | None = None

    def wants(self) -> ClaimRequest | None:
        return None if self._lease else ClaimRequest(count=1)

    def take(self, claims: Sequence[Claim]) -> None:
        (claim,) = claims
        self._lease = self._client.lease(claim, self._stopping)

    def go_without(self) -> None:
        pass

    @property
    def is_busy(self) -> bool:
        return self._lease is not None

    def advance(self) -> list[Kind | None]:
        lease, self._lease = self._lease, None
        assert lease is not None
        run_trial(self._study, self._objective, lease)
        self._client.remove(lease)
        return [lease.failed_by]

    def park(self) -> None:
        pass  # no trial is at hand between two of them

    def leave(self, error: BaseException) -> None:
        pass  # such a trial has no place to keep: it starts again


def run_trial(study: Study, objective: Callable[[LeasedTrial], Any], lease: Lease) -> None:
    """Run one claimed trial to its end and write that end."""
    attempt = Attempt(study, lease)
    trial = attempt.open()
    if trial is None:
        return

    def outcome() -> Any:
        lease.let_go()
        with descendants.ending_forks():
            return objective(trial)

    attempt.end(trial, outcome)
