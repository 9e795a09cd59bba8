"""Whether a device computes what a CPU computes: the first step, a curve in float64, and the final metric over seeds.

Each check trains the same runs by our loop on the CPU and by one of our ways on the device. Dropout is off, since masks
may come from another generator there. TF32 is off, which has 10 bits of precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

import torch

from benchmarks import gpu_ways
from benchmarks.gpu_ways import LOOP, Way
from benchmarks.tasks import Task
from hpo.data import Splits
from hpo.spec.training import TrainConfig
from hpo.train.epoch import EpochResult

#: Relative differences that are allowed: of the training loss, and of the validation loss after the update.
FIRST_STEP = (1e-5, 1e-4)  # float32; the update brings in the gradient's rounding, 2e-5 for a ResNet-18 even on one CPU
CURVE = (1e-8, 1e-8)  # float64
CPU = torch.device("cpu")
ALONE = LOOP  # the reference on the CPU
PLAIN = {"model__dropout": 0.0}
STEP = {"optimizer__name": "sgd", "optimizer__lr": 0.01}  # of the first check
#: Images and epochs of the check of the final metric, so that a CPU has it in some seconds. None: all that there are.
SIZES: dict[str, tuple[int | None, int]] = {
    "digits": (None, 8),
    "mlp28": (3_000, 4),
    "cnn28": (2_000, 4),
    "resnet18": (400, 2),
}
CURVE_BATCHES, CURVE_EPOCHS = 2, 3
VALIDATION = 128  # images of the first two checks


class Disagreement(Exception):
    """Raised if a device computes something else than the CPU, with the numbers."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let CUDA multiply float32 numbers in full, without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The checks of one task. What the CPU computes is computed once."""

    task: Task
    device: torch.device
    images: int | None = None  # of the data; None: all that there are
    epochs: int = 8  # of the check of the final metric
    seeds: int = 4  # likewise

    @classmethod
    def of(cls, task: Task, device: torch.device) -> Agreement:
        """Return the checks in a size that a CPU does in some seconds."""
        images, epochs = SIZES[task.name]
        return cls(task=task, device=device, images=images, epochs=epochs)

    def check(self, way: Way) -> str:
        """Return a line that says how well a way agrees; Disagreement at the first difference."""
        with exact_float32():
            step, curve, final = self._first_step(way), self._curve(way), self._final(way)
        return f"{self.task.name}, {way.name}: first step {step:.1e}, float64 curve {curve:.1e}, final metric {final}"

    # --- the first step -----------------------------------------------------------------------------------------------

    @cached_property
    def _small(self) -> Task:
        return self.task.resized(trials=None, epochs=self.epochs, images=self.images)

    @cached_property
    def _splits(self) -> dict[str, Splits]:
        return {str(device): gpu_ways.splits_of(self._small, device) for device in (CPU, self.device)}

    def _one_step(self, way: Way, device: torch.device) -> list[EpochResult]:
        """Return the results of two runs after one step of plain SGD."""
        config = _of_epochs(gpu_ways.config_of(self._small, **PLAIN, **STEP), 1)
        splits = gpu_ways.few(self._splits[str(device)], config.training.batch_size, VALIDATION)
        return [results[0] for results in way.finished(gpu_ways.runs_of(config, splits, 2, device))]

    @cached_property
    def _one_step_on_cpu(self) -> list[EpochResult]:
        return self._one_step(ALONE, CPU)

    def _first_step(self, way: Way) -> float:
        """Return the largest difference: of the step's loss, or of the validation loss after it.

        Weights are not compared in float32: where rounding moves an activation across a ReLU's corner, a gradient jumps.
        """
        mine, theirs = self._one_step(way, self.device), self._one_step_on_cpu
        return max(self._apart(way, "first step", *pair, FIRST_STEP) for pair in zip(mine, theirs, strict=True))

    def _apart(self, way: Way, where: str, one: EpochResult, other: EpochResult, most: tuple[float, float]) -> float:
        """Return the larger relative difference of both losses of two epochs; Disagreement if it is above `most`."""
        found = []
        for what, allowed in zip(("train_loss", "validation_loss"), most, strict=True):
            values = getattr(one, what), getattr(other, what)
            found.append(relative(*values))
            self._refuse(way, f"{where}, {what}", *values, found[-1], allowed)
        return max(found)

    # --- a curve in float64 -------------------------------------------------------------------------------------------

    def _curves(self, way: Way, device: torch.device) -> list[list[EpochResult]]:
        config = _of_epochs(gpu_ways.config_of(self._small, **PLAIN), CURVE_EPOCHS)
        splits = gpu_ways.few(self._splits[str(device)], CURVE_BATCHES * config.training.batch_size, VALIDATION)
        return way.finished(gpu_ways.runs_of(config, splits, 2, device, torch.float64))

    @cached_property
    def _curves_on_cpu(self) -> list[list[EpochResult]]:
        return self._curves(ALONE, CPU)

    def _curve(self, way: Way) -> float:
        mine, theirs = self._curves(way, self.device), self._curves_on_cpu
        return max(
            self._apart(way, f"float64, epoch {one.epoch}", one, other, CURVE)
            for results, wanted in zip(mine, theirs, strict=True)
            for one, other in zip(results, wanted, strict=True)
        )

    # --- the final metric ---------------------------------------------------------------------------------------------

    def _finals(self, way: Way, device: torch.device) -> list[float]:
        config = gpu_ways.config_of(self._small, **PLAIN)
        runs = gpu_ways.runs_of(config, self._splits[str(device)], self.seeds, device)
        return [results[-1].judged("accuracy") for results in way.finished(runs)]

    @cached_property
    def _finals_on_cpu(self) -> list[float]:
        return self._finals(ALONE, CPU)

    def _final(self, way: Way) -> str:
        """Return both means. They may differ by the range over the seeds on the CPU, or by one image."""
        ours, theirs = self._finals(way, self.device), self._finals_on_cpu
        spread = max(max(theirs) - min(theirs), 1 / len(self._splits["cpu"].validation.targets))
        self._refuse(way, "mean final accuracy", mean(ours), mean(theirs), abs(mean(ours) - mean(theirs)), spread)
        return f"{mean(ours):.4f} (CPU {mean(theirs):.4f}, range {spread:.4f})"

    def _refuse(self, way: Way, what: str, ours: float, theirs: float, apart: float, most: float) -> None:
        if not apart <= most:  # so that NaN is a difference
            raise Disagreement(
                f"{self.task.name}, {way.name} on {self.device}: {what} is {ours!r}, but on the CPU {theirs!r}; "
                f"they differ by {apart:.2e}, more than {most:.0e}"
            )


def relative(one: float, other: float) -> float:
    """Return the relative difference of two numbers."""
    return abs(one - other) / max(abs(other), math.ulp(1.0))


def _of_epochs(config: TrainConfig, epochs: int) -> TrainConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"epochs": epochs})})


def check_all(task: Task, device: torch.device) -> Iterator[str]:
    """Yield a line for each way; Disagreement at the first difference."""
    agreement = Agreement.of(task, device)
    for way in gpu_ways.ways_on(device):
        yield agreement.check(way)
