"""Source `series`: arrays and tables in long form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hpo import data
from hpo.data import SOURCES
from tests.datasets.test_sources import refused

SERIES, STEPS = 40, 6
VALUES = np.random.default_rng(0).normal(size=(SERIES, 2, STEPS)).astype(np.float32)
TARGETS = VALUES.mean((1, 2)).astype(np.float64)


def long_form() -> pd.DataFrame:
    """Return VALUES with rows in the order of the steps, so series lie interleaved, and the last step first."""
    rows = [
        {
            "series": f"s{number}",
            "step": step,
            "a": VALUES[number, 0, step],
            "b": VALUES[number, 1, step],
            "kind": "even" if number % 2 == 0 else "odd",
            "mean": TARGETS[number],
            "who": number // 4,
            "share": "test" if number >= 30 else "train",
        }
        for step in reversed(range(STEPS))
        for number in range(SERIES)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (VALUES, {}),
        (VALUES.astype(np.float64), {}),
        (np.moveaxis(VALUES, 1, 2), {"channels_last": True}),
    ],
)
def test_series_of_an_archive(tmp_path: Path, inputs: np.ndarray, options: dict) -> None:
    np.savez(tmp_path / "s.npz", x=inputs, y=TARGETS)
    found = SOURCES["series"](path=str(tmp_path / "s.npz"), **options)
    assert (found.kind, found.task, found.placed(3)) == ("series", "regression", f"{tmp_path}/s.npz, x[3]")
    assert np.array_equal(found.inputs, VALUES)
    assert np.array_equal(found.targets[:, 0], TARGETS.astype(np.float32))


def test_series_of_one_channel_and_of_named_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", waves=VALUES[:, 0], kinds=np.arange(SERIES) % 3, more=VALUES)
    found = SOURCES["series"](path=str(tmp_path / "s.npz"), inputs="waves", targets="kinds")
    assert np.array_equal(found.inputs, VALUES[:, :1])
    assert (found.task, found.num_classes, found.notes) == ("classification", 3, ("arrays left out: more",))


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_series_in_long_form(tmp_path: Path, name: str) -> None:
    table = long_form()
    if name.endswith("csv"):
        table.to_csv(tmp_path / name, index=False)
    else:
        table.to_parquet(tmp_path / name)
    options = {"path": str(tmp_path / name), "id": "series", "channels": ["a", "b"]}
    found = SOURCES["series"](**options, step="step", target="mean", group="who")
    assert np.array_equal(found.inputs, VALUES)
    assert np.array_equal(found.targets[:, 0], TARGETS.astype(np.float32))
    assert found.groups.tolist() == [number // 4 for number in range(SERIES)]
    assert found.placed(1).endswith(f"{name}, row {3 if name == 's.csv' else 2}")
    as_written = SOURCES["series"](**options, target="kind", part="share")
    assert np.array_equal(as_written.inputs, VALUES[:30, :, ::-1])
    assert (as_written.classes, len(as_written.test_targets)) == (("even", "odd"), 10)
    splits = data.load(found, split_seed=0, device=torch.device("cpu"))
    assert splits.mean.shape == (2,)
    assert torch.allclose(splits.mean, splits.train.inputs.mean((0, 2)), atol=1e-6)


STEPPED = "s,t,v,y\na,0,1,0\na,1,2,0\nb,0,3,1\nb,1,4,1\n"
NAMES = {"id": "s", "step": "t", "target": "y"}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            STEPPED + "b,2,5,1\nc,0,1,1\nc,1,1,1\n",
            NAMES,
            "row 4: series 'b' has 3 steps, and most have 2; cut or fill them",
        ),
        (
            STEPPED + "b,1,5,1\n",
            NAMES,
            "row 6, column 2 (t): step '1' of this series is in row 5 already; remove one of both",
        ),
        (
            STEPPED.replace("b,1,4,1", "b,1,4,0"),
            NAMES,
            "row 5, column 4 (y): '0' follows '1' of row 4 within the series 'b'; give all rows of a series the same value",
        ),
        (STEPPED.replace("b,1,4", "b,1,"), NAMES, "row 5, column 3 (v): is missing; series have a value at each step"),
        (STEPPED.replace("b,1,4", "b,1,x"), NAMES, "row 5, column 3 (v): 'x' is not a number"),
        (STEPPED.replace("1,4,", "1,inf,"), NAMES, "row 5, column 3 (v): 'inf' is infinite"),
        (STEPPED.replace("b,1", ",1"), NAMES, "row 5, column 1 (s): is missing; name the series of each row"),
        ("s,t,v,y\na,0,1,0\na,1,2,0\n", NAMES | {"task": "regression"}, "column 4 (y): is '0' in all training rows"),
        (
            STEPPED,
            NAMES | {"step": "y"},
            "step = 'y': this column has another use; name the column that orders the rows",
        ),
        (STEPPED, NAMES | {"channels": ["y"]}, "column 'y' is named by channels and by another option; remove one"),
        (STEPPED, NAMES | {"part": "v"}, "'1' is not the name of a part"),
        (STEPPED, {"target": "y"}, "is a table, so write id = the name of the column that tells series apart"),
        (STEPPED, {"id": "s"}, "is a table, so write target = the name of the column to predict"),
    ],
)
def test_bad_series_are_told_by_row_and_column(tmp_path: Path, text: str, options: dict, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with refused(message):
        SOURCES["series"](path=str(tmp_path / "s.csv"), **options)


def with_one(value: float) -> np.ndarray:
    return np.where(np.arange(VALUES.size).reshape(VALUES.shape) == 9, value, VALUES.astype(np.float64))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (with_one(np.nan), TARGETS, "x[0, 1, 3] is nan; fill it, or leave the row out"),
        (with_one(np.inf), TARGETS, "x[0, 1, 3] is infinite"),
        (with_one(1e200), TARGETS, "x[0, 1, 3] is beyond 3.4e+38, the largest number of float32"),
        (VALUES[:, :, :, None], TARGETS, "x is float32 [40, 2, 6, 1]; give numbers [N, C, T] or [N, T]"),
        (np.array([VALUES[0], VALUES[0, :1]] * 20, dtype=object), TARGETS, "bring all to one shape"),
        (VALUES, np.where(TARGETS[2] == TARGETS, np.nan, TARGETS), "y[2] is nan; leave the row out"),
        (VALUES, np.where(TARGETS[2] == TARGETS, -np.inf, TARGETS), "y[2] is infinite"),
        (VALUES, TARGETS[:-1], "y is float64 [39] beside 40 x; give numbers [N] or [N, T]"),
        (VALUES + 1e8, TARGETS + 1e9, "y has numbers about 1e+09 that differ by about"),
    ],
)
def test_bad_arrays_of_series_are_told(tmp_path: Path, inputs: np.ndarray, targets: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "s.npz", x=inputs, y=targets)
    with refused(message):
        SOURCES["series"](path=str(tmp_path / "s.npz"))


def test_an_archive_names_groups_and_times(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=VALUES, y=TARGETS, who=np.arange(SERIES) // 2, when=np.arange(SERIES)[::-1])
    found = SOURCES["series"](path=str(tmp_path / "s.npz"), group="who", time="when")
    assert found.groups is not None
    assert found.times is not None
    assert found.groups.unique_consecutive().numel() == SERIES // 2
    assert found.times.tolist() == list(range(SERIES))[::-1]


def test_options_of_the_other_form_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=VALUES, y=TARGETS)
    (tmp_path / "s.csv").write_text(STEPPED)
    with pytest.raises(
        ValueError, match=r"^step is for CSV and Parquet files, and this is an archive of arrays; remove it"
    ):
        SOURCES["series"](path=str(tmp_path / "s.npz"), step="t")
    with pytest.raises(ValueError, match=r"^group = 3: write the name of an array"):
        SOURCES["series"](path=str(tmp_path / "s.npz"), group=3)
    with pytest.raises(ValueError, match=r"^inputs is for archives of arrays; remove it"):
        SOURCES["series"](path=str(tmp_path / "s.csv"), inputs="x", id="s", target="y")
