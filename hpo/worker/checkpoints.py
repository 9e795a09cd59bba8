"""A trial's checkpoints: when and where they are written, and what happens if one cannot be written or read."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Protocol

from hpo.errors import CheckpointError
from hpo.queue.models import Checkpoint
from hpo.study import retention
from hpo.study.study import Study
from hpo.train import checkpoint
from hpo.worker import pending_reports
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)


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
        self.run = run
        self.trial = trial
        self.folder = study.trial_folder(trial.number)
        self.every = study.spec.recovery.checkpoint_seconds
        self.saved_at = time.monotonic()
        self.is_failing = False  # the last checkpoint could not be written
        trial.lease.unrecorded = []
        found = trial.lease.claim.checkpoint
        self.recorded = None if found is None else Path(found.path)

    def resume(self) -> None:
        """Load the claim's checkpoint, if there is one. Start at epoch 0 if it is missing or damaged.

        Raises CheckpointError if the disk fails.
        """
        found = self.trial.lease.claim.checkpoint
        if found is None:
            return
        try:
            self.run.load_state_dict(checkpoint.load(Path(found.path), found.digest))
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not self._is_missing(error.__cause__):
                raise  # the disk fails or is not mounted: a data error, so a later attempt tries the same checkpoint
            log.warning("trial %d starts again at epoch 0: %s", self.trial.number, error)
            self.trial.start_over()

    def _is_missing(self, error: OSError) -> bool:
        """Return whether the file is missing although the checkpoint folder is there."""
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
        if self.trial.client.retry(lambda: retention.is_kept(self.study, self.trial.number, value, beside)):
            self.save(self.run.epoch)

    def save(self, epoch: int) -> None:
        """Write the run's state and record it in the ledger. If the storage fails, leave it to the next attempt.

        If the disk does not take the file, training continues and the checkpoint recorded before stays valid.
        """
        found = self.write(epoch)
        if found is not None:
            self.record(found)

    def write(self, epoch: int) -> Checkpoint | None:
        """Write the run's state to a file and return it, not recorded yet. Return None if the disk does not take it."""
        path = self.folder / retention.file_name(self.trial.lease.claim.attempt, epoch, time.time_ns())
        self.saved_at = time.monotonic()
        try:
            return Checkpoint(epoch=epoch, path=str(path), digest=checkpoint.save(path, self.run.state_dict()))
        except OSError as error:
            self._note_failure(epoch, error)
            return None

    def record(self, found: Checkpoint) -> None:
        """Record a written checkpoint in the ledger and remove older files."""
        lease, path = self.trial.lease, Path(found.path)
        try:
            if self.trial.client.record_checkpoint(lease, found):
                self.recorded = path
                kept = {path}
            else:
                kept = {path, pending_reports.leave(self.folder, self.trial, found)}
            retention.tidy(self.folder, lease.claim.attempt, keep=kept | {self.recorded or path})
            self.is_failing = False
        except OSError as error:
            self._note_failure(found.epoch, error)

    def _note_failure(self, epoch: int, error: OSError) -> None:
        if not self.is_failing:
            log.warning("trial %d: no checkpoint of epoch %d could be written: %s", self.trial.number, epoch, error)
        self.is_failing = True
