"""The declared objective: a trial becomes a config, the config a curve. The one file that knows Optuna and torch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import optuna
import torch

from hpo import assembly, handover, retention, seeds, space
from hpo import study as studies
from hpo.claim import Checkpoint
from hpo.config import TrainConfig
from hpo.errors import CheckpointError, Diverged, Parked
from hpo.receipt import receipt
from hpo.reports import Report
from hpo.study import Study
from hpo.train import checkpoint
from hpo.train.loop import EpochResult, Run, can_halve
from hpo.trial import LeasedTrial

log = logging.getLogger(__name__)


def trial_seed(study_seed: int, number: int) -> int:
    """Return the seed from which everything random in a trial is derived."""
    return seeds.derive(study_seed, "trial", number)


def metrics_of(result: EpochResult) -> dict[str, float]:
    """Return an epoch's raw metrics by name."""
    return {key: float(value) for key, value in asdict(result).items() if key != "epoch"}


def declared(study: Study, folder: Path) -> Callable[[LeasedTrial], float]:
    """Return the objective of a declared study; the data is loaded once, here, and must be the study's own."""
    tree = study.spec.tree
    device = assembly.pick_device()
    first = TrainConfig.from_tree(next(space.variants(tree)))
    splits = assembly.load_splits(first, study.spec.seed, folder, device)
    studies.check_data(study, splits.digest)
    assembly.build_run(first, splits, seed=0, folder=folder, device=device)  # what cannot be built must cost no trial

    def objective(trial: LeasedTrial) -> float:
        with trial.suggesting():
            pinned = space.suggest(tree, trial)
        config = TrainConfig.from_tree(pinned)
        seed = trial_seed(study.spec.seed, trial.number)
        torch.set_num_threads(config.training.threads)
        accumulation = trial.lease.claim.accumulation
        if can_halve(min(config.training.batch_size, len(splits.train.labels)), accumulation):
            trial.finer_accumulation = 2 * accumulation
        run = assembly.build_run(config, splits, seed, folder, device, accumulation=accumulation)
        saver = Saver(study, run, trial)
        saver.resume()
        trial.record_receipt(
            receipt(
                folder=folder,
                device=assembly.device_name(device),
                threads=config.training.threads,
                executor="loop",
                accumulation=accumulation,
                seed=seed,
                split_seed=study.spec.seed,
                data_digest=splits.digest,
            ),
        )
        return follow(run, trial, saver, study.spec.metric)

    return objective


def follow(run: Run, trial: LeasedTrial, saver: Saver, metric: Literal["accuracy", "loss"]) -> float:
    """Train to the end of the trial, whatever ends it, reporting every epoch; return the judged value.

    Raises Diverged, TrialPruned, or the Signal for which the trial must let go, after a checkpoint.
    """
    for result in run.train(stop=trial.lease.must_end):
        saver.unrecorded.append(trial.report_epoch(result.epoch, result.judged(metric), metrics_of(result)))
        if not (math.isfinite(result.train_loss) and math.isfinite(result.validation_loss)):
            raise Diverged(f"epoch {result.epoch}: loss {result.train_loss}, validation loss {result.validation_loss}")
        if run.finished:
            break  # nothing is left to save by pruning
        if trial.pruner_says_stop():
            raise optuna.TrialPruned(f"epoch {result.epoch}")
        saver.save_if_due(result.epoch)
    if not run.finished:
        if trial.lease.keeps_its_place:
            saver.save(run.epoch)
        trial.lease.let_go()
        raise Parked(f"trial {trial.number}: parked after epoch {run.epoch}")
    if trial.lease.is_cut_off:
        saver.save(run.epoch)  # the end may be long in coming
    value = trial.judge(None)
    saver.save_if_leading(value)
    return value


class Saver:
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
        lease = self.trial.lease
        if lease.patience(lambda: retention.leads(self.study, self.trial.number, value)):
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
                kept = {path, handover.leave(self.folder, self.trial, found, self.unrecorded)}
            retention.tidy(self.folder, lease.claim.attempt, keep=kept | {self.recorded or path})
            self.is_failing = False
        except OSError as error:
            if not self.is_failing:
                log.warning("trial %d: no checkpoint of epoch %d: %s", self.trial.number, epoch, error)
            self.is_failing = True
