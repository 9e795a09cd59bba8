"""A trial's checkpoints: when they are written, and what happens if one cannot be written, stored or read."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from hpo.errors import CheckpointError, Parked
from hpo.queue.models import Checkpoint
from hpo.study import retention
from hpo.study.study import Study
from hpo.train import checkpoint
from hpo.worker import pending_reports
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.5  # between two tries to store a checkpoint that a trial must not end without


class Resumable(Protocol):
    """What is saved: a declared run, or the objects of a user's own loop."""

    epoch: int  # how many epochs are finished

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class CheckpointManager:
    """Writes and reads a trial's checkpoints: the recorded one, and during an outage one that is not recorded yet."""

    def __init__(self, study: Study, run: Resumable, trial: LeasedTrial) -> None:
        self.study = study
        self.store = study.store
        self.run = run
        self.trial = trial
        self.folder = study.trial_folder(trial.number)
        self.every = study.spec.recovery.checkpoint_seconds
        self.saved_at = time.monotonic()
        self.is_failing = False  # the last checkpoint could not be written or stored
        trial.lease.unrecorded = []
        self.recorded = trial.lease.claim.checkpoint

    def resume(self) -> None:
        """Load the claim's checkpoint, if there is one. Start at epoch 0 if it is missing or damaged.

        Raises Parked if a bucket does not answer, and CheckpointError if the disk fails or a bucket stays away.
        """
        found = self.trial.lease.claim.checkpoint
        if found is None:
            return
        try:
            self.run.load_state_dict(self._load(found))
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not self._is_missing(error.__cause__):
                self._wait_for_a_bucket(error)
                raise  # the disk fails or is not mounted: a data error, so a later attempt tries the same checkpoint
            log.warning("trial %d starts again at epoch 0: %s", self.trial.number, error)
            self.trial.start_over()

    def _load(self, found: Checkpoint) -> dict[str, Any]:
        try:
            file = self.store.get(self.store.name_of(found.path), found.digest)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {found.path} cannot be opened ({error.strerror}); check that this machine sees the checkpoints"
            ) from error
        return checkpoint.load(file, found.digest)

    def _wait_for_a_bucket(self, error: CheckpointError) -> None:
        """Raise Parked unless the store has failed for longer than a worker waits for the storage."""
        if self.store.is_away and self.store.failing_seconds <= self.study.spec.recovery.outage_seconds:
            log.warning("trial %d waits for its checkpoint: %s", self.trial.number, error)
            raise Parked(f"trial {self.trial.number}: its checkpoint cannot be read at present") from error

    def _is_missing(self, error: OSError) -> bool:
        """Return whether the file is missing although the study's checkpoints are there."""
        return isinstance(error, FileNotFoundError) and self.study.sees_checkpoints

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is older than `recovery.checkpoint_every`."""
        return time.monotonic() - self.saved_at >= self.every

    def save_if_due(self, epoch: int) -> None:
        """Save if a checkpoint is due."""
        if self.is_due:
            self.save(epoch)

    def save_if_leading(self, value: float) -> None:
        """Save the final state of a trial if it is among the best, whose checkpoints are kept."""
        _, beside = self.trial.beside(value)
        if not self.trial.client.calls.retry(lambda: retention.is_kept(self.study, self.trial.number, value, beside)):
            return
        found = self.write(self.run.epoch)
        if found is not None:
            self.record(found, is_stored=self.put_patiently(found, leaves_a_note=True), is_last=True)

    def save(self, epoch: int) -> None:
        """Write the run's state and record it in the ledger. If the storage fails, leave it to the next attempt.

        If the disk or the bucket does not take it, training continues and the checkpoint recorded before stays valid.
        """
        found = self.write(epoch)
        if found is not None:
            self.record(found, is_stored=self._put(found))

    def write(self, epoch: int) -> Checkpoint | None:
        """Write the run's state to a file of this machine and return it, neither stored nor recorded yet.

        Return None if the disk does not take it.
        """
        name = f"{self.folder.name}/{retention.file_name(self.trial.lease.claim.attempt, epoch, time.time_ns())}"
        self.saved_at = time.monotonic()
        try:
            digest = checkpoint.save(self.folder.parent / name, self.run.state_dict())
        except OSError as error:
            self._note_failure(f"no checkpoint of epoch {epoch} could be written: {error}")
            return None
        return Checkpoint(epoch=epoch, path=self.store.place_of(name), digest=digest)

    def _put(self, found: Checkpoint) -> bool:
        """Let every worker read a written file. Return False if that fails."""
        try:
            self.store.put(self.store.name_of(found.path))
        except OSError as error:
            self._note_failure(
                f"epoch {found.epoch} is kept in {self.folder} on this machine until its store takes it: {error}"
            )
            return False
        self.is_failing = False
        return True

    def put_patiently(self, found: Checkpoint, *, leaves_a_note: bool = False) -> bool:
        """Store the file of a trial's last epoch, and wait for a bucket for as long as a worker waits for the storage.

        Args:
            found: the written checkpoint.
            leaves_a_note: let a later attempt on this machine go on from the file if this one must end before it is stored.

        Raises a Signal if the attempt must end meanwhile. Returns False if the bucket stays away.
        """
        until = time.monotonic() + self.study.spec.recovery.outage_seconds
        while not self._put(found):
            if time.monotonic() > until:
                return False
            try:
                self.trial.client.let_go(self.trial.lease)
            except BaseException:
                if leaves_a_note:
                    self.record(found, is_stored=False)
                raise
            time.sleep(RETRY_SECONDS)
        return True

    def record(self, found: Checkpoint, *, is_stored: bool, is_last: bool = False) -> None:
        """Record a checkpoint in the ledger and remove older files. What is not recorded is left to the next attempt.

        Args:
            found: the checkpoint.
            is_stored: whether every worker can read its file.
            is_last: the trial ends with it, so no later checkpoint removes what is left.
        """
        lease, name = self.trial.lease, self.store.name_of(found.path)
        try:
            if is_stored and self.trial.client.record_checkpoint(lease, found):
                self.recorded = found
                kept = {name}
            else:
                follows = self.recorded.digest if self.recorded else ""
                kept = {
                    name,
                    pending_reports.leave(self.store, self.trial, found, follows=follows, is_stored=is_stored),
                }
        except OSError as error:
            self._note_failure(f"epoch {found.epoch} could not be left to a later attempt: {error}")
            return
        if self.recorded is not None:
            kept.add(self.store.name_of(self.recorded.path))
        try:
            retention.tidy(self.store, self.folder.name, lease.claim.attempt, keep=kept, anew=is_last)
        except OSError as error:  # the next checkpoint tries again
            log.debug("trial %d: older checkpoints stay for now: %s", self.trial.number, error)

    def _note_failure(self, what: str) -> None:
        if not self.is_failing:
            log.warning("trial %d: %s", self.trial.number, what)
        self.is_failing = True
