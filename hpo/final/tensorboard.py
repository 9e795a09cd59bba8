"""TensorBoard logs of a final training: one log by epoch, and one by step in a subfolder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from hpo.train.epoch import EpochResult

STEPS = "steps"  # the folder
QUEUE = 1000  # the most entries that wait for the writer's thread; with its default of 10, training waits for it
OF_A_STEP = ("loss", "gradient_norm", "parameter_norm")  # the columns of `StepMonitor.trajectory`


class Boards:
    """The two logs. They need two writers, since a resumed training purges a log by step number, whatever the tag."""

    def __init__(self, folder: Path, *, epochs: int, steps_per_epoch: int) -> None:
        """Open the logs, and purge entries after the first `epochs` epochs."""
        self._epochs = SummaryWriter(log_dir=str(folder), purge_step=epochs + 1, max_queue=QUEUE)
        self._steps = SummaryWriter(
            log_dir=str(folder / STEPS), purge_step=epochs * steps_per_epoch + 1, max_queue=QUEUE
        )
        self._steps_per_epoch = steps_per_epoch

    def __enter__(self) -> Boards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._epochs.close()
        self._steps.close()

    def show(self, result: EpochResult, trajectory: Sequence[Sequence[float]], *, overfits: bool) -> None:
        """Write an epoch and its steps.

        Args:
            result: the epoch.
            trajectory: loss, gradient norm and parameter norm of each step.
            overfits: whether the training overfits.
        """
        gap = result.validation_loss - result.train_loss
        shown = result.numbers | {"generalisation_gap": gap, "overfitting": float(overfits)}
        for name, value in shown.items():
            self._epochs.add_scalar(name, value, result.epoch)
        first = (result.epoch - 1) * self._steps_per_epoch + 1
        for step, numbers in enumerate(trajectory, start=first):
            for name, value in zip(OF_A_STEP, numbers, strict=True):
                self._steps.add_scalar(f"step/{name}", value, step)

    def flush(self) -> None:
        """Write all entries to the disk. A killed process loses those that were not flushed."""
        self._epochs.flush()
        self._steps.flush()

    def show_test(self, name: str, value: float, epoch: int) -> None:
        """Write a metric of the test split."""
        self._epochs.add_scalar(name, value, epoch)
