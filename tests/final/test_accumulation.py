"""A trial that was trained in micro-batches is replayed and trained in the same ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hpo.errors import SpecError
from hpo.final import train as final
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import devices, loop
from hpo.train.build import assemble
from tests.support.declared import nothing, quiet

PINNED: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "data": {"name": "digits"},
    "model": {"name": "cnn", "channels": [3, 4], "dropout": 0.3},
    "training": {"epochs": 2, "batch_size": 64},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"name": "cosine"},
}


def write(path: Path, **receipt: Any) -> Path:
    path.write_text(tomli_w.dumps(PINNED | ({"receipt": receipt} if receipt else {})))
    return path


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The receipt of a trial in two micro-batches."""
    folder = tmp_path_factory.mktemp("trial")
    spec = StudySpec.load(write(folder / "best.toml"))
    config, device = TrainConfig.from_tree(spec.tree), devices.pick()
    torch.set_num_threads(config.training.threads)
    splits = assemble.load_splits(config, spec.split_seed, folder, device)
    results = list(loop.train(assemble.build_run(config, splits, 11, folder, device, accumulation=2)))
    curves = {name: [getattr(result, name) for result in results] for name in ("train_loss", "validation_loss")}
    return {"seed": 11, "accumulation": 2, "curves": curves}


def test_a_trial_in_micro_batches_replays_bit_for_bit(trial: dict[str, Any], tmp_path: Path) -> None:
    assert final.replay(final.prepare(write(tmp_path / "best.toml", **trial)), quiet) == []
    whole = final.prepare(write(tmp_path / "whole.toml", **trial | {"accumulation": 1}))
    assert final.replay(whole, quiet) != []


def test_another_seed_keeps_the_receipt_s_micro_batches(trial: dict[str, Any], tmp_path: Path) -> None:
    training = final.prepare(write(tmp_path / "best.toml", **trial), seed=5)
    assert (training.seed, training.accumulation) == (5, 2)


def test_a_config_without_a_receipt_is_trained_in_whole_batches(tmp_path: Path) -> None:
    assert final.prepare(write(tmp_path / "best.toml")).accumulation == 1


def test_the_final_training_s_receipt_names_its_micro_batches(trial: dict[str, Any], tmp_path: Path) -> None:
    training = final.prepare(write(tmp_path / "best.toml", **trial))
    metrics = final.train(training, tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert metrics is not None
    assert metrics["receipt"]["accumulation"] == 2
    assert [row["validation_loss"] for row in metrics["history"]] == trial["curves"]["validation_loss"]


def test_micro_batches_make_another_training(trial: dict[str, Any], tmp_path: Path) -> None:
    """Micro batches make another training and whole batches keep the old identity."""
    ways = [trial | {"accumulation": 1}, trial, trial | {"accumulation": 4}]
    trainings = [final.prepare(write(tmp_path / f"{i}.toml", **way)) for i, way in enumerate(ways)]
    assert len({training.identity for training in trainings}) == 3
    whole = json.dumps([trainings[0].spec.identity, 11], sort_keys=True)  # as it was before there were micro-batches
    assert trainings[0].identity == hashlib.sha256(whole.encode()).hexdigest()


def test_micro_batches_that_the_batch_cannot_be_cut_into_are_refused(trial: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"receipt.accumulation = 1000: training.batch_size = \d+ cannot be cut"):
        final.prepare(write(tmp_path / "a.toml", **(trial | {"accumulation": 1000})))
