"""`hpo check` finds rows and groups that lie in two parts, and tells only how many and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpo import data
from hpo.data import SOURCES, Leak, Source, select
from hpo.data.split import parted
from hpo.view import checked

N = 200


def numbers(start: int, count: int) -> dict[str, torch.Tensor]:
    """Return a table whose rows all differ."""
    rows = torch.arange(start, start + count)
    return {"numbers": rows.float()[:, None], "categories": rows[:, None] % 3}


def source(**changes: object) -> Source:
    known = {"inputs": numbers(0, N), "targets": torch.arange(N) % 2, "num_classes": 2}
    return Source(**(known | changes))


def found(given: Source) -> list[Leak]:
    return data.overview(given, data.load(given, split_seed=0, device="cpu"), split_seed=0).leaks


def test_rows_of_shipped_parts_are_compared_with_each_other() -> None:
    validation, test = numbers(1000, 30), numbers(2000, 40)
    for one in ("numbers", "categories"):
        validation[one][:2] = numbers(5, 2)[one]  # two training rows
        test[one][3] = validation[one][7]
        test[one][4] = numbers(9, 1)[one]
    given = source(
        validation_inputs=validation,
        validation_targets=torch.arange(30) % 2,
        test_inputs=test,
        test_targets=torch.arange(40) % 2,
    )
    assert found(given) == [
        Leak(
            what="row",
            earlier="train",
            later="validation",
            count=2,
            whole=30,
            places=("row 0 of the validation part", "row 5"),
        ),
        Leak(what="row", earlier="train", later="test", count=1, whole=40, places=("row 4 of the test part", "row 9")),
        Leak(
            what="row",
            earlier="validation",
            later="test",
            count=1,
            whole=40,
            places=("row 3 of the test part", "row 7 of the validation part"),
        ),
    ]


def test_a_row_that_differs_in_one_tensor_is_no_copy() -> None:
    validation = numbers(0, 30)
    validation["categories"] += 3
    assert found(source(validation_inputs=validation, validation_targets=torch.arange(30) % 2)) == []


def test_copies_that_the_split_tears_apart_are_found_and_one_group_mends_it() -> None:
    inputs = numbers(0, N // 2)
    twice = source(inputs={name: torch.cat([one, one]) for name, one in inputs.items()})
    parts = dict(zip(("train", "validation", "test"), parted(twice, 0), strict=True))
    for leak in found(twice):
        known = set((parts[leak.earlier] % 100).tolist())
        assert leak.count == sum(row % 100 in known for row in parts[leak.later].tolist()) > 0
    assert len(found(twice)) == 3
    assert found(source(inputs=twice.inputs, groups=torch.arange(N) % 100)) == []


def test_groups_are_compared_when_the_split_does_not_heed_them() -> None:
    grouped = source(groups=torch.arange(N) // 10)
    assert found(grouped) == []
    leaks = found(select(grouped, split="random"))
    assert {(leak.what, leak.earlier, leak.later) for leak in leaks} == {
        ("group", "train", "validation"),
        ("group", "train", "test"),
        ("group", "validation", "test"),
    }
    shipped = source(
        groups=torch.arange(N) // 10,
        test_inputs=numbers(1000, 20),
        test_targets=torch.arange(20) % 2,
        test_groups=torch.arange(10, 30),  # half of them are known
    )
    assert sum(leak.count for leak in found(shipped)) == 10


def test_times_of_parts_that_a_table_brings_are_compared(tmp_path: Path) -> None:
    """Two validation rows are older than the last day of training, and one is of that day. The test part comes after both."""
    days = [*range(1, 21), 15, 16, 20, *range(21, 26), *range(26, 30)]
    parts = ["train"] * 20 + ["validation"] * 8 + ["test"] * 4
    lines = [
        f"{day * 1.5},2026-11-{day:02},{part},{place % 2}"
        for place, (day, part) in enumerate(zip(days, parts, strict=True))
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["x,day,part,y", *lines]))
    given = SOURCES["table"](path=str(tmp_path / "rows.csv"), target="y", part="part", time="day")
    [leak] = [one for one in found(given) if one.what == "time"]
    assert leak == Leak(
        what="time",
        earlier="train",
        later="validation",
        count=2,
        whole=8,
        places=("row 0 of the validation part", f"{tmp_path}/rows.csv, row 21"),
    )


def test_times_are_compared_when_the_split_does_not_heed_them() -> None:
    timed = source(times=torch.arange(N))
    assert found(timed) == []
    assert {leak.what for leak in found(select(timed, split="random"))} == {"time"}


@pytest.mark.parametrize(
    ("leak", "text"),
    [
        (
            Leak(what="time", earlier="train", later="validation", count=1, whole=3, places=("row 4", "row 9")),
            "1 of 3 validation rows are older than the latest training row (first: row 4, the latest: row 9); where the past "
            'tells of the future, they make the validation score too good: write split = "time"',
        ),
        (
            Leak(what="row", earlier="train", later="test", count=2, whole=30, places=("a.csv, row 4", "a.csv, row 9")),
            "2 of 30 test rows are copies of training rows (first: a.csv, row 4, like a.csv, row 9); they make the test score "
            "too good: remove copies, or give copies one group and split by group",
        ),
        (
            Leak(what="group", earlier="train", later="validation", count=1, whole=3, places=("row 4", "row 9")),
            "1 of 3 validation rows have a group of the training part (first: row 4, like row 9); they make the validation "
            'score too good: write split = "group"',
        ),
    ],
)
def test_a_leak_is_told_with_its_mend(leak: Leak, text: str) -> None:
    given = source()
    overview = data.overview(given, data.load(given, split_seed=0, device="cpu"), split_seed=0)
    assert checked._leak_text(leak, overview) == text
