"""Trials to be trained alone and in stacks: by plain torch code, by the loop, by a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hpo import data
from hpo.data import Source, Splits
from hpo.models import mlp, use_generator
from hpo.spec.seeds import derive
from hpo.train.batches import steps_per_epoch
from hpo.train.epoch import EpochResult
from hpo.train.optim.schedules import Schedule, after, constant
from hpo.train.randomness import initial_model
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.stack import Stack

CLASSES = 3
Numbers = list[list[float]]  # by epoch: training loss, validation loss, accuracy


def digits(count: int = 120, side: int = 8, device: torch.device | str = "cpu") -> Splits:
    """Return images that can be told apart, and not at once."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 200, (count, 1, side, side), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 20).to(torch.uint8)[:, None]
    return data.load(Source(inputs=images, targets=labels, num_classes=CLASSES), split_seed=0, device=device)


def small_mlp() -> nn.Module:
    return mlp((1, 8, 8), CLASSES, widths=[7, 5], activation="gelu")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial, from which the same run can be made again and again."""

    splits: Splits
    build: Callable[[], nn.Module] = small_mlp
    optimizer: Callable[..., Optimizer] = torch.optim.SGD  # of a model's parameters
    lr: float = 0.05
    schedule: Callable[[int], Schedule] = constant
    seed: int = 0
    epochs: int = 8
    batch_size: int = 20  # 4 steps an epoch
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # further ones of Run

    @property
    def steps(self) -> int:
        return steps_per_epoch(len(self.splits.train.targets), self.batch_size)

    def model(self) -> nn.Module:
        return initial_model(lambda: self.build().to(self.dtype), self.seed)

    def run(self) -> Run:
        model = self.model().to(self.splits.train.targets.device)
        return Run(
            model=model,
            optimizer=self.optimizer(model.parameters(), lr=self.lr),
            schedule=self.schedule(self.epochs * self.steps),
            splits=self.splits,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            **self.options,
        )

    def several(self, count: int = 3) -> list[Trial]:
        """Return this trial under several seeds and learning rates."""
        return [replace(self, seed=self.seed + row, lr=self.lr * 0.7**row) for row in range(count)]

    def by_plain_torch(self) -> Numbers:
        """Train with torch.nn and torch.optim and nothing of ours but the weights, the order and the schedule."""
        model = self.model()
        optimizer = self.optimizer(model.parameters(), lr=self.lr)
        return plain_epochs(self, model, optimizer, range(self.epochs))


def plain_epochs(trial: Trial, model: nn.Module, optimizer: Optimizer, epochs: Iterable[int]) -> Numbers:
    """Train a model of plain torch for these epochs of a trial."""
    splits, dtype = trial.splits, trial.dtype
    result: Numbers = []
    base = [group["lr"] for group in trial.optimizer(trial.model().parameters(), lr=trial.lr).param_groups]
    schedule = trial.schedule(trial.epochs * trial.steps)
    images, validation = (
        (part.inputs.to(dtype) - splits.mean.to(dtype).view(-1, 1, 1)) * (1 / splits.std.to(dtype).view(-1, 1, 1))
        for part in (splits.train, splits.validation)
    )
    generator = torch.Generator()
    use_generator(model, generator)
    for epoch in epochs:
        model.train()
        now = after(schedule, [validation_loss for _, validation_loss, _ in result])
        losses = []
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derive(trial.seed, "order", epoch)))
        generator.manual_seed(derive(trial.seed, "dropout", epoch))
        for batch, rows in enumerate(order.split(trial.batch_size)[: trial.steps]):
            factor, momentum = now(epoch * trial.steps + batch)
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
                if momentum is not None and "momentum" in group:
                    group["momentum"] = momentum
                elif momentum is not None:
                    group["betas"] = (momentum, group["betas"][1])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), splits.train.targets[rows])
            loss.backward()
            if "clip_value" in trial.options:
                nn.utils.clip_grad_value_(model.parameters(), trial.options["clip_value"])
            if "clip_norm" in trial.options:
                nn.utils.clip_grad_norm_(model.parameters(), trial.options["clip_norm"])
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(validation)
        labels = splits.validation.targets
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        result.append([sum(losses) / trial.steps, F.cross_entropy(logits, labels).item(), accuracy])
    return result


def numbers(results: Iterable[EpochResult]) -> Numbers:
    return [[result.train_loss, result.validation_loss, result.validation_accuracy or 0.0] for result in results]


def stack_of(runs: Sequence[Run], slots: int = 0) -> Stack:
    """Put runs into a stack of their own."""
    stack = Stack(StackedForward(runs[0].model), runs[0], slots or len(runs))
    for run in runs:
        stack.put(run)
    return stack


def train(stack: Stack, results: dict[Run, list[EpochResult]] | None = None) -> dict[Run, list[EpochResult]]:
    """Train until every run has had its epochs; each leaves when it has."""
    results = {} if results is None else results
    while stack.runs:
        for run, result in zip(stack.runs, stack.train_epoch(), strict=True):
            results.setdefault(run, []).append(result)
            if run.finished:
                stack.remove(run)
    return results


def together(trials: Sequence[Trial], slots: int = 0) -> list[Numbers]:
    """Return the curves of trials that are trained in one stack."""
    runs = [trial.run() for trial in trials]
    results = train(stack_of(runs, slots))
    return [numbers(results[run]) for run in runs]


def apart(one: Any, other: Any) -> float:
    """Return the largest difference between curves; not a number counts as equal to itself."""
    a, b = (torch.tensor(curve, dtype=torch.float64) for curve in (one, other))
    assert a.shape == b.shape
    return float(torch.where(a.isnan() & b.isnan(), 0.0, (a - b).abs()).max())


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def stop_before(step: int) -> Callable[[], bool]:
    """Say stop when asked before the step of this number, counted over the whole call."""
    asked = iter(range(10**9))
    return lambda: next(asked) == step


def timeless(results: Iterable[EpochResult]) -> list[EpochResult]:
    """Return results without the time that they took."""
    return [replace(result, seconds=0.0) for result in results]
