"""A number in `classes` is the label that stands in the data; what may be read in two ways is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.data import SOURCES, Source, select
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train.build import registry
from tests.support import pictures

ONE_TO_TEN = tuple(str(number) for number in range(1, 11))


def source(names: tuple[str, ...], count: int = 40, **changes: object) -> Source:
    """Return a source of so many classes in turn; a pixel is its class's number."""
    labels = torch.arange(count) % (len(names) or 10)
    values = {"images": labels.to(torch.uint8).view(-1, 1, 1, 1), "labels": labels, "num_classes": len(names) or 10}
    return Source(**(values | {"classes": names} | changes))


def kept(found: Source) -> list[int]:
    """Return which classes of the source are there, in their new order."""
    pixels = found.images.take(torch.arange(len(found.images)))[:, 0, 0, 0]
    return [int(pixels[found.labels == number].unique()) for number in range(found.num_classes)]


@pytest.mark.parametrize(
    ("names", "classes", "positions"),
    [
        (ONE_TO_TEN, [1, 7], [0, 6]),
        (ONE_TO_TEN, ["7", 10], [6, 9]),
        (("1", "10", "2", "7"), [7, 10], [3, 1]),  # folders, in the order of text
        (("01", "02", "03"), [3, 1], [2, 0]),
        (("-1", "1"), [1, -1], [1, 0]),
        (("1.0", "2.0", "7.0"), [7, 1], [2, 0]),
        (("ant", "bee", "cat"), [2, "ant"], [2, 0]),  # no name is a number: a position
        (("class_0", "class_1", "class_2"), [2, 0], [2, 0]),  # the number in the name is the position
        (("t-shirt", "trouser", "3d model"), [1, 0], [1, 0]),
        ((), [9, 0], [9, 0]),  # labels without names
        (tuple(map(str, range(10))), [9, 0], [9, 0]),
    ],
)
def test_a_number_is_a_label(names: tuple[str, ...], classes: list, positions: list[int]) -> None:
    assert kept(select(source(names), classes=classes)) == positions


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (
            tuple(sorted(f"class_{number}" for number in ONE_TO_TEN)),
            [1, 7],
            "1 can be read in two ways: the class at this position, from 0, is 'class_10', and 'class_1' holds the number",
        ),
        (
            ("s1", "s2", "s3"),
            [1, 2],
            "is 's2', and 's1' holds the number in its name; write the class's name in quotes",
        ),
        (("1a", "1b", "2"), [1, "2"], "1 can be read in two ways"),
        (("a 01", "a 02", "b 01"), [1, 0], "is 'a 02', and 'a 01' and 'b 01' holds the number"),
        (ONE_TO_TEN, [0, 7], "there is no class 0; the labels are '1', '2'"),
        (("1", "2", "other"), [1, 2], "1 can be read in two ways, since only some of the names are numbers"),
        (
            ("1", "01", "2"),
            [1, 2],
            "1 can be read in two ways, since it may be '1' or '01'; write the class's name in quotes",
        ),
    ],
)
def test_what_is_no_label_or_two_is_refused(names: tuple[str, ...], classes: list, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        select(source(names), classes=classes)
    assert message in str(caught.value)


def test_every_source_with_labels_takes_them(tmp_path: Path) -> None:
    """[1, 7] of labels 1 to 10: from arrays, from a spreadsheet and from folders."""
    numbers = np.arange(40) % 10 + 1
    np.savez(
        tmp_path / "a.npz", images=np.broadcast_to(numbers.astype(np.uint8)[:, None, None], (40, 5, 5)), labels=numbers
    )
    (tmp_path / "i.csv").write_text("".join(f"{number},{number},{number},{number}\n" for number in numbers))
    (tmp_path / "l.csv").write_text("".join(f"{number}\n" for number in numbers))
    for number in range(1, 11):
        pictures.write(tmp_path / "root" / str(number), 1, number)
    for found in (
        SOURCES["npz"](path=str(tmp_path / "a.npz")),
        SOURCES["csv"](images=str(tmp_path / "i.csv"), labels=str(tmp_path / "l.csv")),
        SOURCES["image_folder"](root=str(tmp_path / "root"), size=2, colour="grey"),
    ):
        chosen = select(found, classes=[1, 7])
        assert (chosen.classes, kept(chosen)) == (("1", "7"), [1, 7])
        assert kept(select(found, classes=[1, 7], reading=1))[0] == int(found.classes[1])


def spec(folder: Path, **document: object) -> StudySpec:
    sections = {"model": {"name": "mlp"}, "optimizer": {"name": "sgd", "lr": 0.1}}
    return resolve.resolve(StudySpec.from_document({"name": "s", **sections, **document}), folder)


@pytest.mark.parametrize(
    "data",
    [
        {"name": "npz", "path": "a.npz", "classes": [1, 7]},
        {"name": "mine.py:numbers", "classes": [1, [2, 7]]},
    ],
)
def test_the_first_format_keeps_positions_and_its_identity(tmp_path: Path, data: dict) -> None:
    """A study of format 1 takes positions, as it did, and its stored document does not tell so."""
    numbers = np.arange(40) % 10 + 1
    np.savez(tmp_path / "a.npz", images=np.zeros((40, 5, 5), np.uint8), labels=numbers)
    (tmp_path / "mine.py").write_text(
        "from hpo.data import Source\nimport torch\ndef numbers():\n"
        "    return Source(images=torch.zeros(40, 1, 2, 2, dtype=torch.uint8), labels=torch.arange(40) % 10,\n"
        "                  num_classes=10, classes=tuple(str(n) for n in range(1, 11)))\n"
    )
    found = {
        number: registry.call(
            "data", TrainConfig.from_tree(spec(tmp_path, data=data, format=number).tree).data, tmp_path
        )
        for number in (1, 2)
    }
    assert found[1].classes[0] == "2"
    assert found[2].classes[0] == "1"
    stored = spec(tmp_path, data=data, format=1).document["data"]
    assert "reading" not in stored
    if data["name"] == "npz":
        assert stored == data | {
            "images": "images",
            "labels": "labels",
            "test_images": "test_images",
            "test_labels": "test_labels",
            "channels_last": False,
        }
