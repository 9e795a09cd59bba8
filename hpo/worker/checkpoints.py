"""A trial's checkpoints: when they are written, where, and what happens if one cannot be written or read."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hpo.errors import CheckpointError
from hpo.queue.models import Checkpoint
from hpo.queue.report import Report
from hpo.study import retention
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train import checkpoint
from hpo.train.run import Run
from hpo.worker import pending_reports
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)


class CheckpointManager:
    """A trial's checkpoints: one file that is recorded, and one that could not be while the storage is away."""

    def __init__(self, study: Study, run: Run, trial: LeasedTrial) -> None:
        self.study = study
        self.run = run
        self.trial = trial
        self.folder = study.trial_folder(trial.number)
        self.every = study.spec.recovery.checkpoint_seconds
        self.saved_at = time.monotonic()
        self.is_failing = False  # the last one could not be written
        self.unrecorded: list[Report] = []  # what was reported since the last recorded one
        found = trial.lease.claim.checkpoint
        self.recorded = None if found is None else Path(found.path)

    def resume(self) -> None:
        """Go on from the claim's checkpoint, if it has one; from epoch 0 if that cannot be read."""
        found = self.trial.lease.claim.checkpoint
        if found is None:
            return
        try:
            self.run.load_state_dict(checkpoint.load(Path(found.path), found.digest))
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not self._is_missing(error.__cause__):
                raise  # a disk that fails, or is not mounted, just now: a data error, tried again, the checkpoint kept
            log.warning("trial %d starts over: %s", self.trial.number, error)
            self.trial.start_over()

    def _is_missing(self, error: OSError) -> bool:
        """Say whether the file is not there, though its folder is."""
        return isinstance(error, FileNotFoundError) and (self.study.checkpoints / studies.PROBE_FILE).is_file()

    def save_if_due(self, epoch: int) -> None:
        """Save if the last checkpoint is old enough."""
        if time.monotonic() - self.saved_at >= self.every:
            self.save(epoch)

    def save_if_leading(self, value: float) -> None:
        """Save the state at a finished trial's end if it is among the best, whose checkpoints are kept."""
        lease, (_, beside) = self.trial.lease, self.trial.beside(value)
        if lease.retry(lambda: retention.is_kept(self.study, self.trial.number, value, beside)):
            self.save(self.run.epoch)

    def save(self, epoch: int) -> None:
        """Write the run's state and record it in the ledger, or leave it to the next attempt if the storage is away.

        A disk that is full costs the checkpoint, not the trial: the one recorded before still stands.
        """
        lease = self.trial.lease
        path = self.folder / retention.file_name(lease.claim.attempt, epoch, time.time_ns())
        self.saved_at = time.monotonic()
        try:
            found = Checkpoint(epoch=epoch, path=str(path), digest=checkpoint.save(path, self.run.state_dict()))
            if lease.record_checkpoint(found):
                self.recorded = path
                self.unrecorded.clear()
                kept = {path}
            else:
                kept = {path, pending_reports.leave(self.folder, self.trial, found, self.unrecorded)}
            retention.tidy(self.folder, lease.claim.attempt, keep=kept | {self.recorded or path})
            self.is_failing = False
        except OSError as error:
            if not self.is_failing:
                log.warning("trial %d: no checkpoint of epoch %d: %s", self.trial.number, epoch, error)
            self.is_failing = True
