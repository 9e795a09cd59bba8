"""A callback for Lightning: it reports, prunes, saves and resumes."""

from __future__ import annotations

import signal
import threading
from typing import Any

import optuna

from hpo.api.loop import loop_of
from hpo.spec import extras

extras.require("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402 - after the check
from lightning.pytorch.plugins.io import CheckpointIO  # noqa: E402


class HpoCallback(Callback):
    """Report a metric after each validated epoch, prune, and go on after a kill where the training stood.

    ```python
    def objective(trial):
        callback = HpoCallback(trial, monitor="val_acc")
        trainer = lightning.Trainer(max_epochs=30, callbacks=[callback], enable_checkpointing=False)
        trainer.fit(Classifier(trial), train, validation, ckpt_path=callback.ckpt_path)
        return trainer.callback_metrics["val_acc"].item()
    ```

    In a worker of `hpo` a checkpoint is saved between two epochs: if `recovery.checkpoint_every` has passed, and if the trial
    is to be parked. One more is saved after the last epoch. A checkpoint holds what `Trainer.save_checkpoint` writes: weights,
    optimizers, schedules, the loops' progress and the other callbacks. The global random numbers of Python, NumPy, torch and
    CUDA are saved with it. The last one holds the module's weights alone. As with `hpo.epochs`, each holds the weights at the
    best report, too: `module.load_state_dict(hpo.load_weights(path)["lightning"])`.

    Under `study.optimize` the callback reports and prunes. Nothing is saved, and `ckpt_path` is None.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        """Load the trial's last checkpoint, if it has one. Create the callback before the first report.

        Args:
            trial: the trial that the objective got.
            monitor: the name of a metric that the module logs. It is reported at the step `current_epoch`, from 0. An epoch
                without validation is not reported, unless the training has no validation at all.

        Raises RuntimeError for a second callback in one trial, or after a report. In `Trainer.fit` it raises optuna.TrialPruned;
        ValueError if the metric was not logged, or for several devices; RuntimeError without `ckpt_path`, or in a second `fit`;
        CheckpointError for what would need pickle, such as a module among the hyperparameters.
        """
        self._trial = trial
        self._monitor = monitor
        self._loop = loop_of(trial)
        self._state = _TrainerState()
        self._path: str | None = None
        self._path_was_read = False
        self._in_fit = False
        self._has_begun = False  # the first epoch of this fit
        self._has_validated = False  # in this epoch
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        if self._loop is not None and (finished := self._loop.resume({"lightning": self._state})):
            self._path = f"trial {trial.number} after {finished} epochs"

    @property
    def ckpt_path(self) -> str | None:
        """What `Trainer.fit` must get as `ckpt_path`: the name of the trial's checkpoint, None for a trial that begins.

        It is not the path of a file. The callback hands the checkpoint to the trainer.
        """
        self._path_was_read = True
        return self._path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._in_fit:
            raise RuntimeError("HpoCallback is in its second trainer.fit; a trial has one fit")
        self._in_fit = True
        if trainer.world_size > 1:
            raise ValueError(
                f"HpoCallback works with one device, but the trainer has {trainer.world_size}; set devices=1"
            )
        if not self._path_was_read:
            raise RuntimeError(
                "trainer.fit was not given ckpt_path=callback.ckpt_path: an interrupted trial would begin anew"
            )
        self._files = trainer.strategy.checkpoint_io
        if self._path is not None:
            trainer.strategy.checkpoint_io = _InMemory(self._state.loaded)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._state.trainer, self._state.loaded = trainer, None
        trainer.strategy.checkpoint_io = self._files
        if self._loop is None:
            return
        self._loop.refuse_objects()  # now, and not when the first checkpoint is due
        if self._on_sigterm is not None and threading.current_thread() is threading.main_thread():
            # Lightning's handler would leave amid an epoch. The worker's parks the trial after it. `fit` restores it, too.
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_validated = not trainer.sanity_checking

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All that belongs to the epoch before has ended here, also a ReduceLROnPlateau, which steps after `on_train_epoch_end`.
        if self._has_begun:
            self._leave_epoch(trainer, is_last=False)
            return
        self._has_begun = True
        if self._path is not None:
            # Lightning takes this state for that of an epoch's last batch, and would skip the epoch.
            trainer.fit_loop.on_iteration_done()
            trainer.fit_loop.restarting = False
            assert self._loop is not None
            self._loop.restore_random()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_epoch(trainer, is_last=True)

    def _leave_epoch(self, trainer: Trainer, *, is_last: bool) -> None:
        finished = trainer.current_epoch
        if self._has_validated or not trainer.enable_validation:
            self._report(trainer, finished - 1)
        self._has_validated = False
        if self._loop is not None:
            self._state.has_ended = is_last
            self._loop.end_epoch(finished, is_last=is_last)

    def _report(self, trainer: Trainer, step: int) -> None:
        value = trainer.callback_metrics.get(self._monitor)
        if value is None:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"HpoCallback(monitor={self._monitor!r}): no such metric was logged in epoch {step} (logged: {logged}); "
                f"call self.log({self._monitor!r}, value) in validation_step"
            )
        self._trial.report(float(value), step)
        if self._trial.should_prune():
            raise optuna.TrialPruned


class _TrainerState:
    """A trainer's checkpoint, as an object that `hpo` saves."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.loaded: dict[str, Any] | None = None
        self.has_ended = False  # what is saved now is never resumed

    def module_state(self) -> dict[str, Any]:
        """Return the state of the module."""
        assert self.trainer is not None
        return self.trainer.lightning_module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return what `Trainer.save_checkpoint` writes; tensors are the trainer's own. Empty before the training begins."""
        if self.trainer is None:
            return {}
        if self.has_ended:
            return self.module_state()
        strategy, memory = self.trainer.strategy, _InMemory()
        files, strategy.checkpoint_io = strategy.checkpoint_io, memory
        try:
            self.trainer.save_checkpoint("in memory", weights_only=False)
        finally:
            strategy.checkpoint_io = files
        assert memory.checkpoint is not None
        return memory.checkpoint

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the trainer."""
        self.loaded = state


class _InMemory(CheckpointIO):
    """Keeps a checkpoint in memory in the place of a file."""

    def __init__(self, checkpoint: dict[str, Any] | None = None) -> None:
        self.checkpoint = checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.checkpoint = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.checkpoint is not None
        return self.checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        pass
