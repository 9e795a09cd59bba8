"""`hpo check` shows parts, classes and images of any source, so that data of a wrong kind is seen before it is searched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from hpo import data
from hpo.data import Source
from hpo.data.files import BadFile


def some(count: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [1, 4, 4] of one grey each, `start` and up, of three classes in turn."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return pixels.expand(-1, 1, 4, 4).clone(), torch.arange(count) % 3


def shown(source: Source) -> data.Overview:
    return data.overview(source, data.load(source, split_seed=0, device="cpu"), split_seed=0)


def test_parts_and_classes_are_counted() -> None:
    images, labels = some(40)
    validation_images, validation_labels = some(7, 100)
    test_images, test_labels = some(11, 200)
    found = shown(
        Source(
            inputs=images,
            targets=labels,
            validation_inputs=validation_images,
            validation_targets=validation_labels,
            test_inputs=test_images,
            test_targets=test_labels,
            num_classes=3,
            classes=("ant", "bee", "cat"),
            notes=("something",),
        )
    )
    assert found.counts == {"train": [14, 13, 13], "validation": [3, 2, 2], "test": [4, 4, 3]}
    assert found.shipped == ["validation", "test"]
    assert (found.inputs, found.targets) == ("images [1, 4, 4] as [channels, height, width]", "3 classes")
    assert (found.classes, found.notes) == (["ant", "bee", "cat"], ["something"])
    assert len(found.examples) == 3
    assert found.examples[2][0][0] == pytest.approx(2 / 39)  # the first cat, of the brightest training image
    assert found.leaks == []


def test_parts_that_are_cut_are_counted_too() -> None:
    images, labels = some(100)
    found = shown(Source(inputs=images, targets=labels, num_classes=3))
    assert {part: sum(counts) for part, counts in found.counts.items()} == {"train": 70, "validation": 15, "test": 15}
    assert (found.shipped, found.classes) == ([], ["0", "1", "2"])


ROWS = torch.arange(100)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "said", "counts"),
    [
        (
            ROWS.float()[:, None],
            ROWS.float()[:, None],
            {"task": "regression"},
            "rows of 1 feature, 1 number to predict",
            [],
        ),
        (
            {"numbers": ROWS.float()[:, None], "categories": torch.stack([ROWS % 3, ROWS % 2], 1)},
            (ROWS % 4 == 0)[:, None],
            {"task": "binary", "classes": ("no", "yes")},
            "rows of 1 numeric and 2 categorical columns, 2 classes",
            [75, 25],
        ),
        (
            ROWS.float().view(-1, 1, 1).expand(-1, 2, 5).clone(),
            torch.stack([ROWS % 2 == 0, ROWS % 5 == 0, ROWS < 90], 1),
            {"task": "multilabel"},
            "series [2, 5] as [channels, steps], 3 labels",
            [50, 20, 90],
        ),
        (ROWS[:, None] % 7 + torch.arange(4), ROWS % 2, {"num_classes": 2}, "rows of 4 tokens, 2 classes", [50, 50]),
    ],
)
def test_every_task_and_kind_of_input_is_counted(inputs, targets, options: dict, said: str, counts: list[int]) -> None:
    found = shown(Source(inputs=inputs, targets=targets, **options))
    assert f"{found.inputs}, {found.targets}" == said
    assert [sum(one) for one in zip(*found.counts.values(), strict=True)] == counts
    assert sum(found.rows.values()) == 100


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_a_sheet_of_images_has_a_row_for_each_class(tmp_path: Path, channels: int) -> None:
    images, labels = some(60)
    source = Source(inputs=images.expand(-1, channels, -1, -1).clone(), targets=labels, num_classes=3)
    splits = data.load(source, split_seed=0, device="cpu")
    data.contact_sheet(splits, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (8 * 34 + 2, 3 * 34 + 2)
        first = splits.train.inputs[splits.train.targets == 1][0, 0, 0, 0]
        assert sheet.getpixel((10, 34 + 10))[0] == pytest.approx(int(first) / splits.white * 255, abs=1)
    with pytest.raises(BadFile, match="cannot be written: No such file or directory"):
        data.contact_sheet(splits, tmp_path / "no" / "a.png")
