"""Folders and arrays called train, val and test are the parts of the data; any mixture with classes is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpo import data
from hpo.data import SOURCES, Source, select
from hpo.data.files import BadFile
from hpo.data.split import parted
from tests.support import pictures


def read(root: Path, **options: object) -> Source:
    return SOURCES["image_folder"](root=str(root), size=2, colour="grey", **options)


def greys(images: torch.Tensor) -> list[int]:
    return images.flatten(1)[:, 0].tolist()


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "test"),
        ("training_set", "val_set", "test_set"),
        ("seg_train", "seg_val", "seg_test"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_folders_of_parts_are_parts(tmp_path: Path, train: str, validation: str, test: str) -> None:
    for number, part in enumerate((train, validation, test)):
        pictures.classes(tmp_path / part, 2, start=10 * number)
    source = read(tmp_path)
    assert source.classes == ("cat", "dog")
    splits = data.load(source, split_seed=0, device="cpu")
    assert greys(splits.train.inputs) == [0, 1, 2, 3]
    assert greys(splits.validation.inputs) == [10, 11, 12, 13]
    assert splits.validation.targets.tolist() == [0, 0, 1, 1]
    assert greys(data.load_test(source, split_seed=0, device="cpu").inputs) == [20, 21, 22, 23]


def test_the_part_that_is_missing_is_cut_from_the_training_part(tmp_path: Path) -> None:
    pictures.classes(tmp_path / "a" / "train", 20)
    pictures.classes(tmp_path / "a" / "val", 3, start=50)
    pictures.classes(tmp_path / "b" / "train", 20)
    pictures.classes(tmp_path / "b" / "test", 3, start=50)
    assert [len(rows) for rows in parted(read(tmp_path / "a"), 0)] == [34, 6, 6]
    assert [len(rows) for rows in parted(read(tmp_path / "b"), 0)] == [34, 6, 6]
    assert greys(data.load(read(tmp_path / "a"), split_seed=0, device="cpu").validation.inputs) == list(range(50, 56))


def test_parts_may_lie_elsewhere(tmp_path: Path) -> None:
    root, other = pictures.classes(tmp_path / "r", 8), pictures.classes(tmp_path / "v", 2, start=90)
    splits = data.load(read(root, validation_root=str(other)), split_seed=0, device="cpu")
    assert greys(splits.validation.inputs) == [90, 91, 92, 93]


MIXTURES = [
    (("cat", "dog", "test"), "test may be a part of the data or a class, beside cat, dog"),
    (("train", "test", "labels"), "test, train may be parts of the data or classes, beside labels"),
    (("train/cat", "train/dog", "training/cat", "training/dog"), "are both names of the training part"),
    (("val/cat", "val/dog", "test/cat", "test/dog"), "has test, val but no training part"),
    (("train/cat", "train/dog", "test"), "test: holds no folders of classes, as the test part must"),
    (("cat/train", "cat/test", "dog/train", "dog/test"), "cat: holds test, train, which may be parts of the data"),
    (
        ("images/train/a", "images/val/b", "labels/train/c", "labels/val/d"),
        "images: holds train, val, which may be parts",
    ),
    (
        ("2023/cat", "2023/dog", "2024/cat", "2024/dog"),
        "2023 and 2024 hold no images but folders of the same names, cat, dog",
    ),
    (
        ("train/x/cat", "train/x/dog", "train/y/cat", "train/y/dog", "test/x/cat", "test/y/dog"),
        "x and y hold no images",
    ),
    (("trn/cat", "trn/dog", "tst/cat"), "trn and tst hold no images but folders of the same names, cat"),
    (("a/x/cat", "a/x/dog", "b/y/cat", "b/y/dog"), "a and b hold no images but folders of the same names, cat, dog"),
    (("lernen/cat", "lernen/dog", "pruefen"), "lernen hold no images but folders, and pruefen hold only"),
    (("2022/cat", "2022/dog", "2023/cow", "2023/emu", "x", "y", "z"), "2022, 2023 hold no images but folders"),
    (
        ("train_cat", "train_dog", "test_cat", "test_dog"),
        "may be classes in several parts of the data, or all be classes",
    ),
    (("trainA", "trainB", "testA", "testB"), "may be classes in several parts of the data, or all be classes"),
    (
        ("catTrain", "catTest", "dogTrain", "dogTest", "x"),
        "may be classes in several parts of the data, or all be classes",
    ),
    (("train_cat", "train_dog", "test_images"), "may be classes in several parts of the data, or all be classes"),
    (("a/x/train", "a/x/test", "b/y"), "a/x: holds test, train, which may be parts of the data"),
    (("train/a/x/deep/val", "train/b", "test/a", "test/b"), "deep: holds val, which may be parts of the data"),
    (("data/cat", "data/dog"), "has 1 folders; give each class a folder, at least 2; or is"),
    (("train/cat", "train/dog", "test/cat", "test/cow"), "cow: is not a class of the training images"),
]


@pytest.mark.parametrize(("folders", "message"), MIXTURES)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    for number, folder in enumerate(folders):
        pictures.write(tmp_path / folder, 2, 2 * number)
    with pytest.raises(BadFile) as caught:
        read(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("folders", [MIXTURES[number][0] for number in (0, 5, 7, 9, 11, 13, 14, 17)])
def test_the_reading_that_is_meant_can_be_written(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for number, folder in enumerate(folders):
        pictures.write(tmp_path / folder, 2, 2 * number)
    with pytest.raises(BadFile, match='write layout = "classes" if'):
        read(tmp_path)
    assert read(tmp_path, layout="classes").classes == tuple(sorted({folder.split("/")[0] for folder in folders}))


@pytest.mark.parametrize("names", [("platform", "train_station"), ("crash_test", "normal"), ("Val_de_Loire", "alps")])
def test_a_class_whose_name_only_begins_like_a_part_is_a_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert read(pictures.classes(tmp_path, 2, names=names)).classes == names


@pytest.mark.parametrize(
    "folders",
    [
        ("n01/images", "n02/images", "n03/images"),  # Tiny ImageNet
        ("bus_stop", "train_station", "test_tube"),
        ("bird/hawk", "bird/owl", "cat", "cow", "dog"),
        ("bird/hawk", "bird/owl", "dog/pug", "dog/husky"),
    ],
)
def test_folders_in_classes_are_no_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for number, folder in enumerate(folders):
        pictures.write(tmp_path / folder, 2, 2 * number)
    assert read(tmp_path).classes == tuple(sorted({folder.split("/")[0] for folder in folders}))


def test_two_test_parts_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test", "elsewhere"):
        pictures.classes(tmp_path / "r" / part if part != "elsewhere" else tmp_path / part, 2)
    with pytest.raises(BadFile, match="has a test part of its own, test, and test_root is given; remove test_root"):
        read(tmp_path / "r", test_root=str(tmp_path / "elsewhere"))


def test_the_first_reading_takes_parts_as_classes_as_it_did(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        pictures.classes(tmp_path / part, 2)
    assert read(tmp_path, reading=1).classes == ("test", "train", "val")


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays(**counts: int) -> dict[str, np.ndarray]:
    """Return arrays of images and labels, called as the keyword's {} says; each pixel tells its image."""
    found: dict[str, np.ndarray] = {}
    start = 0
    for names, count in counts.items():
        images, labels = names.split("__")
        pixels = np.arange(start, start + count, dtype=np.uint8)
        found[images], found[labels] = np.broadcast_to(pixels[:, None, None], (count, 5, 5)), np.arange(count) % 2
        start += count
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("x_train__y_train", "x_val__y_val", "x_test__y_test"),
        ("train_images__train_labels", "val_images__val_labels", "test_images__test_labels"),  # MedMNIST
        ("images__labels", "validation_images__validation_labels", "test_images__test_labels"),
        ("X_train__Y_train", "X_valid__Y_valid", "X_test__Y_test"),
        ("trainX__trainY", "valX__valY", "testX__testY"),
    ],
)
def test_arrays_of_parts_are_parts(tmp_path: Path, names: tuple[str, str, str]) -> None:
    np.savez(tmp_path / "a.npz", **arrays(**dict(zip(names, (6, 4, 2), strict=True))))
    source = SOURCES["npz"](path=str(tmp_path / "a.npz"))
    splits = data.load(source, split_seed=0, device="cpu")
    assert greys(splits.train.inputs) == [0, 1, 2, 3, 4, 5]
    assert greys(splits.validation.inputs) == [6, 7, 8, 9]
    assert greys(data.load_test(source, split_seed=0, device="cpu").inputs) == [10, 11]
    assert source.notes == ()


def test_arrays_that_have_no_use_are_said_and_two_of_one_kind_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", **arrays(x_train__y_train=20), x_test=np.zeros((3, 5, 5), np.uint8), extra=np.arange(2)
    )
    assert SOURCES["npz"](path=str(tmp_path / "a.npz")).notes == ("arrays left out: x_test, extra",)
    np.savez(tmp_path / "b.npz", **arrays(x_train__y_train=20, train_images__train_labels=20))
    with pytest.raises(BadFile, match="x_train and train_images may both be the images; write images = 'x_train'"):
        SOURCES["npz"](path=str(tmp_path / "b.npz"))


# --- what is asked of a source with a validation part of its own --------------------------------------------------------


def own_validation(**changes: object) -> Source:
    def some(count: int, start: int) -> dict[str, torch.Tensor]:
        pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1)
        return {"images": pixels, "labels": torch.arange(count) % 3}

    validation = {f"validation_{name}": value for name, value in some(30, 100).items()}
    return Source(**(some(90, 0) | validation | {"num_classes": 3, "classes": ("a", "b", "c")} | changes))


def test_classes_and_subsets_are_taken_from_all_parts_and_folds_are_refused() -> None:
    chosen = data.load(select(own_validation(), classes=["c", "a"]), split_seed=0, device="cpu")
    assert greys(chosen.validation.inputs) == [100 + row for row in range(30) if row % 3 != 1]
    assert chosen.validation.targets.tolist() == [1, 0] * 10
    few = data.load(select(own_validation(), subset=40), split_seed=0, device="cpu")
    assert (len(few.train.targets), len(few.validation.targets)) == (29, 11)
    assert set(greys(few.validation.inputs)) <= set(range(100, 130))
    with pytest.raises(ValueError, match="folds = 5: the data has a validation part of its own; remove folds and fold"):
        select(own_validation(), folds=5, fold=0)
