"""Deep, palette and CMYK image files are read as declared; a cut file is named; then nothing is cached."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile, data_dir

GREY, COLOURED = 0, 2  # of a PNG


def read(root: Path, **options: object) -> Source:
    return SOURCES["image_folder"](root=str(root), size=2, **options)


def pixels(source: Source) -> torch.Tensor:
    assert isinstance(source.images, torch.Tensor)
    return source.images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with an image of 8 bits each; `a` takes more."""
    for name in ("a", "b"):
        (tmp_path / "root" / name).mkdir(parents=True)
        Image.new("L", (4, 4), 200).save(tmp_path / "root" / name / "x.png")
    return tmp_path / "root"


def sixteen(path: Path, kind: int, values: list[int]) -> None:
    """Write a PNG of 4 x 4 equal pixels with 16 bits per channel; Pillow writes no colours of 16 bits."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" + struct.pack(f">{4 * len(values)}H", *(values * 4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(("white", "pixel"), [(65_535, 8), (4095, 128)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_by_the_declared_white(root: Path, white: int, pixel: int, ending: str) -> None:
    Image.fromarray(np.full((4, 4), 2055, np.uint16)).save(root / "a" / f"deep.{ending}")
    images = pixels(read(root, colour="grey", white_level=white))
    assert [int(image[0, 0, 0]) for image in images] == [pixel, 200, 200]  # the files of 8 bits stay


def test_colours_of_16_bits_keep_the_upper_8_and_a_note_says_so(root: Path) -> None:
    sixteen(root / "a" / "deep.png", COLOURED, [30_000, 255, 65_535])
    for options in ({}, {"white_level": 65_535}):
        found = read(root, **options)
        assert pixels(found)[0, :, 0, 0].tolist() == [117, 0, 255]
        assert found.notes == ("1 of 3 images have 16 bits per channel, of which the upper 8 are kept",)


@pytest.mark.parametrize(
    ("kind", "values", "options", "message"),
    [
        (GREY, [9], {}, "mode I;16, more than 8 bits each; write the value of white, such as white_level = 65535"),
        (GREY, [5000], {"white_level": 4095}, "has values from 5000 to 5000, and white_level = 4095 allows 0 to 4095"),
        (
            COLOURED,
            [9, 9, 9],
            {"white_level": 4095},
            "colours of 16 bits, which are read with white_level = 65535 only",
        ),
    ],
)
def test_bits_that_are_not_declared_are_refused(
    root: Path, kind: int, values: list[int], options: dict, message: str
) -> None:
    sixteen(root / "a" / "deep.png", kind, values)
    with pytest.raises(BadFile) as caught:
        read(root, **options)
    assert f"{root}/a/deep.png: has " in str(caught.value)
    assert message in str(caught.value)
    assert not list(data_dir().glob("cache/*/*.npy"))  # nothing is cached


@pytest.mark.parametrize("ending", ["jpg", "tif"])
@pytest.mark.parametrize(
    ("colour", "pixel"), [("rgb", [255, 0, 0]), ("grey", [76]), ("rgba", [255, 0, 0, 255]), ("grey_alpha", [76, 255])]
)
def test_the_inks_of_cmyk_become_the_declared_channels(root: Path, ending: str, colour: str, pixel: list[int]) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(root / "a" / f"ink.{ending}")
    assert pixels(read(root, colour=colour))[0, :, 0, 0].tolist() == pixel


@pytest.mark.parametrize(
    ("colour", "pixel"), [("rgb", [10, 20, 30]), ("grey", [18]), ("rgba", [10, 20, 30, 255]), ("grey_alpha", [18, 255])]
)
def test_a_palette_becomes_the_declared_channels(root: Path, colour: str, pixel: list[int]) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(root / "a" / "palette.png")
    assert pixels(read(root, colour=colour))[0, :, 0, 0].tolist() == pixel


def test_all_cut_files_are_named_and_nothing_is_cached(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for ending in ("bmp", "jpg", "png", "ppm", "tif", "webp"):
        path = root / "a" / f"cut.{ending}"
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadFile) as caught:
        read(root)
    head, *lines = str(caught.value).splitlines()
    assert head == "6 of 8 files cannot be used; mend or remove them:"
    assert [line.removeprefix(f"{root}/a/").partition(":")[0] for line in lines] == [
        f"cut.{ending}" for ending in ("bmp", "jpg", "png", "ppm", "tif", "webp")
    ]
    assert not list(data_dir().glob("cache/*/*.npy"))
