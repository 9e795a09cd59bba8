"""A callback for `transformers.Trainer`: it reports, prunes, saves and resumes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock

from hpo.api.loop import loop_of
from hpo.integrations import folders
from hpo.spec import extras

extras.require("transformers")

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402 - after the check
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402

if TYPE_CHECKING:
    from hpo.worker.user_loop import UserLoop

OWNER = "hpo-trial"  # the file in `output_dir` that names the trial


class HpoCallback(TrainerCallback):
    """Report a metric of each evaluation, prune, and go on after a kill where the training stood.

    ```python
    def objective(trial):
        callback = HpoCallback(trial, monitor="eval_loss")
        args = TrainingArguments("out", eval_strategy="epoch", save_strategy="no", learning_rate=trial.suggest_float(...))
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=validation, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.checkpoint)
        return trainer.evaluate()["eval_loss"]
    ```

    In a worker of `hpo` a checkpoint is saved after an evaluation: if `recovery.checkpoint_every` has passed, and if the trial
    is to be parked. It holds the files of the trainer's own checkpoint: weights, optimizer, schedule, the trainer's progress,
    random numbers, and the states of callbacks. After the training one more is saved, with the model's weights alone. As with
    `hpo.epochs`, each holds the weights at the best report, too: `model.load_state_dict(hpo.load_weights(path)["transformers"])`.

    Under `study.optimize` the callback reports and prunes. Nothing is saved, and `checkpoint` is None.
    """

    def __init__(self, trial: optuna.Trial, monitor: str = "eval_loss") -> None:
        """Load the trial's last checkpoint, if it has one. Create the callback before the first report.

        Args:
            trial: the trial that the objective got.
            monitor: a metric of the evaluation, with or without `eval_` in front. It is reported at the epoch's number, from 0,
                with `eval_strategy="epoch"`, else at the number of training steps so far.

        Raises RuntimeError for a second callback in one trial, or after a report. In `Trainer.train` it raises
        optuna.TrialPruned; ValueError if the metric is missing, or for arguments that do not go with it; RuntimeError without
        `resume_from_checkpoint`.
        """
        self._trial = trial
        self._monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        self._loop: UserLoop | None = loop_of(trial)
        self._state = _Checkpoint()
        self._path: Path | None = None
        self._path_was_read = False
        self._is_training = False
        self._seen: set[str] = set()  # metrics of the evaluations
        self._finished = 0  # epochs or steps at the last report
        self._saving: Path | None = None  # where the trainer is about to write a checkpoint for us
        self._output_dir = ""
        if self._loop is not None and self._loop.resume({"transformers": self._state}):
            self._path = self._loop.scratch_folder()
            folders.unpack(self._state.loaded, self._path)
            self._state.loaded = {}

    @property
    def checkpoint(self) -> str | None:
        """What `Trainer.train` must get as `resume_from_checkpoint`: a folder, None for a trial that begins."""
        self._path_was_read = True
        return None if self._path is None else str(self._path)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._loop is not None:
            args.restore_callback_states_from_checkpoint = True  # such as the patience of EarlyStoppingCallback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._state.model = more["model"]
        self._is_training = True
        if args.eval_strategy == "no":
            raise ValueError('HpoCallback reports evaluations, but eval_strategy is "no"; set eval_strategy="epoch"')
        if not self._path_was_read or (self._path is not None and state.global_step == 0):
            raise RuntimeError(
                "trainer.train was not given resume_from_checkpoint=callback.checkpoint: "
                "an interrupted trial would begin anew"
            )
        if self._loop is not None:
            _check(args)
            if args.save_strategy != "no":
                self._claim(Path(str(args.output_dir)))

    def _claim(self, folder: Path) -> None:
        """Mark the folder as this trial's. Raise ValueError if it is another trial's, whose checkpoints would be overwritten."""
        own, mark = f"{self._trial.study.study_name} {self._trial.number}", folder / OWNER
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{mark}.lock"):
            owner = mark.read_text() if mark.exists() else ""
            if not owner:  # also after a kill amid the write
                mark.write_text(own)
        if owner not in ("", own):
            raise ValueError(
                f"output_dir={str(folder)!r} belongs to trial {owner.rpartition(' ')[2]}; give each trial its own, such as "
                f'{str(folder / str(self._trial.number))!r}, or set save_strategy="no"'
            )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._refuse_missing()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if not self._is_training or state.global_step == 0:
            return
        metrics: Mapping[str, float] = more["metrics"]
        self._seen |= metrics.keys()
        if self._monitor not in metrics:  # with several sets, each has an evaluation of its own
            return
        by_epoch = args.eval_strategy == "epoch"
        step = math.ceil(state.epoch or 0.0) - 1 if by_epoch else state.global_step
        self._finished = step + 1 if by_epoch else step
        self._trial.report(metrics[self._monitor], step)
        if self._trial.should_prune():
            raise optuna.TrialPruned
        if self._loop is not None and not _is_over(state, control) and self._loop.wants_save():
            self._ask_for_checkpoint(args, control)

    def _ask_for_checkpoint(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Let the trainer save right after this evaluation: where it would anyway, else in a folder that is removed then."""
        assert self._loop is not None
        self._output_dir = str(args.output_dir)
        if not control.should_save:
            args.output_dir = str(self._loop.scratch_folder())
        control.should_save, self._saving = True, Path(str(args.output_dir))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._saving is None:
            return
        folder, self._saving = self._saving, None
        args.output_dir = self._output_dir
        try:
            if not _is_over(state, control):  # early stopping may have come meanwhile
                assert self._loop is not None
                self._state.folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                self._loop.end_epoch(self._finished, is_last=False)
        finally:
            if folder != Path(self._output_dir):
                shutil.rmtree(folder, ignore_errors=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._is_training = False
        self._refuse_missing()
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        if self._loop is not None:
            self._state.has_ended = True
            self._loop.end_epoch(self._finished, is_last=True)

    def _refuse_missing(self) -> None:
        if self._seen and self._monitor not in self._seen:
            raise ValueError(
                f"HpoCallback(monitor={self._monitor!r}): the evaluations have no such metric; "
                f"they have {', '.join(sorted(self._seen))}"
            )


def _check(args: TrainingArguments) -> None:
    """Raise ValueError for arguments with which a trial cannot resume."""
    if args.world_size > 1:
        raise ValueError(f"HpoCallback works in one process, but the training has {args.world_size}")
    if args.save_strategy == "best":
        raise ValueError('HpoCallback cannot save with save_strategy="best"; set it to "epoch" or "no"')
    if args.save_only_model:
        raise ValueError("a checkpoint with save_only_model=True cannot be resumed; set it to False")
    if not args.restore_callback_states_from_checkpoint:
        raise ValueError("HpoCallback was added to a trainer that was made before; give it to Trainer(callbacks=[...])")


def _is_over(state: TrainerState, control: TrainerControl) -> bool:
    return control.should_training_stop or state.global_step >= state.max_steps


class _Checkpoint:
    """A trainer's checkpoint, as an object that `hpo` saves."""

    def __init__(self) -> None:
        self.model: Any = None
        self.folder: Path | None = None  # the checkpoint that the trainer has written
        self.loaded: dict[str, Any] = {}
        self.has_ended = False  # what is saved now is never resumed

    def module_state(self) -> dict[str, Any]:
        """Return the state of the model."""
        state: dict[str, Any] = self.model.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the files of the trainer's checkpoint; the model's weights after the training. Empty before it."""
        if self.has_ended:
            return self.module_state()
        return {} if self.folder is None else folders.pack(self.folder)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the trainer."""
        self.loaded = state
