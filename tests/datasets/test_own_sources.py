"""Sources of a user's own: each kind of inputs, and tensors that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hpo import data
from hpo.data import Source, Splits, Stored, select
from hpo.data import stored as storing
from hpo.data.split import parted
from hpo.train.inputs import Batch, prepared

ROWS = 60
CLASSES = torch.arange(ROWS) % 3
RANDOM = torch.Generator().manual_seed(0)
REALS = torch.randn(ROWS, 3, generator=RANDOM)
CODES = torch.randint(0, 9, (ROWS, 4), generator=RANDOM)
PIXELS = torch.randint(0, 255, (ROWS, 3, 2, 2), dtype=torch.uint8, generator=RANDOM)


def own(inputs: Any, **more: Any) -> Source:
    return Source(**({"inputs": inputs, "targets": CLASSES, "num_classes": 3} | more))


def load(source: Source) -> Splits:
    return data.load(source, split_seed=0, device="cpu")


def training(source: Source) -> Batch:
    """Return the standardised inputs of the training part."""
    splits = load(source)
    return prepared(splits.train, splits, torch.float32).take(torch.arange(len(splits.train.targets)))


def assert_standardised(values: Tensor) -> None:
    by_channel = values.double().transpose(0, 1).flatten(1) if values.ndim > 1 else values.double()[None]
    assert torch.allclose(by_channel.mean(1), torch.zeros(()).double(), atol=1e-6)
    assert torch.allclose(by_channel.std(1, correction=0), torch.ones(()).double(), atol=1e-5)


def test_named_tensors_of_any_type_and_shape_are_taken() -> None:
    found = training(
        own(
            {
                "picture": PIXELS,
                "age": REALS[:, 0] * 9 + 40,
                "exact": REALS.double() + 7,
                "sound": REALS[:, :, None] + torch.arange(5),
                "flags": REALS > 0,
                "counts": PIXELS[:, 0, 0],
                "codes": CODES - 4,
            }
        )
    )
    assert isinstance(found, dict)
    for name in ("picture", "age", "exact", "sound"):
        assert found[name].dtype == torch.float32
        assert_standardised(found[name])
    assert {found[name].dtype for name in ("flags", "counts", "codes")} == {torch.bool, torch.uint8, torch.int64}


def test_tokens_and_categories_without_a_fit_are_coded_by_the_training_part() -> None:
    is_train = torch.isin(torch.arange(ROWS), parted(own(REALS), 0)[0])
    rare = torch.where(is_train, CODES[:, 0] * 10**15, 7)  # 7 is in validation and test alone
    splits = load(own({"categories": torch.stack([rare, CLASSES], 1)}))
    seen = sorted({0, *rare[is_train].tolist()})
    assert splits.categories == (len(seen), 3)
    assert splits.train.inputs["categories"][:, 0].tolist() == [seen.index(one) for one in rare[is_train].tolist()]
    assert splits.validation.inputs["categories"][:, 0].unique().tolist() == [0]
    assert splits.about == {"categories": {"1": seen[1:], "2": [1, 2]}}
    tokens = load(own(torch.where(is_train[:, None], CODES, 8)))
    assert (tokens.vocabulary, tokens.about["level"]) == (9, "code")
    test = data.load_test(own(torch.where(is_train[:, None], CODES, 500)), split_seed=0, device="cpu")
    assert test.inputs.unique().tolist() == [1]


def test_a_stored_source_gives_what_a_resident_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "CHUNK", 60)  # five rows at a time
    rows = torch.arange(ROWS).flip(0)
    resident = training(own(REALS[rows]))
    stored = Stored(store=REALS, rows=rows)
    assert torch.equal(training(own(stored)), resident)
    assert torch.equal(training(select(own(stored), resident=False)), resident)
    bad = REALS.clone()
    bad[52, 1] = torch.inf
    with pytest.raises(ValueError, match=r"inputs\[7, 1\] is inf; give finite numbers"):
        own(Stored(store=bad, rows=rows))


def test_targets_of_the_test_part_are_standardised_by_the_training_part() -> None:
    source = own(REALS, targets=REALS[:, :2].exp() * 50, task="regression", num_classes=0)
    splits, rows = load(source), parted(source, 0)[2]
    test = data.load_test(source, split_seed=0, device="cpu")
    assert torch.allclose(test.targets * splits.target_std + splits.target_mean, source.targets[rows])


def test_a_spread_of_a_few_float32_steps_is_no_constant() -> None:
    steps = torch.arange(ROWS) % 10 * 64.0
    columns = torch.stack([1e9 + steps, torch.full((ROWS,), 0.1)], 1)
    splits = load(own(columns, targets=columns[:, :1], task="regression", num_classes=0))
    rows = parted(own(columns, targets=columns[:, :1], task="regression", num_classes=0), 0)[0]
    spread = steps[rows].std(correction=0)
    assert torch.allclose(splits.std, torch.stack([spread, torch.tensor(1.0)]))
    assert splits.mean[1] == torch.tensor(0.1)
    assert torch.allclose(splits.target_std, spread)


def test_measured_images_are_shown_between_black_and_white(tmp_path: Path) -> None:
    source = own(REALS[:, :1, None, None].expand(-1, 1, 2, 2) * 1000 + CLASSES.view(-1, 1, 1, 1) * 2000)
    splits = load(source)
    shown = torch.tensor(data.overview(source, splits, split_seed=0).examples)
    first = [splits.train.inputs[splits.train.targets == one][0, 0, 0, 0] for one in range(3)]
    expected = ((torch.stack(first) - splits.mean) / (4 * splits.std) + 0.5).clamp(0, 1)
    assert torch.allclose(shown[:, 0, 0], expected)
    data.contact_sheet(splits, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 10


def test_a_row_of_a_table_keeps_its_place_when_classes_are_chosen() -> None:
    source = own({"numbers": REALS}, place=lambda row: f"a.csv, row {row + 2}")
    chosen = select(source, classes=[2, 1])
    assert [chosen.placed(row) for row in (0, 1, 2)] == ["a.csv, row 3", "a.csv, row 4", "a.csv, row 6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {}}, "inputs are an empty dict; give at least one tensor"),
        ({"inputs": REALS.numpy()}, r"inputs are a ndarray; give a tensor, such as torch.from_numpy\(array\)"),
        ({"inputs": {"a": np.zeros((ROWS, 1))}}, "a are a ndarray"),
        ({"inputs": {"a.b": REALS}}, "inputs by name: 'a.b' has a dot or is empty"),
        ({"inputs": {"a": REALS.to(torch.complex64)}}, "a are torch.complex64; give real and imaginary parts"),
        ({"inputs": CODES - 1}, r"inputs\[[0-9]+, [0-9]\] is -1; give codes from 0"),
        ({"inputs": {"categories": CODES - 1}}, r"categories\[[0-9]+, [0-9]\] is -1; give codes from 0"),
        ({"task": "classes"}, "task = 'classes': write one of classification, binary, multilabel, regression"),
        ({"task": "regression", "targets": REALS[:, :0]}, r"targets have shape \[60, 0\] beside 60 inputs"),
        ({"task": "regression", "targets": REALS, "target_names": ("a",)}, r"target_names are \['a'\]; give 3"),
        ({"task": "multilabel", "targets": REALS > 0, "classes": ("a",)}, r"classes are \['a'\]; give 3, one for each"),
        ({"task": "binary", "targets": REALS[:, :1] > 0, "classes": ("a",)}, r"classes are \['a'\]; give 2"),
        (
            {"validation_inputs": CODES[:, :3], "validation_targets": CLASSES},
            r"validation_inputs are torch.int64 \[3\] a row, inputs torch.float32 \[3\]; bring both to one type and shape",
        ),
    ],
)
def test_what_no_model_could_take_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(**({"inputs": REALS} | changes))


@pytest.mark.parametrize(
    ("inputs", "fitted", "message"),
    [
        (
            REALS,
            {"transform": lambda rows: rows[1:]},
            "fit: its transform made 41 rows of 42; return each row in its place",
        ),
        (CODES, {"vocabulary": 8}, "fit: codes go from 0 to 8, and vocabulary = 8; codes go from 0 to that number - 1"),
        ({"categories": CODES}, {"categories": (9, 9, 9)}, r"fit: categories = \(9, 9, 9\) for 4 columns of codes"),
        ({"categories": CODES - 1}, {"categories": (9,) * 4}, "fit: codes go from -1 to 7"),
    ],
)
def test_an_encoding_that_loses_rows_or_names_too_few_codes_is_refused(
    inputs: Any, fitted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(own(inputs, fit=lambda _: data.Fitted(**({"transform": lambda same: same} | fitted))))


def test_tokens_beyond_any_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens go up to 8000000000000; codes go from 0 to 10,000,000"):
        load(own(CODES * 10**12))
