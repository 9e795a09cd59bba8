"""What is transparent is laid on a declared colour, or kept as a channel; it is not dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile

HALF = 128  # of 255, a black pixel's alpha: on white it is 127


def rgba(path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, HALF)).save(path)


def la(path: Path) -> None:
    Image.new("LA", (4, 4), (0, HALF)).save(path)


def pa(path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(path, transparency=bytes([HALF, 255]))


def webp(path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, HALF)).save(path.with_suffix(".webp"), lossless=True, exact=True)


@pytest.mark.parametrize("write", [rgba, la, pa, webp])
@pytest.mark.parametrize(
    ("options", "pixel"),
    [
        ({}, [127, 127, 127]),
        ({"background": "black"}, [0, 0, 0]),
        ({"background": "#ff8000"}, [127, 64, 0]),
        ({"colour": "grey"}, [127]),
        ({"colour": "rgba"}, [0, 0, 0, HALF]),
        ({"colour": "grey_alpha"}, [0, HALF]),
        ({"reading": 1}, [0, 0, 0]),
    ],
)
def test_alpha_counts(tmp_path: Path, write, options: dict, pixel: list[int]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (200, 200, 200)).save(tmp_path / name / "x.png")
    write(tmp_path / "a" / "clear.png")
    if options.get("background") == "black":
        with pytest.raises(BadFile, match="cannot be seen on the background, since its opaque"):
            read(tmp_path, **options)
        return
    found = read(tmp_path, **options)
    assert np.abs(found.images[0, :, 0, 0].int().numpy() - pixel).max() <= 1
    laid = ("colour" not in options and "reading" not in options) or options.get("colour") == "grey"
    assert bool(found.notes) == laid
    if laid:
        assert found.notes[0].startswith("1 of 3 images have transparent pixels and are laid on #ff")


def read(root: Path, **options: object) -> Source:
    return SOURCES["image_folder"](root=str(root), size=2, **options)


@pytest.mark.parametrize(("mode", "key", "other"), [("RGB", (10, 20, 30), (250, 0, 0)), ("L", 9, 200), ("P", 1, 0)])
def test_one_transparent_colour_of_a_png(tmp_path: Path, mode: str, key, other) -> None:
    """tRNS in RGB and L, and one entry of a palette: pixels of that colour are white."""
    for name, value in (("a", key), ("b", other)):
        (tmp_path / name).mkdir()
        image = Image.new(mode, (4, 4), value)
        if mode == "P":
            image.putpalette([250, 0, 0, 10, 20, 30])
        image.putpixel((3, 3), other)
        image.save(tmp_path / name / "x.png", transparency=key)
    found = read(tmp_path)
    assert found.images[0, :, 0, 0].tolist() == [255, 255, 255]
    assert found.images[1, :, 0, 0].tolist() == ([200] * 3 if mode == "L" else [250, 0, 0])


def test_classes_that_differ_in_alpha_alone_differ(tmp_path: Path) -> None:
    for name, alpha in (("a", 255), ("b", 60)):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (4, 4), (90, 90, 90, alpha)).save(tmp_path / name / "x.png")
    images = read(tmp_path).images
    assert (images[1] > images[0]).all()


def test_white_on_nothing_does_not_become_plain_white(tmp_path: Path) -> None:
    for name, box in (("a", (0, 0, 2, 4)), ("b", (0, 0, 4, 2))):
        (tmp_path / "root" / name).mkdir(parents=True)
        icon = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        icon.paste((255, 255, 255, 255), box)
        icon.save(tmp_path / "root" / name / "x.png")
    with pytest.raises(BadFile, match="2 of 2 files cannot be used"):
        read(tmp_path / "root")
    found = SOURCES["image_folder"](root=str(tmp_path / "root"), size=4, background="black")
    assert found.images[0, 0].tolist() == [[255, 255, 0, 0]] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "noir"}, "background = 'noir': is not a colour"),
        ({"background": "#ffffff80"}, "background = '#ffffff80': is not a colour"),
        ({"background": "white", "colour": "rgba"}, "background = 'white': colour = 'rgba' keeps what is transparent"),
    ],
)
def test_a_background_that_is_none_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, **options)
    assert message in str(caught.value)
