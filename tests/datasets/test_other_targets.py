"""Sources `npz` and `csv` with other targets than classes, and `npz` with other inputs than images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hpo import data
from hpo.data import SOURCES, Source
from tests.datasets.test_sources import kept, refused

CPU = torch.device("cpu")
ROWS = 60
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(ROWS, 3))
REALS = RANDOM.normal(size=(ROWS, 2))
NUMBERS = np.arange(ROWS) % 3
FAR = np.array([0, 0, 1e9])
FLAGS = np.stack([np.arange(ROWS) % 2 == 0, np.arange(ROWS) % 3 > 0], axis=1)


def centres() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as images, and the centre of each digit's ink: row and column."""
    images = load_digits().images[:200]
    places = np.arange(8)
    ink = images.sum((1, 2))
    rows, columns = ((images.sum(axis) * places).sum(1) / ink for axis in (2, 1))
    return images.astype(np.uint8), np.stack([rows, columns], axis=1)


def archive(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "a.npz", **arrays)
    return str(folder / "a.npz")


def test_key_points_come_from_both_formats_in_original_units(tmp_path: Path) -> None:
    images, points = centres()
    np.savetxt(tmp_path / "images.csv", images.reshape(len(images), -1), fmt="%d", delimiter=",")
    np.savetxt(tmp_path / "points.csv", points, fmt="%.17g", delimiter=",", header="row,column", comments="")
    header = ",".join(f"p{number}" for number in range(64))
    (tmp_path / "images.csv").write_text(f"{header}\n{(tmp_path / 'images.csv').read_text()}")
    options = {"images": str(tmp_path / "images.csv"), "labels": str(tmp_path / "points.csv"), "header": True}
    from_sheets = SOURCES["csv"](**options, task="regression")
    from_arrays = SOURCES["npz"](path=archive(tmp_path, x=images, y=points))
    cached = SOURCES["csv"](**options, task="regression")
    for found in (from_sheets, from_arrays, cached):
        assert (found.task, found.kind, found.outputs) == ("regression", "image", 2)
        assert torch.equal(found.inputs[:, 0], torch.from_numpy(images))
        assert np.array_equal(found.targets, points.astype(np.float32))
        splits = data.load(found, split_seed=0, device=CPU)
        assert torch.allclose(splits.train.targets.mean(0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(splits.train.targets.std(0, correction=0), torch.ones(2), atol=1e-5)
    assert from_sheets.target_names == cached.target_names == ("row", "column")
    assert len(kept()) == 1


def sheets(folder: Path, labels: list[str], **options: Any) -> Source:
    """Return images of four pixels with these labels in a file of their own."""
    (folder / "i.csv").write_text("".join(f"{row},{row},{row},{row}\n" for row in range(len(labels))))
    (folder / "l.csv").write_text("".join(f"{label}\n" for label in labels))
    return SOURCES["csv"](images=str(folder / "i.csv"), labels=str(folder / "l.csv"), **options)


def test_spreadsheets_have_other_targets(tmp_path: Path) -> None:
    yes = sheets(tmp_path, ["no", "yes", "no"], task="binary")
    assert (yes.task, yes.classes, yes.targets.flatten().tolist()) == ("binary", ("no", "yes"), [False, True, False])
    several = sheets(tmp_path, ["1,0", "0,1", "0,0"], task="multilabel")
    assert (several.classes, several.targets.tolist()) == (("1", "2"), [[True, False], [False, True], [False, False]])
    second = sheets(tmp_path, ["1,0.5", "0,1.5", "0,2.5"], task="regression", label_column=[2])
    assert (second.target_names, second.targets.flatten().tolist()) == (("2",), [0.5, 1.5, 2.5])


def test_targets_may_stand_beside_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("x,a,b,c,d,y\n0.5,1,2,3,4,9.5\n1.5,5,6,7,8,8.5\n")
    found = SOURCES["csv"](images=str(tmp_path / "i.csv"), header=True, task="regression", label_column=["x", "y"])
    assert found.inputs.flatten(1).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (found.target_names, found.targets.tolist()) == (("x", "y"), [[0.5, 9.5], [1.5, 8.5]])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            ["1", "x", "2"],
            {"task": "regression"},
            "l.csv, row 2, column 1: 'x' is not a number, which a regression predicts",
        ),
        (["1", "inf", "2"], {"task": "regression"}, "l.csv, row 2, column 1: inf is infinite"),
        (["1", "", "2"], {"task": "regression"}, "l.csv, row 2: is empty; remove it"),
        (
            ["1,2", "1,3", "1,4"],
            {"task": "regression"},
            "l.csv, row 1, column 1: is 1 in all rows, so there is nothing to",
        ),
        (["1,2", "1", "1,4"], {"task": "regression"}, "l.csv, row 2: has 1 values, the rows above have 2"),
        (["1,0", "0,2", "1,1"], {"task": "multilabel"}, "l.csv, row 2, column 2: '2' is not one of 0 and 1"),
        (["a", "b", "c"], {"task": "binary"}, 'has 3 different values; task = "binary" has 2'),
        (["a", "b", "a"], {"task": "binary"}, "has the values 'a' and 'b'; write positive = 'b' or 'a'"),
        (
            [f"{row}.5" for row in range(30)],
            {},
            'has 30 different real numbers as labels of 30 images; write task = "reg',
        ),
        (["1,2", "3,4", "5,6"], {"label_column": [1, 2]}, "label_column names 2 columns; classes stand in one"),
    ],
)
def test_bad_labels_of_spreadsheets_are_told(tmp_path: Path, labels: list[str], options: dict, message: str) -> None:
    with refused(message):
        sheets(tmp_path, labels, **options)


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "shape"),
    [
        (FEATURES, {}, "features", (ROWS, 3)),
        (FEATURES.astype(np.float16), {}, "features", (ROWS, 3)),
        ((FEATURES * 9).astype(np.int32), {"holds": "features"}, "features", (ROWS, 3)),
        (FEATURES.repeat(4, 1).reshape(ROWS, 3, 4), {"holds": "series"}, "series", (ROWS, 3, 4)),
        (FEATURES.repeat(4, 1).reshape(ROWS, 3, 4), {"holds": "image"}, "image", (ROWS, 1, 3, 4)),
        (FEATURES.repeat(64, 1).reshape(ROWS, 3, 8, 8), {}, "image", (ROWS, 3, 8, 8)),
        (FEATURES.repeat(64, 1).reshape(ROWS, 8, 8, 3), {}, "image", (ROWS, 3, 8, 8)),
        (np.arange(ROWS * 2).reshape(ROWS, 2) % 7, {"holds": "tokens"}, "tokens", (ROWS, 2)),
    ],
)
def test_arrays_hold_other_inputs(tmp_path: Path, inputs: np.ndarray, options: dict, kind: str, shape: tuple) -> None:
    found = SOURCES["npz"](path=archive(tmp_path, x=inputs, y=NUMBERS), **options)
    assert (found.kind, tuple(found.inputs.shape)) == (kind, shape)
    assert found.inputs.sum().item() == pytest.approx(inputs.astype(np.float32).sum(), rel=1e-4)
    assert (found.task, found.num_classes) == ("classification", 3)
    splits = data.load(found, split_seed=0, device=CPU)
    assert splits.kind == kind
    assert splits.vocabulary == (7 if kind == "tokens" else 0)


def test_codes_that_the_training_part_lacks_are_unknown(tmp_path: Path) -> None:
    arrays = {"x_train": [[2, 4], [5, 0]] * 8, "y_train": [0, 1] * 8, "x_val": [[3, 99], [5, 0]], "y_val": [0, 1]}
    found = SOURCES["npz"](
        path=archive(tmp_path, **{name: np.array(one) for name, one in arrays.items()}), holds="tokens"
    )
    splits = data.load(found, split_seed=0, device=CPU)
    assert (splits.vocabulary, splits.validation.inputs.tolist()) == (6, [[1, 1], [5, 0]])


@pytest.mark.parametrize(
    ("targets", "options", "task", "first"),
    [
        (REALS[:, 0], {}, "regression", REALS[0, :1].astype(np.float32).tolist()),
        (REALS, {}, "regression", REALS[0].astype(np.float32).tolist()),
        (NUMBERS, {"task": "regression"}, "regression", [0.0]),
        (FLAGS, {"task": "multilabel"}, "multilabel", [True, False]),
        (FLAGS[:, 0], {"task": "binary"}, "binary", [True]),
        (np.where(FLAGS[:, 0], "sick", "well"), {"task": "binary", "positive": "well"}, "binary", [False]),
    ],
)
def test_arrays_hold_other_targets(tmp_path: Path, targets: np.ndarray, options: dict, task: str, first: list) -> None:
    found = SOURCES["npz"](path=archive(tmp_path, x=FEATURES, y=targets), **options)
    assert (found.task, found.targets[0].tolist()) == (task, first)
    if options.get("positive"):
        assert found.classes == ("sick", "well")


def without(values: np.ndarray, place: tuple, value: float) -> np.ndarray:
    changed = values.astype(np.float64)
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": without(FEATURES, (2, 1), np.nan), "y": NUMBERS}, {}, "x[2, 1] is nan; fill it, or leave the row out"),
        ({"x": without(FEATURES, (2, 1), np.inf), "y": NUMBERS}, {}, "x[2, 1] is infinite"),
        ({"x": FEATURES + FAR, "y": NUMBERS}, {}, "x column 2 has numbers about 1e+09 that differ by about"),
        (
            {"x": FEATURES.reshape(ROWS, 3, 1).repeat(5, 2), "y": NUMBERS},
            {},
            'x is float64 [60, 3, 5], which may be series or grey images; write holds = "series" for [N, C, T], or holds',
        ),
        ({"x": np.ones((ROWS, 4), np.int64), "y": NUMBERS}, {}, 'or write holds = "features" or "tokens"'),
        (
            {"x": np.ones((ROWS, 2), np.int64) * -1, "y": NUMBERS},
            {"holds": "tokens"},
            "x[0, 0] is -1; codes of tokens go",
        ),
        ({"x": FEATURES, "y": NUMBERS}, {"holds": "tokens"}, "x is float64 [60, 3]; give whole numbers [N, L]"),
        ({"x": FEATURES, "y": NUMBERS}, {"holds": "series"}, None),
        ({"x": FEATURES, "y": without(REALS, (4, 1), np.nan)}, {}, "y[4, 1] is nan; leave the row out"),
        ({"x": FEATURES, "y": REALS * 0 + [0.5, 1]}, {"task": "regression"}, "y column 0 is 0.5 everywhere"),
        (
            {"x": FEATURES, "y": REALS[:9]},
            {"task": "regression"},
            "y is float64 [9, 2] beside 60 x; give numbers [N] or [N, T]",
        ),
        ({"x": FEATURES, "y": FLAGS * 2}, {"task": "multilabel"}, "y[0, 0] is 2; a multilabel target is 0 and 1"),
        ({"x": FEATURES, "y": FLAGS | True}, {"task": "multilabel"}, "y column 0 is 1 everywhere, so there is nothing"),
        ({"x": FEATURES, "y": FLAGS}, {}, 'give each image one label, or write task = "multilabel" or "regression"'),
        ({"x": FEATURES, "y": NUMBERS}, {"task": "binary"}, 'y has 3 different values; task = "binary" has 2'),
        ({"x": FEATURES, "y": NUMBERS * 0}, {}, "y is 0 everywhere, so there is nothing to predict"),
    ],
)
def test_bad_arrays_are_told(tmp_path: Path, arrays: dict, options: dict, message: str | None) -> None:
    path = archive(tmp_path, **arrays)
    if message is None:
        assert SOURCES["npz"](path=path, **options).inputs.shape == (ROWS, 1, 3)
        return
    with refused(message):
        SOURCES["npz"](path=path, **options)
