"""`hpo init --from`: a study file for data that it has looked at, which is read without a warning and trains."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits, load_wine

from hpo.errors import SpecError
from hpo.spec import space
from hpo.spec.training import TrainConfig
from hpo.strategy.lint import lint
from hpo.study import resolve
from hpo.train import loop
from hpo.train.build import assemble
from hpo.train.draft.draft import draft
from hpo.train.draft.page import Line

CPU = torch.device("cpu")


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def patients(folder: Path) -> Path:
    """Return a table with an identifier, dates, categories and missing values."""
    found = load_diabetes(scaled=False)
    rows = [
        [f"P{row}", f"2020-01-{1 + row % 28:02d}", *values, "f" if values[1] > 1 else "m", target]
        for row, (values, target) in enumerate(zip(found.data.tolist(), found.target.tolist(), strict=True))
    ]
    for row in rows[::17]:
        row[4] = ""
    return write(folder / "patients.csv", ["patient", "seen", *found.feature_names, "gender", "progression"], rows)


def wine(folder: Path) -> Path:
    found = load_wine()
    rows = [[*values, f"grower {target}"] for values, target in zip(found.data, found.target, strict=True)]
    return write(folder / "wine.csv", [*found.feature_names, "label"], rows)


def texts(folder: Path) -> Path:
    rows = [
        [f"the film is {('great', 'dull')[row % 2]} says person {row}", ("good", "bad")[row % 2]] for row in range(90)
    ]
    return write(folder / "texts.csv", ["review", "label"], rows)


def points(folder: Path) -> Path:
    images = load_digits().images[:200].astype(np.uint8)
    np.savez(folder / "points.npz", images=images, targets=images.mean(1)[:, :2].astype(np.float32))
    return folder / "points.npz"


def series(folder: Path) -> Path:
    labels = np.arange(90) % 3
    steps = np.arange(40) * (0.1 + 0.2 * labels[:, None])
    np.savez(folder / "series.npz", x=np.stack([np.sin(steps), np.cos(steps)], 1).astype(np.float32), y=labels)
    return folder / "series.npz"


def photos(folder: Path) -> Path:
    root = folder / "photos"
    for number in range(40):
        place = root / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 34), number % 2 * 100 + number).save(place / f"{number}.png")
    return root


#: Data, the column to predict, and what the draft must say.
CASES: dict[str, tuple[Callable[[Path], Path], str | None, dict[str, Any]]] = {
    "a table to regress": (
        patients,
        "progression",
        {"metric": "rmse", "data.drop": ["patient", "seen"], "data.missing": "indicator", "model.name": "mlp"},
    ),
    "a table of classes": (wine, None, {"metric": "accuracy", "data.target": "label", "data.name": "table"}),
    "texts": (texts, None, {"data.name": "text", "data.column": "review", "model.name": "cnn1d"}),
    "points on images": (points, None, {"metric": "rmse", "data.name": "npz", "model.name": "mlp"}),
    "series": (series, None, {"metric": "accuracy", "data.name": "series", "model.name": "cnn1d"}),
    "photos": (photos, None, {"data.size": 32, "data.colour": "grey", "model.name": "cnn"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_draft_is_read_without_a_warning_and_trains(case: str, tmp_path: Path) -> None:
    make, target, expected = CASES[case]
    text = draft("drafted", make(tmp_path), target, tmp_path)
    file = tmp_path / "drafted.toml"
    file.write_text(text)
    written = tomllib.loads(text)
    for path, value in expected.items():
        section, _, key = path.rpartition(".")
        assert (written[section] if section else written)[key] == value, path
    found = resolve.read(file)
    assert lint(found.spec) == []
    config = TrainConfig.from_tree(space.middle(found.spec.tree, {}))
    splits = assemble.load_splits(config, 0, found.code_folder, CPU)
    run = assemble.build_run(config, splits, 0, found.code_folder, CPU)
    assert written["metric"] in {name.removeprefix("validation_") for name in next(loop.train(run)).numbers}


def test_every_column_that_is_left_out_has_its_reason(tmp_path: Path) -> None:
    text = draft("drafted", patients(tmp_path), "progression", tmp_path)
    assert "# patient: has 442 different texts in 442 rows" in text
    assert "seen: '2020-01-01' is a date, which no model takes" in text
    assert "# values are missing (bmi 26): a number becomes the mean, beside a column that says so\n" in text


def test_reasons_say_what_becomes_of_each_column(tmp_path: Path) -> None:
    """Reasons name what is done with missing categories and mixed columns, and nothing of columns that are left out."""
    rows = [
        [
            f"P{row}" if row % 9 else "",
            "?" if row == 5 else row % 11,
            "" if row % 8 == 0 else "ab"[row % 2],
            row * row % 7,
        ]
        for row in range(200)
    ]
    names = ["code", "dose", "side\n[budget]\ntrials = 1", "label"]
    text = draft("drafted", write(tmp_path / "d.csv", names, rows), None, tmp_path)
    written = tomllib.loads(text)  # a column's name stays within its comment
    assert written["budget"] == {"trials": 64}
    assert written["data"]["drop"] == ["code", "dose"]
    assert "dose: '?' is not a number (the column has 199 numbers; correct it, name the text in missing_values" in text
    assert "# values are missing (side\\n[budget]\\ntrials = 1 25): a category becomes code 0\n" in text


def test_several_labels_in_an_archive_need_no_option(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.savez(tmp_path / "labels.npz", inputs=values, targets=values[:, :3] > 0)
    written = tomllib.loads(draft("drafted", tmp_path / "labels.npz", None, tmp_path))
    assert (written["metric"], written["data"]["name"], written["data"]["task"]) == ("macro_f1", "npz", "multilabel")


def test_the_length_of_texts_is_theirs(tmp_path: Path) -> None:
    assert tomllib.loads(draft("drafted", texts(tmp_path), None, tmp_path))["data"]["length"] == 16
    long = [[f"{'word ' * (300 if row == 0 else 40)} {row}", "ab"[row % 2]] for row in range(90)]
    text = draft("drafted", write(tmp_path / "long.csv", ["text", "label"], long), None, tmp_path)
    assert tomllib.loads(text)["data"]["length"] == 41
    assert "# tokens; 95 % of the texts have at most 41, the longest one has 301" in text


def test_a_table_whose_rows_may_be_images_tells_the_other_reading(tmp_path: Path) -> None:
    pixels, labels = load_digits(return_X_y=True)
    rows = [[*values, label] for values, label in zip(pixels[:300].astype(int), labels, strict=False)]
    text = draft("drafted", write(tmp_path / "d.csv", [*map(str, range(64)), "label"], rows), None, tmp_path)
    assert '# as images of 8x8 pixels instead: name = "csv", images = "d.csv", label_column = "label"' in text


def test_rare_classes_are_judged_by_a_metric_that_sees_them(tmp_path: Path) -> None:
    rows = [[row, row * row % 7, "rare" if row % 10 == 0 else "usual"] for row in range(200)]
    text = draft("drafted", write(tmp_path / "d.csv", ["a", "b", "label"], rows), None, tmp_path)
    assert tomllib.loads(text)["metric"] == "balanced_accuracy"


WRONG: dict[str, tuple[str, str | None, str]] = {
    "no such file": ("none.csv", None, "--from .*none.csv: does not exist"),
    "another ending": ("code.py", None, r"name a folder of images, or a file that ends in \.csv"),
    "no images": ("empty", None, "holds no image files"),
    "no usual name": ("plain.csv", None, "no column has a usual name .* --target; the columns are a, b"),
    "two usual names": ("two.csv", None, "several columns may be the one to predict; name it with --target"),
    "no such column": ("plain.csv", "c", "target = 'c': there is no such column; its columns are a, b"),
    "no column to learn from": (
        "commas.csv",
        None,
        r"column a: '1,5' has a comma \(write numbers with a decimal point alone",
    ),
    "a target of an archive": ("x.npz", "c", "is no table"),
    "no archive": ("x.npz", None, "cannot be read as an archive of arrays"),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_cannot_be_used_is_told(case: str, tmp_path: Path) -> None:
    name, target, message = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "code.py").touch()
    (tmp_path / "x.npz").write_text("no archive")
    write(tmp_path / "plain.csv", ["a", "b"], [[1, 2], [2, 3]])
    write(tmp_path / "commas.csv", ["a", "label"], [["1,5", "x"], ["2,5", "y"]])
    write(tmp_path / "two.csv", ["label", "target"], [[1, 2], [2, 3]])
    with pytest.raises(SpecError, match=message):
        draft("drafted", tmp_path / name, target, tmp_path)


def test_a_long_reason_stands_above_its_line() -> None:
    assert Line("a", 1, "short").text == f"{'a = 1':<46} # short"
    assert Line("a", 1, "long " * 20).text == f"# {'long ' * 20}\na = 1"
