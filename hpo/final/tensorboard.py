"""TensorBoard's logs of a final training: what every epoch brought, and beside that, in a folder of its own, every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from hpo.train.epoch import EpochResult

STEPS = "steps"  # the folder
OF_A_STEP = ("loss", "gradient_norm", "parameter_norm")  # as `StepMonitor.trajectory` has them


class Boards:
    """Two writers, since TensorBoard drops what a training that goes on writes again by the step's number alone."""

    def __init__(self, folder: Path, *, epochs: int, steps_per_epoch: int) -> None:
        """Go on after so many epochs."""
        self._epochs = SummaryWriter(log_dir=str(folder), purge_step=epochs + 1)
        self._steps = SummaryWriter(log_dir=str(folder / STEPS), purge_step=epochs * steps_per_epoch + 1)
        self._steps_per_epoch = steps_per_epoch

    def __enter__(self) -> Boards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._epochs.close()
        self._steps.close()

    def show(self, result: EpochResult, trajectory: Sequence[Sequence[float]], *, overfits: bool) -> None:
        """Write an epoch and its steps."""
        shown = {"epoch": float(result.epoch)} | result.numbers
        shown |= {"generalisation_gap": result.validation_loss - result.train_loss, "overfitting": float(overfits)}
        for name, value in shown.items():
            self._epochs.add_scalar(name, value, result.epoch)
        first = (result.epoch - 1) * self._steps_per_epoch + 1
        for step, numbers in enumerate(trajectory, start=first):
            for name, value in zip(OF_A_STEP, numbers, strict=True):
                self._steps.add_scalar(f"step/{name}", value, step)

    def show_test(self, name: str, value: float, epoch: int) -> None:
        """Write a number of the test split."""
        self._epochs.add_scalar(name, value, epoch)
