"""Sources that read files: what comes out of good ones, what is said about bad ones, and what is kept."""

from __future__ import annotations

import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpo import data
from hpo.data import SOURCES
from hpo.data.cache import cached
from hpo.data.files import BadFile, data_dir
from hpo.errors import SpecError
from hpo.spec.failures import Kind, kind_of
from hpo.spec.training import Part
from hpo.train.build import registry
from tests.integration.processes import CONTEXT, fork
from tests.support.making import make_entry
from tests.support.published import COUNTS, PUBLISHED
from tests.support.waiting import PATIENCE


def kept() -> list[str]:
    """Return what stands in the cache, locks aside."""
    return [path.name for path in (data_dir() / "cache").glob("*") if path.suffix != ".lock"]


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a BadFile that says this, and nothing kept of it."""
    with pytest.raises(BadFile) as caught:
        yield
    assert message in str(caught.value)
    assert kind_of(caught.value) is Kind.DATA_ERROR
    assert kept() == []


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*args: object, **options: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


# --- published data sets ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_is_read_from_files_that_are_there_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, write, _ = PUBLISHED[name]
    (images, labels), (test_images, test_labels) = write(kind, data_dir(), monkeypatch)
    for _ in range(2):
        found = SOURCES[name]()
        assert np.array_equal(found.images, images)
        assert found.labels.tolist() == labels.tolist()
        assert np.array_equal(found.test_inputs, test_images)
        assert found.test_targets.tolist() == test_labels.tolist()
        assert len(found.classes) == found.num_classes == (100 if name == "cifar100" else 10)
        for path in data_dir().iterdir():  # what was kept needs them no more
            if path.name != "cache":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(kept()) == 1
    assert len(data.load(found, split_seed=0, device="cpu").train.targets) == COUNTS[True] * 0.85
    assert torch.equal(data.load_test(found, split_seed=0, device="cpu").inputs, torch.from_numpy(test_images))


@pytest.mark.usefixtures("offline")
def test_unpacked_batches_do_without_their_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, write, archive = PUBLISHED["cifar10"]
    (images, _), _ = write(kind, data_dir(), monkeypatch)
    shutil.unpack_archive(data_dir() / archive, data_dir(), filter="data")
    (data_dir() / archive).unlink()
    assert np.array_equal(SOURCES["cifar10"]().images, images)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PUBLISHED)
def test_another_file_than_the_published_one_is_refused(name: str) -> None:
    path = data_dir() / PUBLISHED[name][2]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with refused(f"{path}: has MD5 6c7ba9c5a141421e1c03cb9807c97c74, but the published file has"):
        SOURCES[name]()
    assert path.read_bytes() == b"something else"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_network_it_is_said_which_files_to_put_where(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        registry.call("data", Part(name=name, options={}, paths={}), Path())
    said = str(caught.value)
    assert said.startswith(f"data {name}: cannot be downloaded")
    assert "Network is unreachable" in said
    assert f"{data_dir() / PUBLISHED[name][2]} from http" in said
    assert kind_of(caught.value) is Kind.DATA_ERROR
    assert [path.name for path in data_dir().iterdir()] == ["cache"]
    assert kept() == []


# --- the cache --------------------------------------------------------------------------------------------------------


def making(log: Path, found: Queue[Any], *, is_killed: bool = False) -> ForkServerProcess:
    return fork(make_entry, str(data_dir()), log, found, is_killed)


WHOLE = (list(range(16)), ("a", "b"))


def test_processes_that_come_at_once_make_an_entry_once(tmp_path: Path) -> None:
    log, found = tmp_path / "log", CONTEXT.Queue()
    processes = [making(log, found) for _ in range(3)]
    assert [found.get(timeout=PATIENCE) for _ in processes] == [WHOLE] * 3
    for process in processes:
        process.join()
    assert log.read_text() == "made\n"


def test_nothing_is_taken_of_an_entry_whose_maker_was_killed(tmp_path: Path) -> None:
    log, found = tmp_path / "log", CONTEXT.Queue()
    killed = making(log, found, is_killed=True)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [name.endswith(".part") for name in kept()] == [True]
    making(log, found).join()
    assert found.get(timeout=PATIENCE) == WHOLE
    assert [name.endswith(".part") for name in kept()] == [False]
    assert log.read_text() == "made\nmade\n"


# --- image_folder -----------------------------------------------------------------------------------------------------

RED, GREEN, GREY = (255, 0, 0), (0, 255, 0), 100


def folder(root: Path, per_class: int = 2) -> Path:
    """Write two classes in several formats, one of them nested, and files that are no images."""
    for name, colour in (("green", GREEN), ("red", RED)):
        (root / name / "deep").mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (20, 10), colour).save(root / name / f"{number}.png")
        Image.new("RGBA", (7, 30), (*colour, 128)).save(root / name / "deep" / "x.webp", lossless=True)
        (root / name / ".DS_Store").write_text("no image")
    (root / ".hidden").mkdir()
    return root


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, [3, 64, 64]),
        ({"size": 8}, [3, 8, 8]),
        ({"size": [4, 6], "fit": "stretch"}, [3, 4, 6]),
        ({"size": 8, "colour": "grey", "fit": "pad"}, [1, 8, 8]),
    ],
)
def test_a_folder_of_images_comes_out_in_one_size(tmp_path: Path, options: dict, shape: list[int]) -> None:
    found = SOURCES["image_folder"](root=str(folder(tmp_path / "root")), **options)
    assert list(found.images.shape) == [6, *shape]
    assert found.classes == ("green", "red")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    middle = found.images[:, :, shape[1] // 2, shape[2] // 2]
    grey = options.get("colour") == "grey"
    colours = [[150]] * 3 + [[76]] * 3 if grey else [list(GREEN)] * 3 + [list(RED)] * 3
    opaque = torch.tensor([0, 1, 3, 4])
    assert (middle.int() - torch.tensor(colours)).abs()[opaque].max() <= 1
    assert (found.images[0, :, 0, 0] == 0).all() == (options.get("fit") == "pad")


def test_decoding_says_how_far_it_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpo.data.folder.TOLD_SECONDS", 0.0)
    with caplog.at_level("INFO", "hpo.data"):
        SOURCES["image_folder"](root=str(folder(tmp_path / "root")), size=4)
    assert caplog.messages == [f"preparing the data: decoded {count} of 6 images" for count in range(1, 7)]


def test_a_folder_is_decoded_once_and_anew_when_a_file_changes(tmp_path: Path) -> None:
    root = folder(tmp_path / "root")
    changed = root / "red" / "0.png"
    before = changed.stat()
    first = SOURCES["image_folder"](root=str(root), size=4)
    changed.write_bytes(b"x" * before.st_size)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # nobody looks inside
    assert torch.equal(SOURCES["image_folder"](root=str(root), size=4).images, first.images)
    Image.new("RGB", (20, 10), GREEN).save(changed)
    second = SOURCES["image_folder"](root=str(root), size=4)
    assert second.images[3].flatten(1).float().mean(1).tolist() == list(GREEN)
    assert len(kept()) == 2


def test_a_folder_ships_a_test_split_with_its_classes(tmp_path: Path) -> None:
    root, test_root = folder(tmp_path / "root", 8), folder(tmp_path / "test", 1)
    found = SOURCES["image_folder"](root=str(root), test_root=str(test_root), size=4)
    assert found.test_targets.tolist() == [0, 0, 1, 1]
    assert len(data.load_test(found, split_seed=0, device="cpu").targets) == 4
    (test_root / "blue").mkdir()
    with pytest.raises(BadFile, match="blue: is not a class of the training images; known: green, red"):
        SOURCES["image_folder"](root=str(root), test_root=str(test_root), size=4)


def truncated(root: Path) -> str:
    whole = (root / "red" / "0.png").read_bytes()
    (root / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    return f"1 of 6 files cannot be used; mend or remove them:\n{root}/red/0.png: "


def no_image(root: Path) -> str:
    (root / "red" / "0.png").write_text("text")
    (root / "green" / "1.png").write_text("text")
    return "2 of 6 files cannot be used"


def empty_class(root: Path) -> str:
    (root / "blue").mkdir()
    return f"{root}/blue: holds no image file; known endings: .jpg"


def one_class(root: Path) -> str:
    shutil.rmtree(root / "red")
    return f"{root}: has 1 folders; give each class a folder"


def no_root(root: Path) -> str:
    shutil.rmtree(root)
    return f"root = '{root}': does not exist"


@pytest.mark.parametrize("spoil", [truncated, no_image, empty_class, one_class, no_root])
def test_a_bad_folder_is_refused_and_nothing_kept(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    root = folder(tmp_path / "root")
    with refused(spoil(root)):
        SOURCES["image_folder"](root=str(root))


# --- csv --------------------------------------------------------------------------------------------------------------


def sheet(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n")
    return str(path)


IMAGES = ["0,1,2,255", "4,5.0,6,7", "8,9,10,11"]
LABELS = ["10", "9", "10"]


@pytest.mark.parametrize(
    ("images", "labels", "options", "shape", "classes"),
    [
        (IMAGES, LABELS, {}, [1, 2, 2], ("9", "10")),
        (IMAGES, ["b", '"a, c"', " b "], {"shape": [1, 4]}, [1, 1, 4], ("a, c", "b")),
        (["w,x,y,z", *IMAGES], ["label", *LABELS], {"header": True, "shape": [2, 2, 1]}, [2, 2, 1], ("9", "10")),
        ([r.replace(",", ";") for r in IMAGES], LABELS, {"delimiter": ";", "shape": [4, 1]}, [1, 4, 1], ("9", "10")),
    ],
)
def test_spreadsheets_give_an_image_and_a_label_a_row(tmp_path, images, labels, options, shape, classes) -> None:
    read = {"images": sheet(tmp_path / "i.csv", *images), "labels": sheet(tmp_path / "l.csv", *labels)}
    for _ in range(2):
        found = SOURCES["csv"](**read, **options)
        assert found.images.flatten(1).tolist() == [[0, 1, 2, 255], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert list(found.images.shape[1:]) == shape
        assert found.classes == classes
        assert [found.classes[number] for number in found.labels] == [text.strip(' "') for text in labels[-3:]]
    assert len(kept()) == 1


def test_channels_may_stand_side_by_side_and_a_test_split_be_shipped(tmp_path: Path) -> None:
    images, labels = sheet(tmp_path / "i.csv", "1,2,3,4", "5,6,7,8"), sheet(tmp_path / "l.csv", "a", "b")
    found = SOURCES["csv"](
        images=images, labels=labels, test_images=images, test_labels=labels, shape=[2, 1, 2], channels_last=True
    )
    assert found.images.tolist() == [[[[1, 3]], [[2, 4]]], [[[5, 7]], [[6, 8]]]]
    assert torch.equal(found.test_inputs, found.inputs)
    strange = sheet(tmp_path / "t.csv", "a", "c")
    with pytest.raises(BadFile, match=r"t\.csv, row 2, column 1: 'c' is not a class of the training images"):
        SOURCES["csv"](images=images, labels=labels, test_images=images, test_labels=strange)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (["1,2,3,4", "1,x,3,4"], LABELS, {}, "i.csv, row 2, column 2: 'x' is not a whole number from 0 to 255"),
        (["a,b,c,d", "1,,3,4"], LABELS, {"header": True}, "i.csv, row 2, column 2 (b): '' is not a whole number"),
        (
            ["a,b,c,d", "1,2,3,4"],
            LABELS,
            {},
            "i.csv, row 1, column 1: 'a' is not a whole number from 0 to 255; does header",
        ),
        (["1,2,3,256"], LABELS, {}, "row 1, column 4: '256' is not a whole number"),
        (["1,2,-1,4"], LABELS, {}, "row 1, column 3: '-1' is not a whole number"),
        (["1,2,0.5,4"], LABELS, {}, "row 1, column 3: '0.5' is not a whole number"),
        (["1,2,3,nan"], LABELS, {}, "row 1, column 4: 'nan' is not a whole number"),
        (["1,2,3,4", "1,2,3"], LABELS, {}, "row 2: has 3 values, the rows above have 4"),
        (["1,2,3,4", "", "1,2,3,4"], LABELS, {}, "i.csv, row 2: is empty; remove it"),
        (["1,2,3"], LABELS, {}, "i.csv: has 3 values per row, which is not a grey square; give shape = [C, H, W]"),
        (IMAGES, LABELS, {"shape": [3, 2]}, "i.csv: has 4 values per row, which is not shape = [3, 2]"),
        (IMAGES, ["a", "b"], {}, "l.csv: has 2 labels for 3 images in"),
        (IMAGES, ["a", "b", '" "'], {}, "l.csv, row 3, column 1: has no label"),
        (IMAGES, ["a,1", "b,2", "c,3"], {}, "l.csv, row 1: has 2 values; a file of labels has one column"),
        (['1,2,3,"4'], LABELS, {}, "i.csv: cannot be read as CSV: unexpected end of data"),
        (["a,b,c,d"], LABELS, {"header": True}, "i.csv: holds no image"),
    ],
)
def test_a_bad_spreadsheet_is_told_by_row_column_and_cause(tmp_path, images, labels, options, message) -> None:
    read = {"images": sheet(tmp_path / "i.csv", *images), "labels": sheet(tmp_path / "l.csv", *labels)}
    with refused(message):
        SOURCES["csv"](**read, **options)


def test_a_spreadsheet_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with refused("i.csv: is not UTF-8 text"):
        SOURCES["csv"](images=str(tmp_path / "i.csv"), labels=sheet(tmp_path / "l.csv", *LABELS))


# --- npz --------------------------------------------------------------------------------------------------------------

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2)
NUMBERS = np.array([3, 1, 3, 1])


@pytest.mark.parametrize(
    ("arrays", "options", "shape"),
    [
        ({"images": PIXELS, "labels": NUMBERS}, {}, [3, 2, 2]),
        ({"images": PIXELS, "labels": NUMBERS}, {"channels_last": True}, [2, 3, 2]),
        ({"images": PIXELS[:, 0].astype(np.int32), "labels": NUMBERS.astype(str)}, {}, [1, 2, 2]),
        (
            {"x_train": PIXELS, "y_train": NUMBERS, "x_test": PIXELS[:2], "y_test": NUMBERS[:2]},
            {"images": "x_train", "labels": "y_train", "test_images": "x_test", "test_labels": "y_test"},
            [3, 2, 2],
        ),
    ],
)
def test_an_archive_of_arrays_is_read(tmp_path: Path, arrays: dict, options: dict, shape: list[int]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    found = SOURCES["npz"](path=str(tmp_path / "a.npz"), **options)
    assert list(found.images.shape) == [4, *shape]
    assert found.images.sum() == sum(range(48)) or shape[0] == 1
    assert (found.classes, found.labels.tolist()) == (("1", "3"), [1, 0, 1, 0])
    assert (found.test_targets is None) == ("x_test" not in arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": NUMBERS}, "holds no array 'images'; it has labels"),
        ({"images": PIXELS > 5, "labels": NUMBERS}, "images is bool [4, 3, 2, 2]; give integers"),
        ({"images": PIXELS.astype(int) - 1, "labels": NUMBERS}, "images[0, 0, 0, 0] is -1; pixels go from 0 to 255"),
        ({"images": PIXELS, "labels": NUMBERS[:3]}, "labels is int64 [3] beside 4 images"),
        ({"images": PIXELS, "labels": NUMBERS / 2}, "labels[0] is 1.5; give each a whole number or a text"),
        (
            {"images": PIXELS, "labels": NUMBERS, "test_images": PIXELS, "test_labels": NUMBERS + 1},
            "test_labels[0] is 4, which is not a class of the training images",
        ),
    ],
)
def test_a_bad_archive_is_told_by_array_and_cause(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with refused(message):
        SOURCES["npz"](path=str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with refused("a.npz: cannot be read as an archive of arrays"):
        SOURCES["npz"](path=str(tmp_path / "a.npz"))


# --- fake -------------------------------------------------------------------------------------------------------------


def test_made_up_images_depend_on_their_class_and_on_the_seed() -> None:
    found = SOURCES["fake"](count=200, test_count=50, num_classes=4, shape=[3, 6, 5], noise=0.5)
    assert (list(found.inputs.shape), list(found.test_inputs.shape)) == ([200, 3, 6, 5], [50, 3, 6, 5])
    assert found.labels.bincount().tolist() == [50] * 4
    means = torch.stack([found.images[found.labels == k].float().mean(0) for k in range(4)]).flatten(1)
    nearest = torch.cdist(found.test_inputs.float().flatten(1), means).argmin(1)
    assert torch.eq(nearest, found.test_targets).float().mean() > 0.9
    assert torch.equal(found.images, SOURCES["fake"](count=200, num_classes=4, shape=[3, 6, 5], noise=0.5).images)
    assert not torch.equal(found.images, SOURCES["fake"](count=200, num_classes=4, shape=[3, 6, 5], seed=1).images)
    with pytest.raises(ValueError, match=r"shape = \[8, 8\]: write \[channels, height, width\]"):
        SOURCES["fake"](shape=[8, 8])


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_DATA_DIR", str(tmp_path / "a file" / "data"))
    (tmp_path / "a file").touch()
    with pytest.raises(BadFile, match=r"data/cache: cannot be written: .*; name another folder with HPO_DATA_DIR"):
        cached("some", 1, lambda folder: None)
