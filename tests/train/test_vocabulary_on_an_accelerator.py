"""The whole vocabulary of a study file trains on the twin device, which stands for a GPU, as it does on the CPU.

No operation mixes devices, and the curves are the CPU's. Runs are dealt so that every name appears in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo import data
from hpo.data import Source, Splits
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Augment, TrainConfig, Training
from hpo.train import eval_metrics, loop
from hpo.train.build import assemble, registry
from hpo.train.epoch import EpochResult
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.stack import Forward, Stack
from hpo.train.stack.vmap_forward import VmapForward
from tests.support import twin, vocabulary
from tests.support.stacks import CLASSES, apart, train

CPU = torch.device("cpu")
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 6)))
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "widths": [5], "dropout": 0.2},
    "cnn": {"name": "cnn", "channels": [3, 4], "dropout": 0.2, "residual": True, "stochastic_depth": 0.3},
}
FORWARDS: dict[str, Callable[[Run], Forward]] = {
    "stack": lambda run: StackedForward(run.model),
    "vmap": lambda run: VmapForward(run.model, next(run.validation_inputs.split(2))),
}
WATCH = {"norms": True, "resources": True, "metrics": [*eval_metrics.MEASURES]}


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    with twin.plugged_in():
        yield


@cache
def splits(device: torch.device, side: int = 8) -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % CLASSES
    images = torch.randint(0, 180, (40, 3, side, side), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 30).to(torch.uint8)[:, None]
    return data.load(Source(inputs=images, targets=labels, num_classes=CLASSES), split_seed=0, device=device)


def config_of(sections: dict[str, Any], model: dict[str, Any], **common: Any) -> TrainConfig:
    document = {"name": "s", "data": {"name": "digits"}, "model": model, **common, **sections}
    document["training"] = {"epochs": 2, "batch_size": 8} | sections.get("training", {})
    return TrainConfig.from_tree(registry.resolve(StudySpec.from_document(document), Path()).tree)


def run_of(config: TrainConfig, device: torch.device, seed: int, side: int = 8) -> Run:
    return assemble.build_run(config, splits(device, side), seed, Path(), device, dtype=torch.float64)


def curve(results: Sequence[EpochResult]) -> list[list[float]]:
    """Return all that was measured but times and memory."""
    left_out = ("seconds", "images_per_second", "peak_memory_mb")
    return [[value for key, value in sorted(one.numbers.items()) if key not in left_out] for one in results]


@cache
def dealt(model: str, seed: int) -> list[TrainConfig]:
    common = {"watch": WATCH} if model == "mlp" else {}
    return [config_of(one, MODELS[model], **common) for one in vocabulary.deal(vocabulary.own_sections(), seed)]


@cache
def on_the_cpu(model: str, seed: int) -> list[list[list[float]]]:
    configs = dealt(model, seed)
    return [curve(list(loop.train(run_of(config, CPU, row)))) for row, config in enumerate(configs)]


def stackable(configs: Sequence[TrainConfig]) -> list[int]:
    """Return the places of configs without batch norm's statistics anew, a batch taken twice, or eigenbases."""
    return [
        row
        for row, one in enumerate(configs)
        if one.averaging.name != "swa" and not one.sam.rho and one.optimizer.name != "soap"
    ]


def stack_of(runs: Sequence[Run], forward: Callable[[Run], Forward]) -> Stack:
    stack = Stack(forward(runs[0]), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return stack


def test_every_name_and_option_is_dealt() -> None:
    augments = vocabulary.AUGMENTS.keys() | vocabulary.MANNERS.keys()
    assert augments == Augment.model_fields.keys()
    others = {"epochs", "batch_size", "schedule_epochs", "precision", "threads"}
    assert vocabulary.TRAINING.keys() | others == Training.model_fields.keys()
    for seed in range(3):
        configs = dealt("mlp", seed)
        assert {one.optimizer.name for one in configs} == OPTIMIZERS.keys()
        assert len(stackable(configs)) >= 5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model", MODELS)
def test_the_loop_trains_as_on_the_cpu(model: str, seed: int) -> None:
    for row, (config, expected) in enumerate(zip(dealt(model, seed), on_the_cpu(model, seed), strict=True)):
        found = curve(list(loop.train(run_of(config, twin.DEVICE, row))))
        assert apart(found, expected) <= 1e-10, config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("model", "forward"), [("mlp", "stack"), ("cnn", "stack"), ("mlp", "vmap")])
def test_a_stack_trains_as_the_loop_does_on_the_cpu(model: str, forward: str, seed: int) -> None:
    configs = dealt(model, seed)
    rows = stackable(configs)
    runs = [run_of(configs[row], twin.DEVICE, row) for row in rows]
    results = train(stack_of(runs, FORWARDS[forward]))
    for row, run in zip(rows, runs, strict=True):
        assert apart(curve(results[run]), on_the_cpu(model, seed)[row]) <= 1e-10, configs[row]
