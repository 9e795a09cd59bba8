"""A CSV of file names and labels, and one CSV with a column of labels, as Kaggle's competitions ship them, are read."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from tests.support import pictures


def read(folder: Path, text: str, **options: object) -> Source:
    """Read eight pictures, 000.png to 005.png and deep/006.png to deep/007.png, by a table."""
    pictures.write(folder / "root", 6)
    pictures.write(folder / "root" / "deep", 2, 6)
    pictures.write(folder / "root" / ".hidden", 1, 8)
    (folder / "l.csv").write_text(text)
    return SOURCES["image_folder"](
        root=str(folder / "root"), labels=str(folder / "l.csv"), size=2, colour="grey", **options
    )


@pytest.mark.parametrize(
    ("text", "options", "greys", "classes", "labels"),
    [
        ("000.png,cat\n001.png,dog\n", {}, [0, 1], ("cat", "dog"), [0, 1]),
        ("id,breed\n001,dog\n000,cat\n", {}, [1, 0], ("cat", "dog"), [1, 0]),  # Kaggle's dogs: no ending
        (",image_id,label\n0,003.png,10\n1,006.png,9\n", {}, [3, 6], ("9", "10"), [1, 0]),  # pandas' index; in a folder
        ("label;file\ncat;deep/007.png\ndog;root/deep/006.png\n", {}, [7, 6], ("cat", "dog"), [0, 1]),
        ("file,colour,kind\n000.png,r,a\n001.png,g,b\n", {"label_column": "kind"}, [0, 1], ("a", "b"), [0, 1]),
        ("000.png,r,a\n001.png,g,b\n", {"label_column": 2}, [0, 1], ("g", "r"), [1, 0]),
        ("000.png,cat\n001.png,dog\n000.png,cat\n", {}, [0, 1], ("cat", "dog"), [0, 1]),
    ],
)
def test_a_table_of_files(tmp_path: Path, text: str, options: dict, greys: list, classes: tuple, labels: list) -> None:
    found = read(tmp_path, text, **options)
    assert found.images[:, 0, 0, 0].tolist() == greys
    assert (found.classes, found.labels.tolist()) == (classes, labels)
    assert "image files that the table does not name, left out: 6" in found.notes


@pytest.mark.parametrize(
    ("header", "row", "options"),
    [
        (",file,label", "{index},{file}.png,{label}", {}),  # as pandas writes a shuffled frame with its index
        ("label,file", "{label},{file}", {}),  # labels that are names of files too
        ("file,kind", "{file},{label}", {}),
        (",file,kind", "{index},{file}.png,{label}", {"label_column": "kind"}),
        (",file,path,kind", "{index},{file}.png,/kaggle/input/x/root/{file}.png,{label}", {"label_column": "kind"}),
        ("n,file,kind", "{index},{path},{label}", {"label_column": 3}),
        ("file,kind", "{linked},{label}", {}),
    ],
)
def test_numbers_that_are_names_of_files_too_are_not_taken_for_them(
    tmp_path: Path, header: str, row: str, options: dict
) -> None:
    root = tmp_path / "root"
    for path in pictures.write(root, 20):
        path.rename(root / f"{int(path.stem)}.png")
    (root / "again").symlink_to(root, target_is_directory=True)
    files = [(7 * index + 3) % 20 for index in range(20)]
    rows = [
        row.format(index=n, file=file, label=file % 2, path=root / f"{file}.png", linked=f"again/{file}.png")
        for n, file in enumerate(files)
    ]
    (tmp_path / "l.csv").write_text("\n".join([header, *rows]))
    found = SOURCES["image_folder"](root=str(root), labels=str(tmp_path / "l.csv"), size=2, colour="grey", **options)
    assert found.images[:, 0, 0, 0].tolist() == files
    assert found.labels.tolist() == [file % 2 for file in files]


@pytest.mark.parametrize("missing", [0, 3])
def test_two_columns_that_name_different_files_are_refused(tmp_path: Path, missing: int) -> None:
    """A frame's index, beside names of files without their ending; a file that is missing does not decide."""
    rows = [f"{index:03d},{(5 - index + missing):03d},{'ab'[index % 2]}" for index in range(6)]
    with pytest.raises(BadFile, match=r"the columns number 1 and file name different files below .*; remove"):
        read(tmp_path, "\n".join([",file,label", *rows]))


def test_a_folder_that_the_table_writes_is_no_other_folder(tmp_path: Path) -> None:
    for folder in ("test", "train"):
        pictures.write(tmp_path / folder, 2)
    (tmp_path / "l.csv").write_text("train/000.png,a\ntrain/001.png,b\n")
    options = {"labels": str(tmp_path / "l.csv"), "size": 2}
    pictures.write(tmp_path / "test" / "deep", 2, 6)
    (tmp_path / "own.csv").write_text(f"{tmp_path}/test/006.png,a\n./007.png,b\ndeep/006.png,b\n000.png,a\n")
    with pytest.raises(BadFile) as caught:
        SOURCES["image_folder"](root=str(tmp_path / "test"), labels=str(tmp_path / "own.csv"), size=2)
    assert [line.split(": names")[0][-5:] for line in str(caught.value).splitlines()[1:]] == ["row 1", "row 2"]
    with pytest.raises(BadFile, match="has no column whose values are files below"):
        SOURCES["image_folder"](root=str(tmp_path / "test"), **options)
    assert SOURCES["image_folder"](root=str(tmp_path / "train"), **options).classes == ("a", "b")


def test_files_in_a_linked_folder_are_found(tmp_path: Path) -> None:
    pictures.write(tmp_path / "elsewhere", 2, 20)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = read(tmp_path, "000.png,a\n020.png,b\nmore/021.png,b\nmore/020.png,b\n")
    assert found.images[:, 0, 0, 0].tolist() == [0, 20, 21]


def test_a_column_of_parts_says_the_parts(tmp_path: Path) -> None:
    rows = ["000,cat,train", "001,dog,Train", "002,cat,valid", "003,dog,valid", "004,cat,test", "005,dog,test"]
    found = read(tmp_path, "\n".join(["file,label,split", *rows]))
    assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert found.validation_inputs[:, 0, 0, 0].tolist() == [2, 3]
    assert found.test_inputs[:, 0, 0, 0].tolist() == [4, 5]
    assert found.test_targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000.png,cat\nx.png,dog\n001.png,dog\n", "l.csv, row 2: names x.png, which is not below"),
        ("000.png,cat\n001.png,\n002.png,dog\n", "l.csv, row 2: has no label"),
        ("000.png,cat\n001.png,dog\n000.png,dog\n", "l.csv, row 3: names the file of row 1 with another label"),
        ("000.png,cat\n001.png\n", "l.csv, row 2: has 1 values, the rows above have 2"),
        (
            "file,a,b\n000.png,1,0\n001.png,0,1\n",
            "several columns may hold the labels; write label_column as one of a, b",
        ),
        ("file,label\nx.png,cat\ny.png,dog\n", "has no column whose values are files below"),
        ("file,split\n000.png,train\n001.png,test\n", "l.csv: holds files and parts, but no labels; add a column"),
        ("file,label\n000.png,1\n001.png,1.0\n002.png,2\n", "the labels 1 and 1.0 are one number written in two ways"),
        ("000.png,cat\n001.png,cat\n", "has 1 classes among its training images; give at least 2"),
        ("000.png,cat,train\n001.png,dog,train\n002.png,cow,test\n", "'cow' is not a class of the training images"),
        ("x.png,cat\n000.png,cat\n001.png,dog\n", "l.csv, row 1: names x.png, which is not below"),  # no row of names
        ("000.png,cat\ncat/001.png,dog\n002.png,dog\n", "l.csv, row 2: names cat/001.png, which is not below"),
        ("000.png,cat\nroot/006.png,dog\n002.png,dog\n", "l.csv, row 2: names root/006.png, which is not below"),
        ("000.png,cat\n/x/006.png,dog\n002.png,dog\n", "l.csv, row 2: names /x/006.png, which is not below"),
    ],
)
def test_a_wrong_table_is_told_by_its_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((BadFile, ValueError)) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_told_with_the_mend(tmp_path: Path, encoding: str) -> None:
    """As Excel saves "CSV" and "Unicode text"."""
    (tmp_path / "a.csv").write_bytes("Größe,label\n1,2\n".encode(encoding))
    with pytest.raises(BadFile, match=r"is not UTF-8 text .*; save it as UTF-8, which Excel calls"):
        SOURCES["csv"](images=str(tmp_path / "a.csv"), header=True)
    (tmp_path / "root").mkdir()
    with pytest.raises(BadFile, match=r"is not UTF-8 text .*; save it as UTF-8, which Excel calls"):
        SOURCES["image_folder"](root=str(tmp_path / "root"), labels=str(tmp_path / "a.csv"))


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_with_an_accent_is_found_however_it_is_composed(tmp_path: Path, on_disk: str, in_table: str) -> None:
    """An archive of macOS holds names of e and an accent, a spreadsheet those of one letter."""
    pictures.write(tmp_path / "root", 2)
    (tmp_path / "root" / "001.png").rename(tmp_path / "root" / unicodedata.normalize(on_disk, "é.png"))
    text = unicodedata.normalize(in_table, "file,label\n000.png,cat\né.png,dog\n")
    (tmp_path / "l.csv").write_text(text)
    found = SOURCES["image_folder"](root=str(tmp_path / "root"), labels=str(tmp_path / "l.csv"), size=2)
    assert found.labels.tolist() == [0, 1]


def test_a_change_of_labels_alone_is_seen(tmp_path: Path) -> None:
    assert read(tmp_path, "000.png,cat\n001.png,dog\n").labels.tolist() == [0, 1]
    assert read(tmp_path, "000.png,dog\n001.png,cat\n").labels.tolist() == [1, 0]


# --- one CSV of pixels and labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("label,p0,p1,p2,p3\ncat,1,2,3,4\ndog,5,6,7,8\n", {"header": True}),  # Kaggle's MNIST
        ("p0,p1,p2,p3,Class\n1,2,3,4,cat\n5,6,7,8,dog\n", {"header": True}),
        ("1,2,cat,3,4\n5,6,dog,7,8\n", {"label_column": 3}),
        ("a,b,c,d,kind\n1,2,3,4,cat\n5,6,7,8,dog\n", {"header": True, "label_column": "kind"}),
    ],
)
def test_labels_in_a_column_beside_the_pixels(tmp_path: Path, text: str, options: dict) -> None:
    (tmp_path / "a.csv").write_text(text)
    found = SOURCES["csv"](images=str(tmp_path / "a.csv"), **options)
    assert found.images.flatten(1).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 1])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "1,2,3,4,cat\n5,6,7,8,dog\n",
            {},
            "does not say which column holds the labels; write label_column as a name or",
        ),
        ("a,b\n1,2\n", {"header": True, "label_column": "c"}, "has no column 'c'; write label_column"),
        ("label,p\ncat,1\nnan,2\n", {"header": True}, "a.csv, row 3, column 1 (label): has no label"),
        (
            "label,p;q\ncat,1;2\n",
            {"header": True},
            "a.csv, row 2, column 2 (p;q): '1;2' is not a whole number from 0 to 255; does delimiter = \";\" fit?",
        ),
        (
            "label,file\ncat,a.png\ndog,b.png\n",
            {"header": True},
            'write name = "image_folder", with their folder as root',
        ),
    ],
)
def test_a_table_without_a_clear_column_of_labels_is_refused(tmp_path, text, options, message) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadFile) as caught:
        SOURCES["csv"](images=str(tmp_path / "a.csv"), **options)
    assert message in str(caught.value)


def test_a_label_of_no_class_is_told_by_its_column(tmp_path: Path) -> None:
    for name, text in (("i", "1\n2\n"), ("l", "0,0,x\n0,0,y\n"), ("t", "0,0,x\n0,0,z\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    paths = {"images": "i.csv", "labels": "l.csv", "test_images": "i.csv", "test_labels": "t.csv"}
    with pytest.raises(BadFile, match=r"t\.csv, row 2, column 3: 'z' is not a class of the training images"):
        SOURCES["csv"](**{option: str(tmp_path / path) for option, path in paths.items()}, label_column=3)


def test_parts_of_such_tables(tmp_path: Path) -> None:
    for name, text in (("a", "label,p\nx,1\ny,2\n"), ("v", "label,p\ny,3\n"), ("t", "label,p\nx,4\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    paths = {"images": "a.csv", "validation_images": "v.csv", "test_images": "t.csv"}
    found = SOURCES["csv"](**{option: str(tmp_path / path) for option, path in paths.items()}, header=True)
    assert (found.validation_inputs.item(), found.validation_targets.tolist()) == (3, [1])
    assert (found.test_inputs.item(), found.test_targets.tolist()) == (4, [0])


def test_names_of_columns_that_are_numbers_are_no_image(tmp_path: Path) -> None:
    """As pandas writes the names of columns that have none, to both files."""
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, range(n, n + 9))) for n in (0, 20, 40)))
    (tmp_path / "l.csv").write_text("0\n0\n1\n")
    paths = {"images": str(tmp_path / "a.csv"), "labels": str(tmp_path / "l.csv")}
    with pytest.raises(BadFile, match=r"a\.csv, row 1: counts the columns, .*; write header = true"):
        SOURCES["csv"](**paths)
    assert SOURCES["csv"](**paths, header=True).images.flatten(1)[:, 0].tolist() == [20, 40]
