"""What training asks of a device: launches, waits and copies, counted on the twin device for loop, stack and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo import data
from hpo.data import Source, Splits
from hpo.models import MODELS
from hpo.train.loop import Loop
from hpo.train.optim import optimizers, param_groups, schedules
from hpo.train.randomness import initial_model
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.stack import Stack
from tests.support import twin

CLASSES = 10


@dataclass(frozen=True)
class Task:
    """A model and as many images as an epoch of it needs here."""

    shape: tuple[int, int, int]
    build: Callable[[tuple[int, ...]], nn.Module]
    batch: int
    steps: int

    def splits(self) -> Splits:
        """Return images for the training and for validation, on the twin device."""
        count = max(self.batch * self.steps * 10 // 7, 8 * CLASSES) + CLASSES
        drawn = torch.Generator().manual_seed(0)
        images = torch.randint(0, 200, (count, *self.shape), dtype=torch.uint8, generator=drawn)
        source = Source(inputs=images, targets=torch.arange(count) % CLASSES, num_classes=CLASSES)
        return data.load(source, split_seed=0, device=twin.DEVICE)

    def model(self, seed: int) -> nn.Module:
        """Return the model of a trial."""
        return initial_model(lambda: self.build(self.shape), seed).to(twin.DEVICE)


TASKS = {
    "mlp": Task((1, 8, 8), lambda shape: MODELS["mlp"](shape, CLASSES, widths=[64, 32], dropout=0.2), 32, 14),
    "cnn": Task((1, 8, 8), lambda shape: MODELS["cnn"](shape, CLASSES, channels=[8, 16], dropout=0.2), 32, 14),
    "resnet18": Task((3, 16, 16), lambda shape: MODELS["resnet18"](shape, CLASSES), 8, 8),
}


@dataclass(frozen=True)
class Epoch:
    """What an epoch asks of the device."""

    steps: int
    launches: int
    waits: int
    copies: int  # to the device
    blocking: int  # copies that the host waits for

    @property
    def launches_a_step(self) -> float:
        """Launches by step, with the epoch's share of drawing ahead and of validation."""
        return self.launches / self.steps


def run_of(task: Task, splits: Splits, seed: int = 0, optimizer: str = "adamw", **options: Any) -> Run:
    """Return a run of a task. Runs differ in seed and learning rate."""
    model = task.model(seed)
    groups = param_groups.split(model)
    steps = len(splits.train.targets) // task.batch
    return Run(
        model=model,
        optimizer=optimizers.OPTIMIZERS[optimizer](groups, lr=0.001 * (1 + seed % 7), weight_decay=0.01),
        schedule=schedules.cosine(4 * steps),
        splits=splits,
        epochs=4,
        batch_size=task.batch,
        seed=seed,
        **options,
    )


def of_loop(task: Task, **options: Any) -> Epoch:
    """Count an epoch of the loop."""
    loop = Loop()
    loop.put(run_of(task, task.splits(), **options))
    return _counted(loop.runs[0].steps_per_epoch, loop.train_epoch)


def of_stack(task: Task, trials: int, kinds: Sequence[str] = ("adamw",), **options: Any) -> Epoch:
    """Count an epoch of a stack, whose trials have these kinds of optimizers by turns."""
    stack = _stack(task, trials, kinds, **options)
    return _counted(stack.runs[0].steps_per_epoch, stack.train_epoch)


def _stack(task: Task, trials: int, kinds: Sequence[str] = ("adamw",), **options: Any) -> Stack:
    splits = task.splits()
    runs = [run_of(task, splits, row, kinds[row % len(kinds)], **options) for row in range(trials)]
    stack = Stack(StackedForward(runs[0].model), runs[0], trials)
    for run in runs:
        stack.put(run)
    return stack


def of_plain_torch(task: Task) -> Epoch:
    """Count an epoch of the loop that one would write without us."""
    return _counted(*_plain_torch(task))


@cache
def step_of_loop(task: Task) -> int:
    """Return the launches of the loop's second step."""
    loop = Loop()
    loop.put(run_of(task, task.splits()))
    return _second_step(loop.train_epoch)


def step_of_stack(task: Task, trials: int) -> int:
    """Return the launches of a stack's second step."""
    return _second_step(_stack(task, trials).train_epoch)


def step_of_plain_torch(task: Task) -> int:
    """Return the launches of the second step of the loop that one would write without us."""
    return _second_step(_plain_torch(task)[1])


def _plain_torch(task: Task) -> tuple[int, Callable[..., object]]:
    """Return the steps of an epoch, and an epoch: data on the device, one wait, fused AdamW. It ends early as ours do."""
    splits = task.splits()
    model = initial_model(lambda: task.build(task.shape), 0)
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "Dropout":
                setattr(module, name, nn.Dropout(child.p))
    model = model.to(twin.DEVICE)
    kinds = [[p for p in model.parameters() if (p.ndim < 2) == is_small] for is_small in (False, True)]
    groups = [{"params": kinds[0], "weight_decay": 0.01}, {"params": kinds[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.001, fused=True)
    (x, y), (x_held, y_held) = (
        ((part.inputs.float() - 100) / 50, part.targets) for part in (splits.train, splits.validation)
    )
    steps = len(y) // task.batch

    def epoch(stop: Callable[[], bool] = lambda: False) -> list[float]:
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=twin.DEVICE)
        order = torch.randperm(len(y)).pin_memory().to(twin.DEVICE, non_blocking=True)
        for rows in order[: steps * task.batch].split(task.batch):
            if stop():
                return []
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        model.eval()
        with torch.no_grad():
            logits: Tensor = model(x_held)
            found = [
                total / steps,
                F.cross_entropy(logits, y_held).double(),
                (logits.argmax(1) == y_held).double().mean(),
            ]
            numbers: list[float] = torch.stack(found).tolist()
        return numbers

    return steps, epoch


def _second_step(epoch: Callable[..., object]) -> int:
    """Return the launches between the second and the third question whether to stop."""
    before: list[int] = []
    with twin.counting() as counts:

        def stop() -> bool:
            before.append(counts.launches)
            return len(before) == 3

        epoch(stop)
    return before[2] - before[1]


def _counted(steps: int, epoch: Callable[[], object]) -> Epoch:
    epoch()  # the first one also prepares what later ones find
    with twin.counting() as counts:
        epoch()
    return Epoch(steps, counts.launches, counts.waits, counts.to_device, counts.blocking)
