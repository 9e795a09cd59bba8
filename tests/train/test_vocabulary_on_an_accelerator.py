"""The whole vocabulary of a study file trains on the twin device, which stands for a GPU, as it does on the CPU.

No operation mixes devices, and the curves are the CPU's. Runs are dealt so that every name appears in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo import data
from hpo.data import Source, Splits
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Augment, TrainConfig, Training
from hpo.train import checkpoint, eval_metrics, loop
from hpo.train.build import assemble, registry
from hpo.train.epoch import EpochResult
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.stack import Forward, Stack
from hpo.train.stack.vmap_forward import VmapForward
from tests.support import twin, vocabulary
from tests.support.stacks import CLASSES, apart, stop_before, train

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
def splits(device: torch.device, resident: bool = True) -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % CLASSES
    images = torch.randint(0, 180, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 30).to(torch.uint8)[:, None]
    source = Source(inputs=images, targets=labels, num_classes=CLASSES)
    return data.load(data.select(source, resident=resident), split_seed=0, device=device)


def config_of(sections: dict[str, Any], model: dict[str, Any], **common: Any) -> TrainConfig:
    document = {"name": "s", "data": {"name": "digits"}, "model": model, **common, **sections}
    document["training"] = {"epochs": 2, "batch_size": 8} | sections.get("training", {})
    return TrainConfig.from_tree(registry.resolve(StudySpec.from_document(document), Path()).tree)


def run_of(config: TrainConfig, device: torch.device, seed: int) -> Run:
    return assemble.build_run(config, splits(device), seed, Path(), device, dtype=torch.float64)


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


# --- across devices -------------------------------------------------------------------------------------------------------


def through_a_file(run: Run, fresh: Run, path: Path) -> Run:
    checkpoint.save(path, run.state_dict())
    fresh.load_state_dict(checkpoint.load(path))
    return fresh


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("back", [False, True], ids=["to the CPU", "to the accelerator"])
def test_a_run_goes_on_on_another_type_of_device(tmp_path: Path, back: bool, seed: int) -> None:
    first, then = (CPU, twin.DEVICE) if back else (twin.DEVICE, CPU)
    for row, (config, expected) in enumerate(zip(dealt("cnn", seed), on_the_cpu("cnn", seed), strict=True)):
        run = run_of(config, first, row)
        [begun] = islice(loop.train(run), 1)
        run = through_a_file(run, run_of(config, then, row), tmp_path / "state.pt")
        assert apart(curve([begun, *loop.train(run)]), expected) <= 1e-10, config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("back", [False, True], ids=["to the CPU", "to the accelerator"])
def test_a_stack_goes_on_on_another_type_of_device(tmp_path: Path, back: bool, seed: int) -> None:
    first, then = (CPU, twin.DEVICE) if back else (twin.DEVICE, CPU)
    configs = dealt("cnn", seed)
    rows = stackable(configs)
    runs = [run_of(configs[row], first, row) for row in rows]
    begun = stack_of(runs, FORWARDS["stack"]).train_epoch()
    runs = [
        through_a_file(run, run_of(configs[row], then, row), tmp_path / "state.pt")
        for row, run in zip(rows, runs, strict=True)
    ]
    results = train(stack_of(runs, FORWARDS["stack"]))
    for row, one, run in zip(rows, begun, runs, strict=True):
        assert apart(curve([one, *results[run]]), on_the_cpu("cnn", seed)[row]) <= 1e-10, configs[row]


@pytest.mark.parametrize("back", [False, True], ids=["to the CPU", "to the accelerator"])
def test_amid_an_epoch_a_run_goes_on_with_random_numbers_of_its_own(tmp_path: Path, back: bool) -> None:
    """Without dropout there are none to draw, and nothing differs. With dropout the first epoch is another one."""
    first, then = (CPU, twin.DEVICE) if back else (twin.DEVICE, CPU)
    for dropout in (0.0, 0.2):
        config = config_of({"optimizer": {"name": "adamw", "lr": 0.01}}, MODELS["mlp"] | {"dropout": dropout})
        run = run_of(config, first, 1)
        assert list(loop.train(run, stop_before(2))) == []
        runs = [through_a_file(run, run_of(config, device, 1), tmp_path / "state.pt") for device in (then, then, first)]
        moved, again, stayed = (curve(list(loop.train(one))) for one in runs)
        assert moved == again
        assert (apart(moved, stayed) <= 1e-10) == (not dropout)


@pytest.mark.parametrize("forward", [None, "stack"])
def test_images_read_batch_by_batch_are_pinned_and_come_to_the_same(forward: str | None) -> None:
    """They are copied to the device without holding the host."""
    config = config_of({"optimizer": {"name": "sgd", "lr": 0.05}}, MODELS["cnn"])
    expected = curve(list(loop.train(run_of(config, CPU, 3))))
    run = assemble.build_run(config, splits(twin.DEVICE, False), 3, Path(), twin.DEVICE, dtype=torch.float64)
    with twin.counting() as counts:
        results = list(loop.train(run)) if forward is None else train(stack_of([run], FORWARDS[forward]))[run]
    assert apart(curve(results), expected) <= 1e-10
    assert counts.to_device - counts.blocking >= 2 * run.steps_per_epoch  # each batch of both epochs
