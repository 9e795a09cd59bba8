"""Source `table`: what comes out of good files, and what is said about bad ones. Nothing is cached."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from hpo import data
from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from hpo.errors import SpecError
from hpo.spec.training import Part
from hpo.train.build import registry
from tests.datasets.test_sources import refused

CPU = torch.device("cpu")
ROWS = 40


def written(folder: Path, text: str, name: str = "t.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def frame() -> pd.DataFrame:
    """Return a table with numbers, texts, flags and targets of all kinds."""
    row = np.arange(ROWS)
    return pd.DataFrame(
        {
            "age": (row * 7 % 31).astype(float),
            "size": row * 5 % 13,
            "city": np.array(["Rome", "Oslo", "Bern"])[row % 3],
            "price": row * 3 % 17 + 0.5,
            "sold": np.array(["no", "yes"])[row % 2],
            "wet": row // 2 % 2,
            "cold": row // 5 % 2,
            "who": np.array(["a", "b", "c", "d", "e"])[row % 5],
            "day": [f"2026-01-{1 + one % 28:02d}" for one in row],
            "share": np.array(["train", "train", "train", "val", "test"])[row % 5],
        }
    )


UNUSED = ["wet", "cold", "who", "day", "share"]


def table(folder: Path, found: pd.DataFrame, **options: Any) -> Source:
    found.to_csv(folder / "t.csv", index=False)
    return SOURCES["table"](path=str(folder / "t.csv"), **options)


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "task", "shape", "classes"),
    [
        (load_breast_cancer, "classification", (569, 30), ("0", "1")),
        (load_wine, "classification", (178, 13), ("0", "1", "2")),
        (load_diabetes, "regression", (442, 10), ()),
    ],
)
def test_real_tables_are_the_same_from_csv_and_from_parquet(
    tmp_path: Path, load: Any, task: str, shape: tuple, classes: tuple
) -> None:
    real = load(as_frame=True)
    real.frame.to_csv(tmp_path / "t.csv", index=False)
    real.frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        found = SOURCES["table"](path=str(tmp_path / name), target="target")
        assert (found.task, found.classes, list(found.inputs)) == (task, classes, ["numbers"])
        assert found.inputs["numbers"].shape == shape
        assert np.array_equal(found.inputs["numbers"], real.data.to_numpy(np.float32))
        assert np.array_equal(found.targets.flatten(), real.target.to_numpy(np.float32))
        splits = data.load(found, split_seed=0, device=CPU)
        assert len(splits.train.targets) + len(splits.validation.targets) + splits.test_count == shape[0]
    if task == "regression":
        assert splits.train.targets.mean().abs() < 1e-5
        restored = splits.train.targets * splits.target_std + splits.target_mean
        known = torch.from_numpy(np.unique(real.target.to_numpy(np.float32)))
        assert (restored.flatten()[:, None] - known).abs().min(1).values.max() < 1e-3


# --- columns, tasks, keys ---------------------------------------------------------------------------------------------


def test_numbers_and_categories_are_told_apart(tmp_path: Path) -> None:
    found = table(tmp_path, frame(), target="price", drop=UNUSED, categorical=["size"])
    assert (found.task, found.target_names, found.kind) == ("regression", ("price",), "table")
    assert found.inputs["numbers"].flatten().tolist() == frame()["age"].tolist()
    assert found.inputs["categories"][:4].tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 1], [4, 1, 2]]
    assert found.placed(3) == f"{tmp_path}/t.csv, row 5"
    fitted = found.fit(found.inputs)
    assert fitted.about["numbers"] == ["age"]
    sizes = [str(one) for one in range(13)]
    assert fitted.about["categories"] == {"size": sizes, "city": ["Bern", "Oslo", "Rome"], "sold": ["no", "yes"]}
    assert fitted.categories == (14, 4, 3)
    assert fitted.transform(found.inputs)["categories"][:3].tolist() == [[1, 3, 1], [6, 2, 2], [11, 1, 1]]
    again = pickle.loads(pickle.dumps(fitted.transform))
    assert torch.equal(again(found.inputs)["categories"], fitted.transform(found.inputs)["categories"])


def test_categories_come_from_the_training_part_alone(tmp_path: Path) -> None:
    found = frame()
    found.loc[found["share"] == "val", "city"] = "Lima"
    source = table(tmp_path, found, target="price", drop=["wet", "cold", "who", "day", "sold"], part="share")
    splits = data.load(source, split_seed=0, device=CPU)
    assert splits.about["categories"] == {"city": ["Bern", "Oslo", "Rome"]}
    assert splits.categories == (4,)
    assert splits.validation.inputs["categories"].tolist() == [[0]] * 8
    assert splits.train.inputs["categories"].min() == 1


@pytest.mark.parametrize(
    ("options", "task", "about", "first"),
    [
        ({"target": "sold"}, "classification", {"classes": ("no", "yes"), "num_classes": 2}, [0, 1, 0]),
        ({"target": "sold", "task": "binary"}, "binary", {"classes": ("no", "yes")}, [[False], [True], [False]]),
        (
            {"target": "sold", "task": "binary", "positive": "no"},
            "binary",
            {"classes": ("yes", "no")},
            [[True], [False], [True]],
        ),
        (
            {"target": ["wet", "cold"]},
            "multilabel",
            {"classes": ("wet", "cold"), "num_classes": 0},
            [[False, False], [False, False], [True, False]],
        ),
        ({"target": "wet", "task": "binary"}, "binary", {"classes": ("0", "1")}, [[False], [False], [True]]),
        ({"target": "size"}, "classification", {"num_classes": 13}, [0, 5, 10]),
        ({"target": "size", "task": "regression"}, "regression", {"target_names": ("size",)}, [[0], [5], [10]]),
        (
            {"target": ["price", 2]},
            "regression",
            {"target_names": ("price", "size")},
            [[0.5, 0], [3.5, 5], [6.5, 10]],
        ),
        ({"target": "city", "drop": ["size"]}, "classification", {"classes": ("Bern", "Oslo", "Rome")}, [2, 1, 0]),
    ],
)
def test_the_target_decides_the_task(tmp_path: Path, options: dict, task: str, about: dict, first: list) -> None:
    named = options["target"] if isinstance(options["target"], list) else [options["target"]]
    drop = [one for one in UNUSED if one not in named]
    found = table(tmp_path, frame(), **options | {"drop": [*drop, *options.get("drop", [])]})
    assert found.task == task
    assert {key: getattr(found, key) for key in about} == about
    assert found.targets[:3].tolist() == first


def test_a_target_that_may_be_both_is_noted(tmp_path: Path) -> None:
    notes = table(tmp_path, frame(), target="size", drop=UNUSED).notes
    assert notes == (
        'target size has 13 different whole numbers, read as classes; task = "regression" reads them as numbers',
    )
    assert table(tmp_path, frame(), target="price", drop=UNUSED).notes == (
        'target price has 17 different numbers, read as numbers; task = "classification" reads them as classes',
    )


def test_parts_groups_and_times_come_from_columns(tmp_path: Path) -> None:
    options = {"target": "sold", "drop": ["wet", "cold"], "part": "share", "time": "day"}
    found = table(tmp_path, frame(), **options, group="who", numeric=["price", "size"])
    assert [len(found.targets), len(found.validation_targets), len(found.test_targets)] == [24, 8, 8]
    assert found.inputs["numbers"].shape == (24, 3)
    assert found.groups.tolist() == [row % 5 for row in range(ROWS) if row % 5 < 3]
    assert found.times.dtype == torch.int64
    assert (found.times[1] - found.times[0]).item() == 24 * 60 * 60 * 10**6
    assert found.placed(3) == f"{tmp_path}/t.csv, row 7"


def test_groups_are_numbers_and_no_inputs(tmp_path: Path) -> None:
    found = table(tmp_path, frame(), target="price", drop=["wet", "cold", "day", "share"], group="who", time="age")
    assert found.groups.tolist() == [row % 5 for row in range(ROWS)]
    assert found.times.tolist() == frame()["age"].tolist()
    assert found.inputs["categories"].shape[1] == 2
    seconds = written(tmp_path, "x,t,y\n1,1764547201,0.5\n2,1764547200,1.5\n", "s.csv")
    assert SOURCES["table"](path=seconds, target="y", time="t").times.tolist() == [1764547201, 1764547200]


def test_files_of_their_own_are_the_parts(tmp_path: Path) -> None:
    whole = frame().drop(columns=UNUSED)
    whole[:20].to_csv(tmp_path / "a.csv", index=False)
    whole[20:30][["sold", "price", "city", "size", "age"]].to_csv(tmp_path / "b.csv", index=False)
    whole[30:].to_csv(tmp_path / "c.csv", index=False)
    paths = {"path": str(tmp_path / "a.csv"), "validation": str(tmp_path / "b.csv"), "test": str(tmp_path / "c.csv")}
    found = SOURCES["table"](**paths, target="sold", numeric=["age"])
    assert [len(found.targets), len(found.validation_targets), len(found.test_targets)] == [20, 10, 10]
    assert found.validation_inputs["numbers"][:, 0].tolist() == whole["age"][20:30].tolist()


# --- missing values ---------------------------------------------------------------------------------------------------

GAPS = "x,c,y\n1,a,0.5\n,b,1.5\n3,NA,2.5\n8,a,4.5\n"


@pytest.mark.parametrize(
    ("rule", "numbers", "names"),
    [
        ("mean", [[1.0], [float("nan")], [3.0], [8.0]], ["x"]),
        ("median", [[1.0], [3.0], [3.0], [8.0]], ["x"]),
        ("indicator", [[1.0, 0.0], [float("nan"), 1.0], [3.0, 0.0], [8.0, 0.0]], ["x", "x is missing"]),
    ],
)
def test_missing_values_follow_the_rule(tmp_path: Path, rule: str, numbers: list, names: list[str]) -> None:
    found = SOURCES["table"](path=written(tmp_path, GAPS), target="y", missing=rule)
    fitted = found.fit(found.inputs)
    new = fitted.transform(found.inputs)
    assert torch.equal(new["numbers"].nan_to_num(-1), torch.tensor(numbers).nan_to_num(-1))
    assert new["categories"].flatten().tolist() == [1, 2, 0, 1]
    assert (fitted.about["numbers"], fitted.about["missing"]) == (names, rule)


def test_texts_that_stand_for_missing_values_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "x;y\n1;0.5\n?;1.5\n3;2.5\n")
    found = SOURCES["table"](path=path, target="y", missing="mean", missing_values=["?"])
    assert found.inputs["numbers"].isnan().flatten().tolist() == [False, True, False]


# --- forms of files ---------------------------------------------------------------------------------------------------


def test_forms_of_csv_are_read(tmp_path: Path) -> None:
    quoted = '\ufeff"x"\t"the\nname"\ty\r\n +1.5e0 \t"a\tb"\t1.5\r\n\r\n.5\tc\t2.5\r\n'
    found = SOURCES["table"](path=written(tmp_path, quoted), target="y")
    assert found.inputs["numbers"].flatten().tolist() == [1.5, 0.5]
    assert found.fit(found.inputs).about["categories"] == {"the\nname": ["a\tb", "c"]}
    sizes = SOURCES["table"](path=written(tmp_path, 'c,y\n5",0.5\n7,1.5\n'), target="y", categorical=["c"])
    assert sizes.fit(sizes.inputs).about["categories"] == {"c": ['5"', "7"]}
    assert found.placed(1).endswith("t.csv, row 4")  # the row without values is counted
    bare = SOURCES["table"](path=written(tmp_path, "1,2,0.5\n3,2,1.5\n"), target=3, header=False, categorical=[2])
    assert (bare.target_names, bare.inputs["categories"].tolist()) == (("3",), [[1], [1]])
    assert bare.placed(0).endswith("t.csv, row 1")


def test_types_of_parquet_are_read(tmp_path: Path) -> None:
    pd.DataFrame(
        {
            "f": [1.0, None, 3.0],
            "i": pd.array([1, 2, 3], dtype="int8"),
            "b": [True, False, True],
            "k": pd.Categorical(["u", "v", "u"]),
            "n": [1.0, 2.0, 1.0],
            "y": [0.5, 1.5, 2.5],
        }
    ).to_parquet(tmp_path / "t.parquet")
    found = SOURCES["table"](path=str(tmp_path / "t.parquet"), target="y", categorical=["n"], missing="mean")
    assert found.inputs["numbers"].nan_to_num(-1).tolist() == [[1, 1], [-1, 2], [3, 3]]
    lists = found.fit(found.inputs).about["categories"]
    assert lists == {"b": ["false", "true"], "k": ["u", "v"], "n": ["1", "2"]}


# --- what is refused --------------------------------------------------------------------------------------------------

LONG = [f"{row},{row * 7 % 5}.5" for row in range(20)]
BAD: list[tuple[str, dict, str]] = [
    ("x,y\n1,0\n2,1\n", {"target": "z"}, "t.csv: target = 'z': there is no such column; its columns are x, y"),
    ("x,label\n1,0\n2,1\n", {"target": "labels"}, "there is no such column; did you mean 'label'?"),
    ("x,y\n1,0\n2,1\n", {"target": 3}, "target = 3: there is no such column; its columns are x, y"),
    ("x,y\n1,a\n2,a\n", {"target": "y"}, "column 2 (y): is 'a' in all training rows, so there is nothing to predict"),
    ("x,y\n1,2.5\n2,2.5\n", {"target": "y"}, "column 2 (y): is '2.5' in all training rows, so there is nothing"),
    (
        "x,y\n" + "".join(f"1.5,u{row}\n" for row in range(12)),
        {"target": "y"},
        "column 2 (y): has 12 different values in 12 rows, like an identifier; name the column that is to be predicted",
    ),
    (
        "y,x\n" + "\n".join(LONG),
        {"target": "y", "task": "regression"},
        "column 1 (y): numbers the rows, like an identifier",
    ),
    ("x,y\n1,0\n2,\n3,1\n", {"target": "y"}, "t.csv, row 3, column 2 (y): is missing; give each row a target"),
    (
        "x,y\n1,none\n2,mild\n",
        {"target": "y"},
        "row 2, column 2 (y): is missing; give each row a target, or remove the row; if 'none' is a value, "
        'write missing_values = [""]',
    ),
    (
        "x,y\n1,1.5\n2,b\n",
        {"target": "y", "task": "regression"},
        "'b' is not a number; the column has 1 number; correct it,",
    ),
    (
        "x,y\n1,0\ntwo,1\n3,1\n",
        {"target": "y"},
        "t.csv, row 3, column 1 (x): 'two' is not a number; the column has 2 numbers; correct it, name the text in "
        "missing_values if it stands for a missing value, or write categorical = ['x']",
    ),
    ("x,y\n1,0\ntwo,1\n", {"target": "y", "numeric": ["x"]}, "row 3, column 1 (x): 'two' is not a number"),
    (
        'x,y\n"1,5",0\n"2,5",1\n',
        {"target": "y", "numeric": ["x"]},
        "column 1 (x): '1,5' has a comma; write numbers with a decimal point alone, or write categorical = ['x']",
    ),
    ("x,y\n1,0\n-inf,1\n", {"target": "y"}, "row 3, column 1 (x): '-inf' is infinite; remove it, or leave it empty"),
    (
        "x,y\n1,0\n1e39,1\n",
        {"target": "y"},
        "row 3, column 1 (x): '1e39' is beyond 3.4e+38, the largest number of float32",
    ),
    ("x,y\n1,inf\n2,1\n", {"target": "y", "task": "regression"}, "row 2, column 2 (y): 'inf' is infinite"),
    (
        "x,y\n1764547200,0\n1764547201,1\n",
        {"target": "y"},
        "column 1 (x): has numbers about 1.76455e+09 that differ by about 0.5; float32, which models compute with, rounds them "
        "by up to 1; subtract 1.76455e+09 from all, or write drop = ['x']",
    ),
    ("x,y\n1,0\n,1\n", {"target": "y"}, 'row 3, column 1 (x): is missing; remove the row, or write missing = "mean"'),
    ("x,c,y\n1,a,0\n2,,1\n", {"target": "y"}, "row 3, column 2 (c): is missing"),
    (
        "x,d,y\n1,2026-01-02,0\n2,2026-02-03,1\n",
        {"target": "y"},
        "row 2, column 2 (d): '2026-01-02' is a date, which no model takes; make numbers of it, such as days since a day, "
        "or write drop = ['d']; for a split by time write time = 'd'",
    ),
    ("x,d,y\n1,3.1.2026 10:00,0\n2,4.1.2026,1\n", {"target": "y"}, "'3.1.2026 10:00' is a date, which no model takes"),
    ("x,d,y\n1,3.1.2026,0\n2,4.1.2026,1\n", {"target": "y", "time": "d"}, "are not all ISO 8601; write 2026-12-31"),
    (
        "x,d,y\n1,a,0\n2,b,1\n",
        {"target": "y", "time": "d"},
        "row 2, column 2 (d): 'a' is not a number, as the rest of this column; name a column of numbers or ISO dates",
    ),
    (
        "x,y\n1,2026-01-02\n2,2026-01-03\n",
        {"target": "y"},
        "'2026-01-02' is a date, which no model takes; make numbers of it, such as days since a day, or name another target",
    ),
    (
        "x,y\n1,1764547200\n2,1764547201\n",
        {"target": "y", "task": "regression"},
        "rounds them by up to 1; subtract 1.76455e+09 from all, or name another target",
    ),
    ("x;y\n1,5;0\n;1\n", {"target": "y"}, "row 2, column 1 (x): '1,5' has a comma; write numbers with a decimal point"),
    ("x,y\n1,0\n2,1\n", {"target": []}, "target = []: name the column to predict; its columns are x, y"),
    ("x,e,y\n1,,0\n2,,1\n", {"target": "y"}, "column 2 (e): has no values; write drop = ['e']"),
    (
        "id,y\n" + "\n".join(LONG),
        {"target": "y"},
        "column 1 (id): numbers the rows; write drop = ['id'], or write numeric",
    ),
    (
        "PassengerId,y\n" + "\n".join(f"{row * row},{row % 2}" for row in range(20)),
        {"target": "y"},
        "column 1 (PassengerId): numbers the rows",
    ),
    (
        "name,y\n" + "\n".join(f"n{row},{row % 2}" for row in range(20)),
        {"target": "y"},
        "column 1 (name): has 20 different texts in 20 rows, such as 'n0', so no model learns from it; write drop = ['name']",
    ),
    ("c,y\n1,0\n1.0,1\n", {"target": "y", "categorical": ["c"]}, "column 1 (c): the labels 1 and 1.0 are one number"),
    (
        "x,y\n1,0\n2,1,5\n",
        {"target": "y"},
        "t.csv, row 3: has 3 values, the rows above have 2; is another delimiter meant?",
    ),
    ('x,y,c\n1,0,"a\n2,1,b\n', {"target": "y"}, "t.csv, row 2: a quotation mark is not closed, so the value goes on"),
    ('x,c,y\n1,"a,0\n2,b,1\n', {"target": "y"}, "t.csv, row 2: a quotation mark is not closed, so the value goes on"),
    ("x,x\n1,0\n2,1\n", {"target": "x"}, "t.csv: 2 columns are named 'x'; give each column a name of its own"),
    ("1,2\n3,4\n", {"target": 2}, "row 1: holds numbers, not names of columns; write header = false"),
    ("x,y\n", {"target": "y"}, "t.csv: holds no rows"),
    ("", {"target": "y"}, "t.csv: cannot be read as CSV: Empty CSV file"),
    ("y\n1\n2\n", {"target": "y"}, "has no columns beside the target and those left out"),
    ("x,y\n1,0\n2,1\n", {"target": "y", "drop": ["y"]}, "column 'y' is named by target and by drop; remove one"),
    ("x,y\n1,0\n2,1\n", {"target": ["y", 2]}, "target names the column 'y' twice; remove one"),
    (
        "x,y\n1,0\n2,1\n",
        {"target": ["x", "y"], "task": "binary"},
        'task = "binary" has one target column, here are x, y',
    ),
    ("x,y\n1,0\n2,1\n3,2\n", {"target": "y", "task": "binary"}, 'has 3 different values; task = "binary" has 2'),
    ("x,y\n1,a\n2,b\n", {"target": "y", "task": "binary"}, "has the values 'a' and 'b'; write positive = 'b' or 'a'"),
    ("x,y\n1,a\n2,b\n", {"target": "y", "task": "binary", "positive": "c"}, "positive = 'c' is none of its values"),
    ("x,y\n1,a\n2,b\n", {"target": "y", "positive": "a"}, "positive = 'a' goes with task = \"binary\""),
    (
        "x,y,z\n1,0,2\n2,1,1\n",
        {"target": ["y", "z"], "task": "multilabel"},
        "row 2, column 3 (z): '2' is not one of 0 and 1",
    ),
    ("x,y,z\n1,0,a\n2,1,b\n", {"target": ["y", "z"]}, "column 3 (z): holds texts; several target columns are numbers"),
    ("x,g,y\n1,a,0\n2,,1\n", {"target": "y", "group": "g"}, "row 3, column 2 (g): is missing; give each row its group"),
    (
        "x,g,y\n1,a,0\n2,a,1\n",
        {"target": "y", "group": "g"},
        "column 2 (g): is 'a' in all rows; name a column with several",
    ),
    (
        "x,p,y\n1,train,0\n2,hold,1\n",
        {"target": "y", "part": "p"},
        "row 3, column 2 (p): 'hold' is not the name of a part",
    ),
    ("x,p,y\n1,val,0\n2,test,1\n", {"target": "y", "part": "p"}, "column 2 (p): names no training part"),
    ("x,p,y\n1,train,0\n2,train,1\n", {"target": "y", "part": "p"}, "column 2 (p): names one part only"),
    (
        "x,p,y\n1,train,a\n2,train,b\n3,test,c\n",
        {"target": "y", "part": "p"},
        "row 4, column 3 (y): 'c' is not a class of the training rows",
    ),
    (
        "x,g,p,y\n1,a,train,0\n2,b,train,1\n3,a,val,0\n",
        {"target": "y", "part": "p", "group": "g"},
        "row 4, column 2 (g): group 'a' is in the validation part here, and in the train part in row 2; give each group one part",
    ),
    ("x,g,y\n1,a,0\n2,b,1\n", {"target": "y", "group": "g", "time": "g"}, "group and time name the same column"),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD)
def test_a_bad_table_is_told_by_row_column_and_mend(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with refused(message):
        SOURCES["table"](path=written(tmp_path, text), **options)


def test_a_bad_parquet_file_is_told(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def of(**columns: Any) -> str:
        parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
        return str(tmp_path / "t.parquet")

    moments = pa.array([0, 1], pa.timestamp("us"))
    with refused("t.parquet, row 1, column 1 (d): 1970-01-01 00:00:00 is a date"):
        SOURCES["table"](path=of(d=moments, y=[0.5, 1.5]), target="y")
    with refused("column 1 (v): holds values of type list<element: int64>; write drop = ['v']"):
        SOURCES["table"](path=of(v=[[1], [2]], y=[0.5, 1.5]), target="y")
    with refused("row 2, column 1 (x): inf is infinite"):
        SOURCES["table"](path=of(x=[1.0, float("inf")], y=[0.5, 1.5]), target="y")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with refused("t.parquet: cannot be read as Parquet:"):
        SOURCES["table"](path=str(tmp_path / "t.parquet"), target="y")


def test_times_of_any_type_keep_their_order(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    steps = np.arange(ROWS) * 7 % ROWS
    late = steps + 10**18  # as floats these are one number
    values: dict[str, Any] = {
        "numbers": pa.array(late),
        "texts": pa.array(late.astype(str)),
        "nanoseconds": pa.array(late, pa.timestamp("ns")),
        "hours": pa.array(steps.astype(np.int32), pa.time32("s")),
        "lengths": pa.array(steps, pa.duration("s")),
        "shares": pa.array(steps / 2),
    }
    for name, times in values.items():
        parquet.write_table(pa.table({"x": steps / 3, "y": steps % 2, name: times}), tmp_path / "t.parquet")
        found = SOURCES["table"](path=str(tmp_path / "t.parquet"), target="y", time=name).times
        assert found is not None
        assert found.argsort().tolist() == steps.argsort().tolist(), name


def test_infinite_and_large_numbers_of_categories(tmp_path: Path) -> None:
    found = frame()[["age", "sold"]].assign(code=np.array([1e20, 2e20])[np.arange(ROWS) % 2])
    found.to_parquet(tmp_path / "t.parquet")
    source = SOURCES["table"](path=str(tmp_path / "t.parquet"), target="sold", categorical=["code"])
    assert data.load(source, split_seed=0, device=CPU).categories == (3,)
    found.assign(code=np.inf).to_parquet(tmp_path / "t.parquet")
    with refused("row 1, column 3 (code): inf is infinite"):
        SOURCES["table"](path=str(tmp_path / "t.parquet"), target="sold", categorical=["code"])


def test_labels_written_as_real_numbers_are_labels(tmp_path: Path) -> None:
    found = table(tmp_path, frame()[["age", "wet", "cold"]].astype(float), target=["wet", "cold"])
    assert (found.task, found.targets.int().tolist()) == ("multilabel", frame()[["wet", "cold"]].to_numpy().tolist())


def test_files_of_parts_have_the_same_columns(tmp_path: Path) -> None:
    first = written(tmp_path, "x,y\n1,0\n2,1\n", "a.csv")
    for text, message in (
        ("x\n1\n", "b.csv: has no column 'y', which the training file has"),
        ("x,y,z\n1,0,1\n", "b.csv: has a column 'z', which the training file lacks"),
        ("x,y\n1,a\n", "b.csv, row 2, column 2 (y): 'a' is not a class of the training rows"),
    ):
        with refused(message):
            SOURCES["table"](path=first, test=written(tmp_path, text, "b.csv"), target="y")
    with refused("part = 'x' and files of their own for parts are given; give one of both"):
        SOURCES["table"](path=first, test=first, target="y", part="x")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("x,y\ncaf\xe9,1\n".encode("latin-1"))
    with refused(
        't.csv: is not UTF-8 text (invalid continuation byte); save it as UTF-8, which Excel calls "CSV UTF-8"'
    ):
        SOURCES["table"](path=str(tmp_path / "t.csv"), target="y")


def test_no_option_has_the_name_of_its_source() -> None:
    """In a study file, `data.NAME` is the table of options of a source that is chosen by a search."""
    assert [name for name, source in SOURCES.items() if name in inspect.signature(source).parameters] == []


def test_a_study_file_gets_the_same_message(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"path = 'none': does not exist"):
        SOURCES["table"](path="none", target="y")
    written(tmp_path, "x,y\n1,0\ntwo,1\n")
    part = Part.from_tree("data", {"name": "table", "path": "t.csv", "target": "y"})
    with pytest.raises(SpecError) as caught:
        registry.call("data", part, tmp_path)
    assert caught.value.lines[0].startswith(f"data table: {tmp_path}/t.csv, row 3, column 1 (x): 'two' is not a number")
