"""Folders of image files, one folder per class. Images are decoded and resized once, then read as raw pixels."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Le
from PIL import Image, ImageColor, ImageOps

from hpo.data.cache import cached, describe
from hpo.data.files import BadFile, File, OptionalFile, existing_file, existing_folder
from hpo.data.listing import ImageFile, Layout, Listing, listed, listed_as_before
from hpo.data.named_images import tabled
from hpo.data.names import Part
from hpo.data.sheet import Column
from hpo.data.source import Reading, Source

Edge = Annotated[int, Ge(1), Le(4096)]
WhiteLevel = Annotated[int, Ge(256), Le(2**31 - 1)]
Size = tuple[int, int]  # height, width
Colour = Literal["rgb", "grey", "rgba", "grey_alpha"]

COLOURS = {"rgb": ("RGB", 3), "grey": ("L", 1), "rgba": ("RGBA", 4), "grey_alpha": ("LA", 2)}  # Pillow's mode, channels
WITH_ALPHA = ("rgba", "grey_alpha")
DEEP = ("I", "F")  # first letters of modes with more than 8 bits per channel, whose values Pillow would clip
SIXTEEN = ";16"  # in Pillow's raw mode of a coloured file with 16 bits per channel, of which Pillow keeps the upper 8
FULL = 65_535  # white of 16 bits
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # formats that Pillow decodes without another program
FITS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {
    "crop": lambda image, size: ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR),
    "pad": lambda image, size: ImageOps.pad(image, size[::-1], Image.Resampling.BILINEAR),
    "stretch": lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
}
log = logging.getLogger(__name__)
TOLD_SECONDS = 1.0  # between two lines on how far decoding has come
TOLD = 10  # most bad files named in a message
MOST_PIXELS = 89_478_485  # of one image: a quarter of a GiB as RGB; above it Pillow warns of a decompression bomb
MANY_PIXELS = 2**24  # images with more pixels are decoded one at a time
PLAIN = 2  # of 255: pixels that differ less from the background cannot be seen on it


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How each file is decoded."""

    size: Size
    colour: str
    fit: str
    background: tuple[int, ...] | None  # RGB behind transparent pixels; None: alpha is dropped, or kept as a channel
    white_level: int | None = None  # value of white in a file of more than 8 bits; None: such a file is refused

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, [C, H, W]."""
        return COLOURS[self.colour][1], *self.size


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one file."""

    fault: str = ""  # why it cannot be used
    was_laid: bool = False  # its transparent pixels lie on the background
    lost_bits: bool = False  # it has 16 bits per channel, of which the upper 8 are kept


def image_folder(
    *,
    root: File,
    validation_root: OptionalFile = None,
    test_root: OptionalFile = None,
    layout: Layout | None = None,
    labels: OptionalFile = None,
    label_column: Column | None = None,
    group_column: Column | None = None,
    size: Edge | list[Edge] = 64,
    colour: Colour = "rgb",
    background: str | None = None,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    white_level: WhiteLevel | None = None,
    reading: Reading = 2,
) -> Source:
    """Return the images below `root/CLASS/`, at any depth.

    Files need one of the endings that torchvision's ImageFolder knows. Folders named train, val and test, in their
    usual spellings, are parts of the data and hold the folders of the classes. Hidden files are skipped. A file with
    several links is read once. Images are decoded again when paths, sizes or modification times change. BadFile lists
    the files that cannot be decoded.

    Args:
        root: folder whose folders are the classes, in the order of their names, or the parts of the data.
        validation_root: folder of the validation part, with the same classes.
        test_root: folder of the test part, with the same classes.
        layout: whether the folders of the root are classes or parts, where their names are ambiguous.
        labels: CSV file with a column of files below the root, with or without their ending, and a column of labels. A
            column with nothing but train, val and test assigns the parts. Folders are not classes then.
        label_column: column of labels in the CSV file, by name or by number from 1, if there are several candidates.
        group_column: column of groups in the CSV file, such as patients, for a split by group.
        size: size of the decoded images in pixels: one side, or [height, width].
        colour: channels of the decoded images; `rgba` and `grey_alpha` keep transparency as the last channel.
        background: colour behind transparent pixels, such as "black" or "#808080" (default white).
        fit: how another aspect ratio is fitted: crop the middle, pad with black, or stretch.
        white_level: value of white in grey files with more than 8 bits, such as 65535, or 4095 of a 12-bit camera. Such
            files are refused without it. Files of 8 bits stay as they are.
        reading: 1 reads as hpo did before December 2026: hidden files are images, folders named train are classes,
            alpha is dropped.
    """
    edges = size if isinstance(size, list) else [size, size]
    if len(edges) != 2:
        raise ValueError(f"size = {size}: write one number, or [height, width]")
    decoding = Decoding(
        size=(edges[0], edges[1]),
        colour=colour,
        fit=fit,
        background=_ground(background, colour, reading),
        white_level=white_level,
    )
    folder = existing_folder(root, "root")
    roots: dict[Part, str | None] = {"validation": validation_root, "test": test_root}
    own = {part: existing_folder(path, f"{part}_root") for part, path in roots.items() if path is not None}
    if labels is not None and (own or layout or reading == 1):
        raise ValueError(
            f"labels = {labels!r}: goes with root alone; remove validation_root, test_root, layout and reading"
        )
    for option, column in (("label_column", label_column), ("group_column", group_column)):
        if column is not None and labels is None:
            raise ValueError(f"{option} = {column!r}: is the column of a CSV file; write labels, or remove it")
    key: list[Any]
    if reading == 1:
        found = listed_as_before(folder, own.get("test"))
        folders = [(part, own.get(part, folder)) for part in found.parts]
        key = [decoding.shape, fit, [[str(path), _states(found.parts[part])] for part, path in folders]]
    else:
        found = (
            listed(folder, own, layout)
            if labels is None
            else tabled(folder, existing_file(labels, "labels"), label_column, group_column)
        )
        states = {part: [_states(files), [file.label for file in files]] for part, files in found.parts.items()}
        key = [reading, decoding.shape, fit, decoding.background, found.classes, states]
    key += [white_level] if white_level else []  # so that what is cached without it stays in use
    source = cached("image_folder", key, lambda target: _write(found, decoding, target))
    paths = [str(file.path) for file in found.parts["train"]]
    groups = {part: torch.tensor(numbers) for part, numbers in found.groups.items()}
    return replace(
        source,
        groups=groups.get("train"),
        validation_groups=groups.get("validation"),
        test_groups=groups.get("test"),
        notes=(*found.notes, *source.notes),
        place=paths.__getitem__,
        reading=reading,
    )


def _ground(background: str | None, colour: str, reading: Reading) -> tuple[int, ...] | None:
    """Return the RGB colour behind transparent pixels; None if there is no background."""
    if colour in WITH_ALPHA or reading == 1:
        if background is not None:
            why = (
                f"colour = {colour!r} keeps what is transparent" if colour in WITH_ALPHA else "reading = 1 drops alpha"
            )
            raise ValueError(f"background = {background!r}: {why}; remove one of the two")
        return None
    try:
        found = ImageColor.getrgb(background or "white")
    except ValueError:
        found = (0, 0, 0, 0)
    if len(found) != 3:
        raise ValueError(f'background = {background!r}: is not a colour; write one such as "black" or "#808080"')
    return found


def _states(files: Sequence[ImageFile]) -> list[list[str | int]]:
    return [[str(file.path), *file.state, *([file.fault] if file.fault else [])] for file in files]


def _write(found: Listing, decoding: Decoding, folder: Path) -> None:
    """Decode and write all parts; BadFile lists the files that cannot be used."""
    outcomes: list[Outcome] = []
    for part, files in found.parts.items():
        prefix = "" if part == "train" else f"{part}_"
        outcomes += _decode(files, decoding, folder / f"{prefix}images.npy")
        np.save(folder / f"{prefix}labels.npy", np.array([file.label for file in files], dtype=np.int64))
    count = len(outcomes)
    if bad := [one.fault for one in outcomes if one.fault]:
        more = [f"and {len(bad) - TOLD} more"] if len(bad) > TOLD else []
        raise BadFile(f"{len(bad)} of {count} files cannot be used; mend or remove them:", *bad[:TOLD], *more)
    laid, reduced = sum(one.was_laid for one in outcomes), sum(one.lost_bits for one in outcomes)
    notes = [_laid(laid, count, decoding)] if laid else []
    notes += [f"{reduced} of {count} images have 16 bits per channel, of which the upper 8 are kept"] if reduced else []
    describe(folder, found.classes, notes)


def _laid(transparent: int, count: int, decoding: Decoding) -> str:
    colour = "#" + "".join(f"{value:02x}" for value in decoding.background or ())
    return (
        f"{transparent} of {count} images have transparent pixels and are laid on {colour}; `background` sets another "
        'colour, colour = "rgba" keeps alpha as a channel'
    )


def _decode(files: Sequence[ImageFile], decoding: Decoding, target: Path) -> list[Outcome]:
    """Decode files into an array [N, C, H, W] on disk, in threads on all cores: Pillow releases the GIL."""
    images = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), *decoding.shape))
    large = Lock()
    Image.init()  # without it Pillow knows only some of the formats

    def decode(row: int) -> Outcome:
        file = files[row]
        try:
            if file.fault:
                raise ValueError(file.fault)
            images[row], outcome = _decoded(file.path, decoding, large)
        except Exception as error:  # Pillow may raise any exception for a damaged file
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Outcome(fault=f"{file.path}: {said or type(error).__name__}")
        return outcome

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # decompression bombs are refused by size below, and palettes are converted
        found = []
        told_at = time.monotonic()
        for result in pool.map(decode, range(len(files))):
            found.append(result)
            if time.monotonic() - told_at >= TOLD_SECONDS:
                log.info("preparing the data: decoded %d of %d images", len(found), len(files))
                told_at = time.monotonic()
    images.flush()
    return found


def _decoded(path: Path, decoding: Decoding, large: Lock) -> tuple[npt.NDArray[np.uint8], Outcome]:
    """Return an image [C, H, W] and how it was read."""
    with Image.open(path, formats=FORMATS) as opened:
        pixels = opened.width * opened.height
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"has {opened.width}x{opened.height} pixels, more than {MOST_PIXELS:,} in all; make it smaller"
            )
        is_deep = opened.mode.startswith(DEEP)
        lost_bits = not is_deep and any(SIXTEEN in str(tile.args) for tile in opened.tile)
        _refuse_bits(opened.mode, decoding.white_level, lost_bits)
        with large if pixels > MANY_PIXELS else nullcontext():
            upright = ImageOps.exif_transpose(opened)
            if is_deep and decoding.white_level:
                upright = _scaled(upright, decoding.white_level)
            coloured, was_laid = _coloured(upright, decoding)
            image = FITS[decoding.fit](coloured, decoding.size)
    values = np.asarray(image).reshape(*decoding.size, -1)
    return np.ascontiguousarray(values.transpose(2, 0, 1)), Outcome(was_laid=was_laid, lost_bits=lost_bits)


def _refuse_bits(mode: str, white_level: int | None, lost_bits: bool) -> None:
    """Raise ValueError for an image of more than 8 bits that cannot be read as declared."""
    if mode.startswith("F"):
        raise ValueError(f"has pixels of mode {mode}, numbers with a fraction; convert it to whole numbers")
    if mode.startswith(DEEP) and white_level is None:
        raise ValueError(
            f"has pixels of mode {mode}, more than 8 bits each; write the value of white, such as white_level = {FULL}, "
            "or convert it to 8 bits"
        )
    if lost_bits and white_level not in (None, FULL):
        raise ValueError(
            f"has colours of 16 bits, which are read with white_level = {FULL} only; convert it to 8 bits, or to grey"
        )


def _scaled(image: Image.Image, white_level: int) -> Image.Image:
    """Return an image of more than 8 bits as grey of 8 bits; ValueError for a value outside black and white."""
    values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > white_level:
        raise ValueError(
            f"has values from {lowest} to {highest}, and white_level = {white_level} allows 0 to {white_level}"
        )
    return Image.fromarray(np.rint(values * (255 / white_level)).astype(np.uint8))


def _coloured(image: Image.Image, decoding: Decoding) -> tuple[Image.Image, bool]:
    mode, _ = COLOURS[decoding.colour]
    if not image.has_transparency_data or (decoding.background is None and decoding.colour not in WITH_ALPHA):
        return image.convert(mode), False
    clear = image.convert("RGBA")
    lowest, highest = clear.getchannel("A").getextrema()
    if decoding.background is None or lowest == 255:
        return clear.convert(mode), False
    laid = Image.new("RGBA", clear.size, (*decoding.background, 255))
    laid.alpha_composite(clear)
    flat = laid.convert("RGB")
    distance = np.abs(np.asarray(flat, dtype=np.int16) - np.array(decoding.background)).max()
    if highest and distance <= PLAIN:
        raise ValueError(
            "cannot be seen on the background, since its opaque pixels have the same colour; "
            'write another `background`, or colour = "rgba"'
        )
    return flat.convert(mode), True
