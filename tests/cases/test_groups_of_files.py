"""Groups and times come from an array of an archive, or from a column of a table of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo import data
from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from hpo.data.split import parted, rule_of
from tests.support import pictures

N = 60
IMAGES = {"images": np.arange(N * 25).reshape(N, 5, 5) % 256, "labels": np.arange(N) % 2}
PATIENTS = np.repeat([f"p{number}" for number in range(10)], 6)


def archive(folder: Path, *, group: str | None = None, time: str | None = None, **arrays: object) -> Source:
    np.savez(folder / "a.npz", **IMAGES, **arrays)
    return SOURCES["npz"](path=str(folder / "a.npz"), group=group, time=time)


@pytest.mark.parametrize("patients", [PATIENTS, PATIENTS.astype(object), np.repeat(np.arange(10), 6)[:, None]])
def test_an_array_of_an_archive_names_groups(tmp_path: Path, patients: np.ndarray) -> None:
    found = archive(tmp_path, group="patient", patient=patients)
    assert rule_of(found) == "group"
    assert (found.groups.reshape(10, 6) == found.groups.reshape(10, 6)[:, :1]).all()
    assert len(found.groups.unique()) == 10
    assert found.notes == ()


@pytest.mark.parametrize(
    "days",
    [
        np.arange(N)[::-1],
        np.arange(N)[::-1] / 8,
        np.datetime64("2026-01-01") + np.arange(N)[::-1].astype("timedelta64[D]"),
    ],
)
def test_an_array_of_an_archive_names_times(tmp_path: Path, days: np.ndarray) -> None:
    found = archive(tmp_path, time="day", day=days)
    assert rule_of(found) == "time"
    assert parted(found, 0)[2].tolist() == list(range(9))  # the first rows are the latest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "patients"}, "group = 'patients': holds no such array; it has images, labels, patient, day"),
        ({"group": "half"}, r"half is int64 [30]; give whole numbers or texts [60], one for each training row"),
        ({"group": "day"}, r"day is float64 [60]; give whole numbers or texts [60]"),
        ({"time": "patient"}, r"patient is <U2 [60]; give numbers or dates [60]"),
        ({"time": "day"}, "day[7] is nan; give each row its time"),
    ],
)
def test_an_array_that_is_neither_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    days = np.where(np.arange(N) == 7, np.nan, np.arange(N))
    with pytest.raises(BadFile) as caught:
        archive(tmp_path, patient=PATIENTS, day=days, half=np.arange(30), **options)
    assert message.split("; it has")[0] in str(caught.value)


def listed(folder: Path, rows: list[str], **options: object) -> Source:
    pictures.write(folder / "root", 40)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return SOURCES["image_folder"](root=str(folder / "root"), labels=str(folder / "labels.csv"), size=2, **options)


def test_a_column_of_a_table_of_images_names_groups(tmp_path: Path) -> None:
    rows = ["file,label,patient"] + [f"{number:03d},{'ab'[number % 2]},p{number // 4}" for number in range(40)]
    found = listed(tmp_path, rows, group_column="patient")
    assert found.groups.tolist() == [number // 4 for number in range(40)]
    assert rule_of(found) == "group"
    assert listed(tmp_path, rows, group_column=3).groups.tolist() == found.groups.tolist()
    for wanted, said in (("file", "holds the files or the labels"), ("ward", "is not a column of the table")):
        with pytest.raises(BadFile, match=f"group_column = '{wanted}': {said}; write one of file, label, patient"):
            listed(tmp_path, rows, group_column=wanted)
    with pytest.raises(BadFile, match=r"labels.csv, row 7: has no group"):
        listed(tmp_path, [*rows[:6], "005,b,", *rows[7:]], group_column="patient")
    with pytest.raises(BadFile, match=r"labels.csv, row 42: names the file of row 2 with another group"):
        listed(tmp_path, [*rows, "000,a,p9"], group_column="patient")


def test_a_group_in_two_shipped_parts_is_found(tmp_path: Path) -> None:
    rows = ["file,label,patient,set"]
    rows += [
        f"{number:03d},{'ab'[number % 2]},p{number // 4},{'test' if number > 29 else 'train'}" for number in range(40)
    ]
    found = listed(tmp_path, rows, group_column="patient")
    [leak] = [leak for leak in data.leaks(found, 0) if leak.later == "test"]
    assert (leak.what, leak.count, leak.whole) == ("group", 2, 10)
    assert leak.places[0] == "image 0 of the test part"
