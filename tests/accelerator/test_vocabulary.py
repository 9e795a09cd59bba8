"""The whole vocabulary of a study file trains on the twin device, which stands for a GPU, as it does on the CPU.

No operation mixes devices, and the curves are the CPU's. Runs are dealt so that every name appears in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from hpo.train.optim import losses
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.stack import Stack
from tests.support import twin, vocabulary
from tests.support.inputs import splits_of
from tests.support.stacks import CLASSES, apart, stop_before, train

CPU = torch.device("cpu")
#: On the CPU a new run would draw its masks otherwise, from a generator.
SAME: dict[str, Any] = {"dtype": torch.float64, "masks": "counter"}
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 6)))
#: Models for images.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "widths": [5], "dropout": 0.2},
    "cnn": {"name": "cnn", "channels": [3, 4], "dropout": 0.2, "residual": True, "stochastic_depth": 0.3},
}
#: Other inputs: a model with its options, the kind of its inputs, a task, and the forward pass of a stack.
OTHERS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "table": ({"name": "mlp", "widths": [5], "embedding": "quantile", "bins": 4}, "table", "binary", "stack"),
    "features": ({"name": "mlp", "widths": [5], "embedding": "periodic"}, "features", "regression", "stack"),
    "series": ({"name": "cnn1d", "channels": [4], "dropout": 0.1}, "series", "regression", "stack"),
    "tokens": ({"name": "gru", "width": 4, "bidirectional": True}, "tokens", "multilabel", "vmap"),
    "words": ({"name": "transformer", "width": 8, "heads": 2, "depth": 1}, "tokens", "classification", "vmap"),
    "sequence": ({"name": "lstm", "width": 4, "depth": 2, "dropout": 0.1}, "series", "binary", "vmap"),
}


def watched(task: str) -> dict[str, Any]:
    return {"norms": True, "resources": True, "metrics": [*eval_metrics.MEASURES[task]]}


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
    return assemble.build_run(config, splits(device), seed, Path(), device, **SAME)


def curve(results: Sequence[EpochResult]) -> list[list[float]]:
    """Return all that was measured but times and memory."""
    left_out = ("seconds", "examples_per_second", "peak_memory_mb")
    return [[value for key, value in sorted(one.numbers.items()) if key not in left_out] for one in results]


@cache
def dealt(model: str, seed: int, alone: bool) -> list[TrainConfig]:
    common = {"watch": {"norms": True}} if model == "mlp" else {}
    return [
        config_of(one, MODELS[model], **common) for one in vocabulary.deal(vocabulary.own_sections(alone=alone), seed)
    ]


@cache
def on_the_cpu(model: str, seed: int, alone: bool) -> list[list[list[float]]]:
    configs = dealt(model, seed, alone)
    return [curve(list(loop.train(run_of(config, CPU, row)))) for row, config in enumerate(configs)]


def stack_of(runs: Sequence[Run], forward: str) -> Stack:
    stack = Stack(select.of(forward, runs[0]), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return stack


def test_every_name_and_option_is_dealt() -> None:
    augments = vocabulary.AUGMENTS.keys() | vocabulary.MANNERS.keys()
    assert augments == Augment.model_fields.keys()
    others = {"epochs", "batch_size", "schedule_epochs", "precision", "threads"}
    assert vocabulary.TRAINING.keys() | others == Training.model_fields.keys()
    for seed in range(3):
        assert {one.optimizer.name for one in dealt("mlp", seed, True)} == OPTIMIZERS.keys()
        assert {one.optimizer.name for one in dealt("mlp", seed, False)} == OPTIMIZERS.keys() - {"soap"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.soak)])  # epochs of cnn: see below
def test_the_loop_trains_as_on_the_cpu(model: str, seed: int) -> None:
    for row, (config, expected) in enumerate(zip(dealt(model, seed, True), on_the_cpu(model, seed, True), strict=True)):
        found = curve(list(loop.train(run_of(config, twin.DEVICE, row))))
        assert apart(found, expected) <= 1e-10, config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("model", "forward"),
    [("mlp", "stack"), pytest.param("cnn", "stack", marks=pytest.mark.soak), ("mlp", "vmap")],  # cnn: see below
)
def test_a_stack_trains_as_the_loop_does_on_the_cpu(model: str, forward: str, seed: int) -> None:
    configs = dealt(model, seed, False)
    runs = [run_of(config, twin.DEVICE, row) for row, config in enumerate(configs)]
    results = train(stack_of(runs, forward))
    for config, run, expected in zip(configs, runs, on_the_cpu(model, seed, False), strict=True):
        assert apart(curve(results[run]), expected) <= 1e-10, config


SHORT = ("table", "tokens")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.soak) for name in OTHERS]
)
def test_every_task_and_kind_of_inputs_trains_as_on_the_cpu(name: str) -> None:
    model, kind, task, forward = OTHERS[name]
    here, there = splits_of(kind, task, 40), splits_of(kind, task, 40, "twin")
    runs: dict[str, list[Run]] = {"cpu": [], "loop": [], "stack": []}
    for row, loss in enumerate(vocabulary.losses_of(task)):
        config = config_of({"optimizer": {"name": "adamw", "lr": 0.01}, "loss": loss}, model, watch=watched(task))
        for where, splits in (("cpu", here), ("loop", there), ("stack", there)):
            device = splits.device
            runs[where].append(assemble.build_run(config, splits, row, Path(), device, **SAME))
    expected = [curve(list(loop.train(run))) for run in runs["cpu"]]
    found = [curve(list(loop.train(run))) for run in runs["loop"]]
    assert max(map(apart, found, expected)) <= 1e-10
    # Runs of a stack have as many outputs, but those of gaussian_nll two for each target.
    rows = [row for row, run in enumerate(runs["stack"]) if losses.outputs_per_target(run.loss) == 1]
    assert len(rows) >= 2
    results = train(stack_of([runs["stack"][row] for row in rows], forward))
    for row in rows:
        assert apart(curve(results[runs["stack"][row]]), expected[row]) <= 1e-10, (name, row)


# --- across devices -------------------------------------------------------------------------------------------------------


def through_a_file(run: Run, fresh: Run, path: Path) -> Run:
    checkpoint.save(path, run.state_dict())
    fresh.load_state_dict(checkpoint.load(path))
    return fresh


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_goes_on_on_another_type_of_device(tmp_path: Path, seed: int) -> None:
    """Every other run goes from the accelerator to the CPU, the others back."""
    for row, (config, expected) in enumerate(zip(dealt("cnn", seed, True), on_the_cpu("cnn", seed, True), strict=True)):
        first, then = (CPU, twin.DEVICE) if (row + seed) % 2 else (twin.DEVICE, CPU)
        run = run_of(config, first, row)
        [begun] = islice(loop.train(run), 1)
        run = through_a_file(run, run_of(config, then, row), tmp_path / "state.pt")
        assert apart(curve([begun, *loop.train(run)]), expected) <= 1e-10, config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("back", [False, True], ids=["to the CPU", "to the accelerator"])
def test_a_stack_goes_on_on_another_type_of_device(tmp_path: Path, back: bool, seed: int) -> None:
    first, then = (CPU, twin.DEVICE) if back else (twin.DEVICE, CPU)
    configs = dealt("cnn", seed, False)
    begun = [run_of(config, first, row) for row, config in enumerate(configs)]
    results = {run: [result] for run, result in zip(begun, stack_of(begun, "stack").train_epoch(), strict=True)}
    runs = [
        through_a_file(run, run_of(config, then, row), tmp_path / "state.pt")
        for row, (config, run) in enumerate(zip(configs, begun, strict=True))
    ]
    after = train(stack_of(runs, "stack"))
    for row, expected in enumerate(on_the_cpu("cnn", seed, False)):
        assert apart(curve(results[begun[row]] + after[runs[row]]), expected) <= 1e-10, configs[row]


@pytest.mark.parametrize("back", [False, True], ids=["to the CPU", "to the accelerator"])
def test_amid_an_epoch_a_run_goes_on_with_the_same_masks(tmp_path: Path, back: bool) -> None:
    """Masks by counting are the same on every device. Those of a generator are not, so the epoch is another one."""
    first, then = (CPU, twin.DEVICE) if back else (twin.DEVICE, CPU)
    config = config_of({"optimizer": {"name": "adamw", "lr": 0.01}}, MODELS["mlp"])
    for masks in ("counter", "generator"):
        made = {"dtype": torch.float64, "masks": masks}
        run = assemble.build_run(config, splits(first), 1, Path(), first, **made)
        assert list(loop.train(run, stop_before(2))) == []
        runs = [through_a_file(run, run_of(config, device, 1), tmp_path / "state.pt") for device in (then, then, first)]
        moved, again, stayed = (curve(list(loop.train(one))) for one in runs)
        assert moved == again
        assert (apart(moved, stayed) <= 1e-10) == (masks == "counter")


@pytest.mark.parametrize("forward", [None, "stack"])
def test_images_read_batch_by_batch_are_pinned_and_come_to_the_same(forward: str | None) -> None:
    """They are copied to the device without holding the host."""
    config = config_of({"optimizer": {"name": "sgd", "lr": 0.05}}, MODELS["cnn"])
    expected = curve(list(loop.train(run_of(config, CPU, 3))))
    run = assemble.build_run(config, splits(twin.DEVICE, False), 3, Path(), twin.DEVICE, **SAME)
    with twin.counting() as counts:
        results = list(loop.train(run)) if forward is None else train(stack_of([run], forward))[run]
    assert apart(curve(results), expected) <= 1e-10
    assert counts.to_device - counts.blocking >= 2 * run.steps_per_epoch  # each batch of both epochs
