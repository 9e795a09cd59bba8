"""The final training, the replay and `hpo after` on the twin device, which stands for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hpo.final import train as final
from hpo.final import trajectory
from hpo.final.after import report, steps, trained
from hpo.train import checkpoint
from tests.support import twin
from tests.support.declared import nothing, quiet

CONFIG: dict[str, Any] = {
    "name": "digits",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8], "dropout": 0.3},
    "training": {"epochs": 2, "batch_size": 256},
    "optimizer": {"name": "adamw", "lr": 0.02},
    "averaging": {"name": "ema"},
    "receipt": {"seed": 5, "masks": "counter"},  # on the CPU a new run would draw its masks from a generator
}
# Not int8_static, whose export by torch takes no tensors of a class of its own.
RECIPES = ("fold", "prune=0.5", "fp16", "int8_weights")


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds of matplotlib, as where it is not installed."""
    monkeypatch.setattr(trajectory, "can_draw", lambda: False)


def trained_in(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    (folder / "best.toml").write_text(tomli_w.dumps(config))
    training = final.prepare(folder / "best.toml")
    found = final.train(training, folder / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert found is not None
    return found


def test_a_final_training_and_its_replay_come_to_the_same_on_both_devices(tmp_path: Path) -> None:
    here = trained_in(tmp_path / "cpu", CONFIG)
    curves = {name: [row[name] for row in here["history"]] for name in ("train_loss", "validation_loss")}
    pinned = CONFIG | {"receipt": CONFIG["receipt"] | {"curves": curves}}
    with twin.plugged_in():
        there = trained_in(tmp_path / "twin", pinned)
        assert final.replay(final.prepare(tmp_path / "twin/best.toml"), quiet) == []
    assert (here["receipt"]["device"], there["receipt"]["device"]) == ("cpu", "Twin")
    assert [here[name] for name in ("test_loss", "test_accuracy")] == [
        there[name] for name in ("test_loss", "test_accuracy")
    ]
    weights = [checkpoint.load(tmp_path / folder / "run/weights.pt") for folder in ("cpu", "twin")]
    assert json.dumps(weights[0], default=torch.Tensor.tolist) == json.dumps(weights[1], default=torch.Tensor.tolist)


def test_a_final_training_goes_on_on_another_device(tmp_path: Path) -> None:
    whole = trained_in(tmp_path / "whole", CONFIG)
    (tmp_path / "best.toml").write_text(tomli_w.dumps(CONFIG))
    ended: list[object] = []

    def on(device_is_there: bool, *, after: int) -> dict[str, Any] | None:
        training = final.prepare(tmp_path / "best.toml", seed=whole["receipt"]["seed"])
        assert (training.device.type == "twin") == device_is_there
        ended.clear()
        return final.train(
            training, tmp_path / "run", stop=lambda: len(ended) == after, progress=ended.append, before_test=nothing
        )

    with twin.plugged_in():
        assert on(True, after=1) is None
    found = on(False, after=9)
    assert found is not None
    assert found["test_loss"] == whole["test_loss"]


def test_after_training_all_steps_and_files_are_made_on_an_accelerator(tmp_path: Path) -> None:
    with twin.plugged_in():
        trained_in(tmp_path / "twin", CONFIG)
        recipes = [steps.read(name) for name in RECIPES]
        made = report.make(trained.load(tmp_path / "twin/run"), recipes, tmp_path / "out", passes=3, formats=["pt2"])
    assert made.refused == []
    assert [one.name for one in made.variants] == ["trained", *RECIPES]
    assert [[one.format for one in variant.files] for variant in made.variants] == [["pt2"]] * (1 + len(RECIPES))
    assert made.receipt["device"] == "Twin"
    again = report.make(trained.load(tmp_path / "twin/run"), recipes, tmp_path / "cpu", passes=3, formats=[])
    scores = [[variant.score.loss for variant in one.variants] for one in (made, again)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert made.mc_dropout == pytest.approx(again.mc_dropout, rel=1e-6)
