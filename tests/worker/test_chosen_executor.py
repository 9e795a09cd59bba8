"""Which executor trains a study: a stack where it can and where it is faster, else the loop."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hpo.spec import space
from hpo.spec.training import TrainConfig
from hpo.study import results
from hpo.train import devices
from hpo.train.build import assemble, executor
from hpo.train.build.executor import Choice
from hpo.train.stack import sizing
from hpo.worker.gpu_share import SHARE
from tests.support.declared import work
from tests.support.rows import states
from tests.support.trials import MakeStudy

CPU = torch.device("cpu")


def test_auto_leaves_a_sampler_that_learns_some_generations(make_digits: MakeStudy) -> None:
    spec = make_digits(1, slots=64).spec
    wide = Choice(executor="stack", slots=64, why="measured")
    auto = spec.model_copy(update={"slots": "auto"})
    learns = auto.model_copy(update={"sampler": {"name": "tpe"}})
    assert executor.spread(wide, learns, budget=64, fleet=2).slots == 8
    assert executor.spread(wide, auto, budget=64, fleet=2).slots == 32
    assert executor.spread(wide, spec, budget=1000, fleet=2).slots == 64
    assert executor.spread(wide, learns, budget=3, fleet=2).slots == 1
    chosen = auto.model_copy(update={"sampler": {"name": "auto", "stands_for": {"name": "fidelity_tpe"}}})
    grid = auto.model_copy(update={"sampler": {"name": "auto", "stands_for": {"name": "grid"}}})
    assert executor.spread(wide, chosen, budget=64, fleet=2).slots == 8
    assert "since fidelity_tpe learns" in executor.spread(wide, chosen, budget=64, fleet=2).why
    assert executor.spread(wide, grid, budget=64, fleet=2).slots == 32


def test_a_model_whose_first_architectures_lose_is_not_measured_further(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sizing, "SLOW_STEP_SECONDS", 0.0)  # each measured step is slow, so the loop wins
    caplog.set_level("INFO")
    widths = {"choices": [[4], [5], [6], [7], [8]]}
    grid = {
        "model": {"name": "mlp", "widths": widths},
        "sampler": {"name": "grid"},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    fast = {"training": {"epochs": 1, "batch_size": 512}, "schedule": {"name": "constant"}}
    study = make_digits(5, executor="auto", slots="auto", **grid, **fast)
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 5
    measured = [line for line in caplog.messages if line.startswith("measuring how many trials")]
    told = [line for line in caplog.messages if "no stack of the first 3 architectures of mlp was faster" in line]
    assert (len(measured), len(told)) == (3, 2)


def test_a_worker_that_shares_a_gpu_asks_for_its_part_of_the_memory(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(devices, "free_bytes", lambda _device, sharers=1: asked.append(sharers) or 2**40)
    monkeypatch.setenv(SHARE, "0.25")
    assert work(make_digits(2, slots=2)) == 0
    assert asked[-1] == 4


def test_a_model_that_cannot_be_stacked_is_trained_by_the_loop(make_digits: MakeStudy, tmp_path: Path) -> None:
    """A model that cannot be stacked is trained by the loop and check says why."""
    (tmp_path / "odd.py").write_text(ODD)
    study = make_digits(2, model={"name": "odd:odd"})
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 2
    assert {results.best(study, number=n)[0].receipt["executor"] for n in range(2)} == {"loop"}
    config = TrainConfig.from_tree(space.middle(study.spec.tree, {}))
    splits = assemble.load_splits(config, 0, tmp_path, CPU)
    choice = executor.choose(study.spec, config, splits, tmp_path, CPU)
    assert (choice.executor, choice.slots) == ("loop", 1)
    assert "cannot be trained as one model" in choice.why


ODD = """
import torch
from optuna.trial import TrialState
from torch import nn

class Odd(nn.Module):
    def __init__(self, inputs, num_classes):
        super().__init__()
        self.layer = nn.Linear(inputs, num_classes)

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        return logits if logits.sum().item() < 1e9 else -logits

def odd(input_shape, num_classes):
    return Odd(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
"""


def test_code_that_was_edited_is_checked_anew(
    make_digits: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are the same, and what their forward does with them is not."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    executor_of = []
    for name, line in (
        ("one", "pass"),
        ("two", "x = x * (1.0 if self.training else 2.0) if x.sum().item() < 1e9 else x"),
    ):
        (tmp_path / "edited.py").write_text(EDITED.format(line=line))
        for loaded in [module for module in sys.modules if "edited" in module]:
            del sys.modules[loaded]
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        study = make_digits(2, name=name, model={"name": "edited:net"})
        work(study)
        executor_of.append(results.best(study)[0].receipt["executor"])
    assert executor_of == ["stack", "loop"]


EDITED = """
from optuna.trial import TrialState
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)

    def forward(self, images):
        x = self.first(images.flatten(1)).relu()
        {line}
        return self.last(x)

def net(input_shape, num_classes):
    return Net(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
"""
