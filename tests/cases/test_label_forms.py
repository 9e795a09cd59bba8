"""Labels in any form that public data sets have them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile


def archive(folder: Path, labels: np.ndarray) -> Source:
    np.savez(folder / "a.npz", images=np.zeros((len(labels), 5, 5), np.uint8), labels=labels)
    return SOURCES["npz"](path=str(folder / "a.npz"))


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (np.array(["cat", "dog", "cat"], dtype=object), ("cat", "dog"), [0, 1, 0]),
        (np.array([7, 3, 7], dtype=object), ("3", "7"), [1, 0, 1]),
        (np.array([["a"], ["b"], ["a"]], dtype=object), ("a", "b"), [0, 1, 0]),
        (np.array([np.int64(7), np.int64(3), np.int64(7)], dtype=object), ("3", "7"), [1, 0, 1]),
        (np.array([np.str_("cät"), np.str_("dog"), "cät"], dtype=object), ("cät", "dog"), [0, 1, 0]),
        (np.array([np.float32(7), np.uint8(3), 7], dtype=object), ("3", "7"), [1, 0, 1]),
        (np.array([np.bool_(True), False, np.bool_(True)], dtype=object), ("0", "1"), [1, 0, 1]),
        (np.array([np.int16(7).astype(">i2"), 3, 7], dtype=object), ("3", "7"), [1, 0, 1]),
        (np.array([b"cat", np.bytes_(b"dog"), b"cat"], dtype=object), ("cat", "dog"), [0, 1, 0]),
        (np.array(["cat", " dog", "cat "]), ("cat", "dog"), [0, 1, 0]),
        (np.array([b"cat\n", b"dog", b"cat"]), ("cat", "dog"), [0, 1, 0]),
        (np.array(["cat", "dog\t", " cat"], dtype=object), ("cat", "dog"), [0, 1, 0]),
        (np.array(["cat", "dog", "cat"]), ("cat", "dog"), [0, 1, 0]),
        (np.array([b"cat", b"dog", b"cat"]), ("cat", "dog"), [0, 1, 0]),
        (np.array(["10", "9", "10"]), ("9", "10"), [1, 0, 1]),
        (np.array([[0], [1], [0]], dtype=np.uint8), ("0", "1"), [0, 1, 0]),  # MedMNIST
        (np.array([[4, 2, 4]]), ("2", "4"), [1, 0, 1]),
        (np.array([1.0, 2.0, 1.0]), ("1", "2"), [0, 1, 0]),
        (np.array([1.0, 2, 1.0], dtype=object), ("1", "2"), [0, 1, 0]),
        (np.array([True, False, True]), ("0", "1"), [1, 0, 1]),
        (np.array([[0, 1], [1, 0], [0, 1]]), ("0", "1"), [1, 0, 1]),
        (np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), ("0", "1", "2"), [1, 2, 0]),
    ],
)
def test_labels_are_recognised(tmp_path: Path, labels: np.ndarray, classes: tuple, numbers: list[int]) -> None:
    found = archive(tmp_path, labels if len(labels) == 3 else labels.T)
    assert (found.classes, found.labels.tolist()) == (classes, numbers)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["cat", None, "cat"], dtype=object), "labels[1] is None, of type NoneType; give all labels as texts"),
        (np.array(["cat", 3, "cat"], dtype=object), "labels[1] is 3, of type int; give all labels as texts"),
        (np.array([1.0, np.nan, 2.0]), "labels[1] is nan; give each a whole number or a text"),
        (np.array([1.0, 1.5, 2.0]), "labels[1] is 1.5; give each a whole number"),
        (np.array([1.0, 2.0**53, 1e300]), "labels[1] is 9007199254740992.0; give each a whole number"),
        (np.array([1.0, np.inf, 2.0], dtype=np.float16), "labels[1] is inf; give each a whole number"),
        (np.array(["cat", "", "dog"]), "labels[1] has no label"),
        (np.array(["cat", "nan", "dog"]), "labels[1] has no label"),
        (np.array([b"cat", b"dog", b" NaN"]), "labels[2] has no label"),
        (np.array(["cat", np.nan, "dog"], dtype=object), "labels[1] is nan, of type float; give all labels as texts"),
        (np.array([b"cat", "dog", "cow"], dtype=object), "labels[1] is 'dog', of type str"),
        (np.array([b"cat", b"\xff", b"dog"]), "labels holds bytes that are not UTF-8"),
        (np.array([np.datetime64("2026-01-01")] * 3, dtype=object), "it holds objects of type datetime64"),
        (np.array([[0, 1], [1, 1], [1, 0]]), "labels is [3, 2], but row 1 is not zeros with a single 1"),
        (np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]), "row 0 is not zeros with a single 1"),
        (np.array([1, 2, 3], dtype="datetime64[D]"), "labels is datetime64[D] [3] beside 3 images"),
        (np.array([{"a": 1}, {}, {}], dtype=object), "labels[0] is {'a': 1}, of type dict"),
        (np.array([Path("a"), Path("b"), Path("a")], dtype=object), "it holds objects of pathlib"),
    ],
)
def test_other_labels_are_refused_with_their_row(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(BadFile) as caught:
        archive(tmp_path, labels)
    assert message in str(caught.value)


def test_one_number_in_two_spellings_is_not_two_classes(tmp_path: Path) -> None:
    """Two exports of pandas in one array: whole numbers become floats where a label was missing."""
    with pytest.raises(ValueError, match=r"^the labels 1 and 1\.0 are one number written in two ways"):
        archive(tmp_path, np.array(["1", "1.0", "2"]))
    assert archive(tmp_path, np.array(["1", "01", "2"])).num_classes == 3


@pytest.mark.parametrize(
    ("images", "mend"),
    [
        (np.full((3, 5, 5), 0.5), r"such as \(values \* 255\)"),
        (np.ones((3, 5, 5), dtype=bool), r"such as \(values \* 255\)"),
        (np.full((3, 5, 5), 254.6), r"such as values\.round\(\)\.astype"),
        (np.array([-1.0, 1.0]).repeat(15).reshape(3, 2, 5), "they go from -1 to 1, so bring them to whole numbers"),
        (np.full((3, 5, 5), np.nan), "they go from nan to nan, so bring them to whole numbers"),
    ],
)
def test_the_mend_of_real_pixels_keeps_what_they_show(tmp_path: Path, images: np.ndarray, mend: str) -> None:
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(3))
    with pytest.raises(BadFile, match=mend):
        SOURCES["npz"](path=str(tmp_path / "a.npz"))


def test_the_first_reading_keeps_texts_as_they_are(tmp_path: Path) -> None:
    labels = np.array(["cat", "cat ", "nan"])
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 5, 5), np.uint8), labels=labels)
    assert SOURCES["npz"](path=str(tmp_path / "a.npz"), reading=1).classes == ("cat", "cat ", "nan")


def test_what_a_pickled_array_names_is_not_called(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "touched",)

    with pytest.raises(BadFile, match="it holds objects of"):
        archive(tmp_path, np.array([Hostile(), Hostile(), 1], dtype=object))
    assert not (tmp_path / "touched").exists()


def test_images_of_several_sizes_are_told(tmp_path: Path) -> None:
    images = np.empty(2, dtype=object)
    images[:] = [np.zeros((2, 2), np.uint8), np.zeros((3, 3), np.uint8)]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(2))
    with pytest.raises(BadFile, match=r"images is object \[2\].*; images of several sizes must be brought to one"):
        SOURCES["npz"](path=str(tmp_path / "a.npz"))
