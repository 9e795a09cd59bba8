"""The study files in examples/ are read, warned of nothing, and train."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch

from hpo import data
from hpo.spec import space
from hpo.spec.space import Choices
from hpo.spec.training import TrainConfig
from hpo.strategy.lint import lint
from hpo.study import resolve
from hpo.train import loop
from hpo.train.build import assemble
from tests.integration.test_commands import Shell, shell

__all__ = ["shell"]  # a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"
LIBRARIES = {"lightning_objective": ("lightning", 15), "transformers_objective": ("transformers", 6)}  # and epochs
FILES = [file for file in sorted(EXAMPLES.glob("*.toml")) if file.stem not in LIBRARIES]  # those need an extra


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_study_file_is_read_without_a_warning(file: Path) -> None:
    spec = resolve.read(file).spec
    assert spec.is_pinned == (file.stem == "transfer_source")
    assert lint(spec) == []


def test_every_model_optimizer_and_schedule_of_the_large_search_trains() -> None:
    found = resolve.read(EXAMPLES / "digits_large.toml")
    tree, device = found.spec.tree, torch.device("cpu")
    named = {
        path: one.options for path, one in space.parameters(tree) if path.endswith(".name") and isinstance(one, Choices)
    }
    assert {"model.name", "optimizer.name", "schedule.name"} <= named.keys()
    part = TrainConfig.from_tree(space.middle(tree, {}))
    splits = assemble.load_splits(part, 0, found.code_folder, device)
    few = data.Split(inputs=splits.train.inputs[:256], targets=splits.train.targets[:256])
    splits = dataclasses.replace(splits, train=few)
    for number in range(max(map(len, named.values()))):
        taken = {
            path: next(itertools.islice(itertools.cycle(options), number, None)) for path, options in named.items()
        }
        config = TrainConfig.from_tree(space.middle(tree, taken))
        run = assemble.build_run(config, splits, number, found.code_folder, device)
        result = next(loop.train(run))
        assert math.isfinite(result.train_loss), taken


def shorten(file: Path, epochs: int) -> None:
    text = file.read_text()
    assert "epochs = 20\n" in text
    file.write_text(text.replace("epochs = 20\n", f"epochs = {epochs}\n"))


def test_what_one_training_left_is_searched_on_by_another(shell: Shell) -> None:
    for name in ("transfer_source.toml", "transfer.toml"):
        shutil.copy(EXAMPLES / name, shell.folder)
    shorten(shell.folder / "transfer_source.toml", epochs=2)
    shell.forked("train", "transfer_source.toml", "-o", "runs/source")
    checked = shell.forked("check", "transfer.toml")
    assert "12 tensors loaded; new: 10.weight, 10.bias" in checked
    assert "no warnings" in checked
    shorten(shell.folder / "transfer.toml", epochs=2)
    shell.search("transfer.toml", "transfer", "--trials", "2")
    shell.forked("export", "transfer", "-o", "best.toml")
    assert "bit for bit" in shell.forked("train", "best.toml", "--replay")


@pytest.mark.parametrize("stem", LIBRARIES)
def test_the_objectives_of_other_libraries_report_each_epoch(shell: Shell, stem: str) -> None:
    package, epochs = LIBRARIES[stem]
    if importlib.util.find_spec(package) is None:  # importing it here would take seconds
        pytest.skip(f"needs {package}")
    shell.forked("run", str(EXAMPLES / f"{stem}.toml"), "--trials", "1", "--workers", "1")
    (trial,) = shell.trials(stem.replace("_", "-"))
    assert trial.state.is_finished()
    assert (trial.value or 0.0) > 0.6
    assert sorted(trial.intermediate_values) == list(range(epochs))
