"""A class with too few images is told by its name, with where it lies and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo import data
from hpo.data import SOURCES, Source, select
from tests.support import pictures


def refused(source: Source, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        data.load(select(source, **options), split_seed=0, device="cpu")
    said = str(caught.value)
    assert "add images, or write the classes to keep into `classes`" in said
    return said


def test_folders(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path, 20)
    [one] = pictures.write(root / "emu", 1, 60)
    pictures.write(root / "fox", 3, 70)
    source = SOURCES["image_folder"](root=str(root), size=2)
    said = refused(source)
    assert said.startswith(
        f"class 'emu' has 1 image ({one}), class 'fox' has 3 images (first: {root}/fox/070.png): too few for every part of "
        "a stratified split, which takes at least 8 of each class"
    )
    assert f"'emu' has 1 image ({one})" in refused(source, classes=["emu", "dog"])  # after rows were taken out
    data.load(select(source, classes=["cat", ["dog", "emu", "fox"]]), split_seed=0, device="cpu")


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("a,b,c,d\n" + "1,2,3,4\n" * 21)
    (tmp_path / "l.csv").write_text("name\n" + "x\ny\n" * 10 + "z\n")
    options = {"images": str(tmp_path / "i.csv"), "labels": str(tmp_path / "l.csv"), "header": True}
    assert refused(SOURCES["csv"](**options)).startswith(f"class 'z' has 1 image ({tmp_path}/i.csv, row 22): too few")


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 5, 5), np.uint8), labels=[3] * 12 + [9] * 2 + [5] * 6)
    said = refused(SOURCES["npz"](path=str(tmp_path / "a.npz")))
    assert said.startswith(
        f"class '5' has 6 images (first: {tmp_path}/a.npz, images[14]), class '9' has 2 images (first: {tmp_path}/a.npz, "
        "images[12]): too few"
    )


def test_many_classes_are_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((60, 5, 5), np.uint8), labels=np.arange(60) % 30)
    assert ", and 20 more classes: too few" in refused(SOURCES["npz"](path=str(tmp_path / "a.npz")))
