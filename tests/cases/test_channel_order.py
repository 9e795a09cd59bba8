"""Where the channels of images stand is read off their shape where that is sure, and asked where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.data import SOURCES, Source, select
from hpo.data.files import BadFile


def archive(folder: Path, shape: list[int], **options: object) -> Source:
    values = np.arange(np.prod(shape)).reshape(shape) % 251
    np.savez(folder / "a.npz", images=values.astype(np.uint8), labels=np.arange(shape[0]) % 2)
    return SOURCES["npz"](path=str(folder / "a.npz"), **options)


@pytest.mark.parametrize(
    ("shape", "options", "result"),
    [
        ([6, 32, 32, 3], {}, [3, 32, 32]),
        ([6, 28, 28, 1], {}, [1, 28, 28]),
        ([6, 20, 30, 4], {}, [4, 20, 30]),
        ([6, 28, 28, 2], {}, [2, 28, 28]),
        ([6, 1, 28, 28], {}, [1, 28, 28]),
        ([6, 3, 20, 30], {}, [3, 20, 30]),
        ([6, 28, 28], {}, [1, 28, 28]),
        ([6, 4, 4, 3], {}, [3, 4, 4]),
        ([6, 3, 4, 4], {}, [3, 4, 4]),
        ([6, 13, 64, 64], {"channels_last": False}, [13, 64, 64]),
        ([6, 64, 64, 13], {"channels_last": True}, [13, 64, 64]),
        ([6, 32, 32, 3], {"reading": 1}, [32, 32, 3]),
    ],
)
def test_channels_are_found(tmp_path: Path, shape: list[int], options: dict, result: list[int]) -> None:
    found = archive(tmp_path, shape, **options)
    assert list(found.images.shape[1:]) == result
    told = len(shape) == 4 and not options and shape[1:] != result
    assert list(found.notes) == (
        [f"images is {shape}, read as [N, H, W, C]; channels_last = false reads it as [N, C, H, W]"] * told
    )
    pixels = np.arange(np.prod(shape)).reshape(shape) % 251
    moved = np.moveaxis(pixels, -1, 1) if told or options.get("channels_last") else pixels.reshape(shape[0], *result)
    assert np.array_equal(found.images, moved)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([6, 64, 64, 13], "images is [6, 64, 64, 13], which may be [N, C, H, W] or [N, H, W, C]; write channels_last"),
        ([6, 5, 64, 64], "which may be [N, C, H, W] or [N, H, W, C]"),
        ([6, 1, 28, 1], "which may be"),
        ([6, 3, 3, 3], "which may be"),
        ([6, 784, 1], "which would be grey images of 784x1 pixels; reshape it"),
        ([28, 28, 3], "which would be grey images of 28x3 pixels; reshape it"),
        ([6, 784], "reshape rows of pixels by .reshape(-1, H, W)"),
    ],
)
def test_what_is_not_sure_is_refused(tmp_path: Path, shape: list[int], message: str) -> None:
    with pytest.raises(BadFile) as caught:
        archive(tmp_path, shape)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ([6, 3, 28, 28], True),
        ([6, 1, 28, 28], True),
        ([6, 3, 20, 30], True),
        ([6, 64, 48, 1], False),
        ([6, 28, 28, 3], False),
        ([6, 12, 90, 1], False),
    ],
)
def test_an_option_against_a_sure_shape_is_refused(tmp_path: Path, shape: list[int], last: bool) -> None:
    told, seen = ("[N, H, W, C]", "[N, C, H, W]") if last else ("[N, C, H, W]", "[N, H, W, C]")
    with pytest.raises(BadFile) as caught:
        archive(tmp_path, shape, channels_last=last)
    assert f"images is {shape}, which is {seen} by its sides and {told} by channels_last = " in str(caught.value)
    archive(tmp_path, shape, channels_last=last, reading=1)


@pytest.mark.parametrize("shape", [[3, 32, 32, 10], [32, 32, 3, 10], [28, 28, 10]])
def test_images_counted_by_the_last_side_are_refused(tmp_path: Path, shape: list[int]) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8), labels=np.arange(10) % 2)
    with pytest.raises(BadFile, match=r"labels is int64 \[10\] beside .*; the last side of images counts the images"):
        SOURCES["npz"](path=str(tmp_path / "a.npz"), channels_last=False)


@pytest.mark.parametrize(
    ("shape", "is_refused"),
    [
        ((32, 32, 3), True),
        ((28, 28, 1), True),
        ((12, 90, 1), False),
        ((8, 4, 4), False),
        ((28, 3, 28), True),
        ((28, 1, 28), True),
        ((6, 3, 128), False),
    ],
)
def test_a_source_of_one_s_own_is_looked_at_as_well(shape: tuple[int, int, int], is_refused: bool) -> None:
    """It is refused if it can only be [H, W, C]: twelve channels of a signal, or of small squares, are as they are."""
    source = Source(inputs=torch.zeros((6, *shape), dtype=torch.uint8), targets=torch.arange(6) % 2, num_classes=2)
    select(source, reading=1)
    if is_refused:
        with pytest.raises(ValueError, match=r"(bring them to|leave them as) \[[13], "):
            select(source)
    else:
        select(source)
