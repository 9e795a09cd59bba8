"""After training of tables, texts and labels: files take raw numbers and codes, and give values in original units."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpo import data
from hpo.errors import StudyError
from hpo.final import train as final
from hpo.final.after import files, report, trained
from hpo.final.after.deployed import Deployed
from hpo.final.after.trained import Trained

ROWS = 160


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def houses(folder: Path) -> None:
    """Prices, with a missing size in every tenth row, and with a town that the training part lacks."""
    draws = np.random.default_rng(0)
    sizes, towns = draws.uniform(30, 200, ROWS), draws.integers(0, 3, ROWS)
    rows = [
        [
            "" if row % 10 == 0 else f"{size:.1f}",
            int(row % 5),
            ["Zug", "Bern", "Biel"][town],
            f"{5000 * size + 9e4 * town:.0f}",
        ]
        for row, (size, town) in enumerate(zip(sizes, towns, strict=True))
    ]
    write(folder / "data.csv", ["size", "rooms", "town", "price"], rows)


def reviews(folder: Path) -> None:
    rows = [
        [f"the film number {row % 7} is {('great', 'dull')[row % 2]}", ("good", "bad")[row % 2]] for row in range(ROWS)
    ]
    write(folder / "data.csv", ["review", "verdict"], rows)


def flags(columns: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        values = np.random.default_rng(1).normal(size=(ROWS, 4)).astype(np.float32)
        targets = (values[:, :columns] > 0).astype(np.int64)
        np.savez(folder / "data.npz", inputs=values, targets=targets[:, 0] if columns == 1 else targets)

    return make


TABLE = 'name = "table"\npath = "data.csv"\ntarget = "price"\nmissing = "mean"'
TEXT = 'name = "text"\npath = "data.csv"\ncolumn = "review"\ntarget = "verdict"\nlength = 16'
ARRAYS = 'name = "npz"\npath = "data.npz"\ntask = '
MLP, CNN = 'name = "mlp"\nwidths = [8]', 'name = "cnn1d"\nchannels = [8, 8]'


def train(folder: Path, make: Callable[[Path], None], section: str, model: str, metric: str = "loss") -> Trained:
    """Train two epochs and return what `hpo train` leaves."""
    make(folder)
    (folder / "best.toml").write_text(
        f'name = "tried"\nmetric = "{metric}"\n[data]\n{section}\n[model]\n{model}\n'
        '[training]\nepochs = 2\n[optimizer]\nname = "adamw"\nlr = 0.01\n'
    )
    training = final.prepare(folder / "best.toml")
    final.train(training, folder / "run", stop=lambda: False, progress=lambda result: None, before_test=lambda: None)
    return trained.load(folder / "run", folder)


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("houses"), houses, TABLE, MLP)


def last(run: Trained) -> dict[str, float]:
    """The metrics of the epoch whose weights were kept, as the training wrote them."""
    found: dict[str, float] = run.metrics["history"][run.metrics["epoch"] - 1]
    return found


@torch.no_grad()
def predicted_by_hand(run: Trained, inputs: dict[str, Tensor]) -> Tensor:
    """Return prices, computed with the statistics in metrics.json."""
    told = run.metrics
    numbers = (inputs["numbers"] - torch.tensor(told["mean"]["numbers"])) / torch.tensor(told["std"]["numbers"])
    numbers = torch.where(inputs["numbers"].isnan(), 0.0, numbers)
    outputs = run.model(inputs | {"numbers": numbers})
    return outputs * torch.tensor(told["target_std"]) + torch.tensor(told["target_mean"])


def test_files_of_a_table_take_raw_numbers_and_codes_and_give_original_units(priced: Trained, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = report.make(priced, [], tmp_path, passes=None, formats=["pt2", "onnx"])
    assert (made.refused, [one.file for one in made.variants[0].files]) == ([], ["trained.pt2", "trained.onnx"])
    score = made.variants[0].score
    assert (score.accuracy, score.agreement, made.variants[0].interval) == (None, None, None)
    assert score.loss == pytest.approx(last(priced)["validation_loss"], rel=1e-5)
    towns = priced.metrics["encoding"]["categories"]["town"]
    assert towns == ["Bern", "Biel", "Zug"]
    rows = [(80.5, 3, "Zug"), (float("nan"), 2, "Bern"), (120.0, 4, "Basel")]  # a missing size, a town never seen
    codes = [towns.index(town) + 1 if town in towns else 0 for *_, town in rows]
    new = {
        "numbers": torch.tensor([row[:2] for row in rows], dtype=torch.float32),
        "categories": torch.tensor(codes)[:, None],
    }
    expected = predicted_by_hand(priced, new)
    assert expected.shape == (3, 1)
    assert bool((expected > 10_000).all())  # prices, not standardised values
    for inputs in (new, dict(reversed(new.items()))):  # the order of names does not matter
        found = torch.export.load(tmp_path / "trained.pt2").module()(inputs)
        assert torch.allclose(found, expected, rtol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "trained.onnx", providers=["CPUExecutionProvider"])
    assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [
        ("numbers", "tensor(float)", [2]),
        ("categories", "tensor(int64)", [1]),
    ]
    assert [one.name for one in session.get_outputs()] == ["predictions"]
    (found,) = session.run(None, {name: one.numpy() for name, one in new.items()})
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-5)
    told = json.loads(session.get_modelmeta().custom_metadata_map[files.RECEIPT])
    assert told["input"] == "numbers float32 ['batch', 2]; categories int64 ['batch', 1]"
    assert (told["task"], told["targets"], told["encoding"]) == ("regression", ["price"], priced.metrics["encoding"])


class Differing(nn.Module):
    """A model whose exported graph gives predictions that are half a standard deviation too high."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["numbers"].mean(1, keepdim=True) + 0.5 * torch.compiler.is_exporting()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1e-6), (1e6, 50.0)])
def test_a_file_is_compared_in_standard_deviations_of_the_target(
    priced: Trained, tmp_path: Path, mean: float, std: float
) -> None:
    splits = replace(priced.training.splits, target_mean=torch.tensor([mean]), target_std=torch.tensor([std]))
    inputs = data.each(data.head(splits.validation.inputs, 8), Tensor.cpu)
    with pytest.raises(StudyError, match="its outputs differ from the model's by"):
        files.export(Deployed(Differing(), splits).eval(), inputs, tmp_path / "model.pt2", {}, is_coarse=False)
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_several_targets_is_the_training_s(tmp_path: Path) -> None:
    """Each target has its own unit: the error is the mean over the targets, as in training."""
    draws = np.random.default_rng(2).normal(size=(ROWS, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=draws, targets=draws[:, :2] * np.array([1000.0, 0.01]))
    run = train(tmp_path, lambda folder: None, f'{ARRAYS}"regression"', MLP, "rmse")
    made = report.make(run, [], tmp_path / "out", passes=None, formats=[])
    assert made.variants[0].score.rmse == pytest.approx(last(run)["validation_rmse"], rel=1e-5)


CASES: dict[str, tuple[Callable[[Path], None], str, str, bool]] = {  # whether the accuracy has an interval
    "tokens": (reviews, TEXT, CNN, True),
    "binary": (flags(1), f'{ARRAYS}"binary"', MLP, True),
    "multilabel": (flags(3), f'{ARRAYS}"multilabel"', MLP, False),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_training_s_and_a_file_takes_what_the_source_gives(case: str, tmp_path: Path) -> None:
    make, section, model, has_interval = CASES[case]
    run = train(tmp_path, make, section, model)
    made = report.make(run, [], tmp_path / "out", passes=None, formats=["pt2"])
    (variant,) = made.variants
    assert made.refused == []
    assert variant.score.accuracy == last(run)["validation_accuracy"]
    assert variant.score.loss == pytest.approx(last(run)["validation_loss"], rel=1e-5)
    assert (variant.interval is not None) == has_interval
    part = run.training.splits.validation
    assert isinstance(part.inputs, Tensor)
    logits = torch.export.load(tmp_path / "out" / "trained.pt2").module()(part.inputs.cpu())
    targets = part.targets.cpu()
    hits = logits.argmax(1) == targets if case == "tokens" else (logits > 0) == targets
    assert hits.double().mean().item() == pytest.approx(variant.score.accuracy)


def test_a_new_text_is_encoded_with_what_the_training_left(tmp_path: Path) -> None:
    run = train(tmp_path, reviews, TEXT, CNN)
    told = run.metrics["encoding"]
    assert (told["level"], told["lower"], told["length"]) == ("word", True, 16)
    words = {word: code for code, word in enumerate(told["words"], start=2)}
    by_hand = [words.get(word, 1) for word in ["the", "film", "number", "3", "is", "great"]]
    splits = run.training.splits
    lines = {tuple(row) for row in splits.train.inputs.tolist()}
    assert (*by_hand, *[0] * 10) in lines
