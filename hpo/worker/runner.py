"""Runners: they train the trials that a worker claims, one after the other or several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hpo.spec import seeds
from hpo.spec.failures import Kind
from hpo.study.study import Study
from hpo.worker import descendants
from hpo.worker.attempt import Attempt
from hpo.worker.client import ClaimRequest, QueueClient
from hpo.worker.lease import Lease
from hpo.worker.program_site import ProgramSite
from hpo.worker.trial import LeasedTrial
from hpo.worker.user_loop import UserLoop


class TrialRunner(Protocol):
    """The contract between a worker and the object that trains its trials."""

    def wants(self) -> ClaimRequest | None:
        """Return what to claim now; None for nothing."""

    def take(self, leases: Sequence[Lease]) -> None:
        """Start these trials."""

    def go_without(self) -> None:
        """Note that there is nothing to claim at present."""

    @property
    def is_busy(self) -> bool:
        """Whether there are trials in training."""

    def advance(self) -> list[Kind | None]:
        """Train to the next point where trials may end.

        Returns an entry for each attempt that ended: the kind of its failure, or None if it did not fail.
        """

    def park(self) -> None:
        """Park all trials between epochs, because this process restarts."""

    def leave(self, error: BaseException) -> None:
        """Save every trial as far as possible, because this worker ends with an error."""


class SequentialRunner:
    """Runs a user's own training, one trial at a time."""

    def __init__(self, study: Study, objective: Callable[[LeasedTrial], Any], client: QueueClient) -> None:
        self._study = study
        self._objective = objective
        self._client = client
        self._attempt: Attempt | None = None

    def wants(self) -> ClaimRequest | None:
        return None if self._attempt else ClaimRequest(count=1)

    def take(self, leases: Sequence[Lease]) -> None:
        (lease,) = leases
        self._attempt = Attempt(self._study, self._client, lease)

    def go_without(self) -> None:
        pass

    @property
    def is_busy(self) -> bool:
        return self._attempt is not None

    def advance(self) -> list[Kind | None]:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        run_trial(attempt, self._objective)
        self._client.held.remove(attempt.lease)
        return [attempt.failed_by]

    def park(self) -> None:
        pass  # between two trials there is none to park

    def leave(self, error: BaseException) -> None:
        pass  # the next attempt starts again, or goes on from the last checkpoint of `hpo.epochs`


def run_trial(attempt: Attempt, objective: Callable[[LeasedTrial], Any]) -> None:
    """Run one claimed trial and write its end."""
    if not attempt.open():
        return

    def outcome() -> Any:
        attempt.let_go()
        attempt.trial.loop = loop = _loop_of(attempt)
        seeds.seed_globals(seeds.of_trial(attempt.study.spec.seed, attempt.number, attempt.trial.user_attrs))
        if tree := attempt.study.spec.tree:
            attempt.trial.read_queued(tree)
        with descendants.ending_forks():
            returned = objective(attempt.trial)
        if not tree:
            attempt.trial.tell_unused()
        loop.record_final()
        return returned

    attempt.end(outcome)


def _loop_of(attempt: Attempt) -> UserLoop | ProgramSite:
    return (ProgramSite if attempt.study.spec.has_program else UserLoop)(attempt.study, attempt.trial)
