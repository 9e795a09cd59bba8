"""The ways in which `gpu.py` trains one configuration: a plain script, our loop, a stack, and both with captured graphs.

All train the same configuration of a benchmark's study file, without a search. No Optuna is needed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tasks import ROOT, Task
from hpo.data import Splits
from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import devices, graphs
from hpo.train.build import assemble
from hpo.train.build.executor import Choice, Executor
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from hpo.train.stack import select

#: The configuration that all ways train.
CHOSEN: dict[str, Any] = {
    "model.dropout": 0.2,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 1e-4,
    "schedule.name": "cosine",
}
ENDLESS = 10**6  # epochs of a run that is only timed; its schedule has the task's length
SPLIT_SEED = 0
LAUNCHES = (
    "cudaLaunch",
    "cuLaunch",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)  # CUDA's calls that count


def config_of(task: Task, **taken: Any) -> TrainConfig:
    """Return the configuration of a task; `taken` replaces values of CHOSEN by path, with `__` for the dot."""
    values = CHOSEN | {path.replace("__", "."): value for path, value in taken.items()}
    return TrainConfig.from_tree(space.middle(StudySpec.from_document(copy.deepcopy(task.document)).tree, values))


def splits_of(task: Task, device: torch.device) -> Splits:
    """Return the training and validation part of a task's data on a device."""
    return assemble.load_splits(config_of(task), SPLIT_SEED, ROOT, device)


def runs_of(
    config: TrainConfig, splits: Splits, count: int, device: torch.device, dtype: torch.dtype | None = None
) -> list[Run]:
    """Return new runs with the seeds from 0 on."""
    return [assemble.build_run(config, splits, seed, ROOT, device, dtype=dtype) for seed in range(count)]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of our ways to train: an executor."""

    name: str
    executor: str  # "loop" or "stack"
    captures: bool = False  # whether the step is captured as a graph, unchecked

    def filled(self, runs: list[Run]) -> Executor:
        """Return an executor with these runs; the loop takes one."""
        executor = Choice(executor=self.executor, slots=len(runs), why="", captures=self.captures).build(runs[0])
        for run in runs:
            executor.put(run)
        return executor

    def finished(self, runs: list[Run]) -> list[list[EpochResult]]:
        """Train runs to their end, and return the results of each."""
        found: dict[int, list[EpochResult]] = {id(run): [] for run in runs}
        for group in [[run] for run in runs] if self.executor == "loop" else [runs]:
            executor = self.filled(group)
            while not group[0].finished:
                for run, result in zip(executor.runs, executor.train_epoch(), strict=True):
                    found[id(run)].append(result)
        return list(found.values())


LOOP, STACK = Way(name="loop", executor="loop"), Way(name="stack", executor="stack")
LOOP_AS_GRAPH = Way(name="loop as a graph", executor="loop", captures=True)
STACK_AS_GRAPH = Way(name="stack as a graph", executor="stack", captures=True)


def ways_on(device: torch.device) -> list[Way]:
    """Return our ways on a device."""
    return [LOOP, STACK, *([LOOP_AS_GRAPH, STACK_AS_GRAPH] if graphs.can_capture(device) else [])]


class Training(Protocol):
    """Trials in training, an epoch at a time."""

    slots: int
    steps: int  # of an epoch

    def epoch(self) -> None:
        """Train all trials for an epoch, to the end of its validation."""


@dataclass
class Ours:
    """Trials in one of our executors."""

    executor: Executor
    slots: int
    steps: int

    def epoch(self) -> None:
        """Train an epoch. Its result waits for the device."""
        self.executor.train_epoch()


@dataclass
class Plain:
    """One trial in a plain script; a new trial begins when one has ended."""

    task: Task
    device: torch.device
    loader_workers: int
    slots: int = 1
    steps: int = 0
    _epochs: Iterator[float] = field(default_factory=lambda: iter(()))

    def __post_init__(self) -> None:
        from benchmarks import plain_training  # here: scikit-learn and torchvision take seconds

        self._data = plain_training.get_data(self.task, SPLIT_SEED)
        self._train = plain_training.train
        self.steps = max(1, len(self._data.train) // self.task.batch_size)

    def epoch(self) -> None:
        """Train an epoch. The script waits for the device at each step."""
        if next(self._epochs, None) is None:
            config = {path.rpartition(".")[2]: value for path, value in CHOSEN.items()}
            config |= {"optimizer": CHOSEN["optimizer.name"], "schedule": CHOSEN["schedule.name"]}
            self._epochs = self._train(config, self.task, self._data, self.loader_workers, self.device)
            next(self._epochs)


def ours(way: Way, task: Task, splits: Splits, slots: int, device: torch.device) -> Ours:
    """Return trials of a task in one of our executors."""
    config = config_of(task)
    length = {"epochs": ENDLESS, "schedule_epochs": config.training.epochs}
    config = config.model_copy(update={"training": config.training.model_copy(update=length)})
    runs = runs_of(config, splits, slots if way.executor == "stack" else 1, device)
    return Ours(way.filled(runs), len(runs), runs[0].steps_per_epoch)


def seconds_of(training: Training, device: torch.device, least: float) -> float:
    """Return the seconds of an epoch, over as many epochs as take `least` seconds."""
    devices.synchronize(device)
    began, epochs = time.perf_counter(), 0
    while not epochs or time.perf_counter() - began < least:
        training.epoch()
        epochs += 1
    devices.synchronize(device)
    return (time.perf_counter() - began) / epochs


def few(splits: Splits, train: int, validation: int) -> Splits:
    """Return splits with the first images of each part."""
    return replace(
        splits, train=select.first(splits.train, train), validation=select.first(splits.validation, validation)
    )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are not views: each is at least one launch on a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass
class Launches:
    """How many launches a block took."""

    count: int = 0


@contextmanager
def counted_launches(device: torch.device) -> Iterator[Launches]:
    """Count launches and copies in a block. On a CPU these are operations that are not views."""
    found = Launches()
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            yield found
            devices.synchronize(device)
        found.count = sum(event.count for event in profile.key_averages() if event.key.startswith(LAUNCHES))
        return
    if device.type == "twin":
        from tests.support import twin

        with twin.counting() as counts:
            yield found
        found.count = counts.launches + counts.to_device + counts.to_host
        return
    operations = _Operations()
    with operations:
        yield found
    found.count = operations.count
