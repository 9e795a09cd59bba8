"""A folder of image files, one folder a class: decoded and resized once, then read as raw pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le
from PIL import Image, ImageOps

from hpo.data.cache import cached, describe
from hpo.data.files import BadFile, File, OptionalFile, existing
from hpo.data.source import Source

Edge = Annotated[int, Ge(1), Le(4096)]
Size = tuple[int, int]  # height, width

COLOURS = {"rgb": ("RGB", 3), "grey": ("L", 1)}  # Pillow's mode, channels
DEEP = ("I", "F")  # first letters of modes with more than 8 bits a channel: Pillow would cut their values off
FITS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {
    "crop": lambda image, size: ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR),
    "pad": lambda image, size: ImageOps.pad(image, size[::-1], Image.Resampling.BILINEAR),
    "stretch": lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
}
TOLD = 10  # bad files in a message
BAD = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What is made of each file."""

    size: Size
    colour: str
    fit: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return COLOURS[self.colour][1], *self.size


def image_folder(
    *,
    root: File,
    test_root: OptionalFile = None,
    size: Edge | list[Edge] = 64,
    colour: Literal["rgb", "grey"] = "rgb",
    fit: Literal["crop", "pad", "stretch"] = "crop",
) -> Source:
    """Return the images under `root/CLASS/`, in folders of any depth, in the formats that torchvision's ImageFolder reads.

    They are decoded once for each state of the files (paths, sizes, times of change). BadFile lists those that no image
    comes out of.

    Args:
        root: its folders are the classes, in the order of their names.
        test_root: a test split of its own, likewise, with the same classes.
        size: of what comes out: an edge, or [height, width].
        colour: rgb or grey.
        fit: how another aspect ratio is met: crop the middle, pad with black, or stretch.
    """
    edges = size if isinstance(size, list) else [size, size]
    if len(edges) != 2:
        raise ValueError(f"size = {size}: write one number, or [height, width]")
    decoding = Decoding(size=(edges[0], edges[1]), colour=colour, fit=fit)
    parts = {"": existing(root, "root")} | ({"test_": existing(test_root, "test_root")} if test_root else {})
    classes = _classes(parts[""])
    listed = {prefix: _listed(folder, classes) for prefix, folder in parts.items()}
    key = [decoding.shape, fit, [[str(folder), _states(listed[prefix])] for prefix, folder in parts.items()]]

    def write(folder: Path) -> None:
        for prefix, files in listed.items():
            _decode(files, decoding, folder / f"{prefix}images.npy")
            np.save(folder / f"{prefix}labels.npy", np.array([label for _, label in files], dtype=np.int64))
        describe(folder, classes)

    return cached("image_folder", key, write)


def _classes(root: Path) -> list[str]:
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(found) < 2:
        raise BadFile(f"{root}: has {len(found)} folders; give each class one, at least 2")
    return found


def _listed(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the image files of a part with their classes' numbers, in the order of their paths."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    strangers = set(_classes(root)) - set(classes)
    if strangers:
        raise BadFile(f"{root / min(strangers)}: is no class of the training images; known: {', '.join(classes)}")
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = [path for path in sorted((root / name).rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS]
        if not files:
            raise BadFile(f"{root / name}: holds no image file; known endings: {' '.join(IMG_EXTENSIONS)}")
        found += zip(files, repeat(label))
    return found


def _states(files: Iterable[tuple[Path, int]]) -> list[Any]:
    found = [(path, path.stat()) for path, _ in files]
    return [[str(path), state.st_mtime_ns, state.st_size] for path, state in found]


def _decode(files: Sequence[tuple[Path, int]], decoding: Decoding, target: Path) -> None:
    """Write the images of the files [N, C, H, W] to an array on disk, on all cores: Pillow lets go of Python's lock."""
    images = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), *decoding.shape))

    def decode(row: int) -> str | None:
        try:
            images[row] = _decoded(files[row][0], decoding)
        except BAD as error:
            return f"{files[row][0]}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        bad = [cause for cause in pool.map(decode, range(len(files))) if cause]
    if bad:
        more = [f"and {len(bad) - TOLD} more"] if len(bad) > TOLD else []
        raise BadFile(f"{len(bad)} of {len(files)} files cannot be used; mend or remove them:", *bad[:TOLD], *more)
    images.flush()


def _decoded(path: Path, decoding: Decoding) -> npt.NDArray[np.uint8]:
    mode, _ = COLOURS[decoding.colour]
    with Image.open(path) as opened:
        if opened.mode.startswith(DEEP):
            raise ValueError(f"has pixels of mode {opened.mode}, more than 8 bits each; convert it to 8 bits")
        upright = ImageOps.exif_transpose(opened)
        image = FITS[decoding.fit](upright.convert(mode), decoding.size)
    pixels = np.asarray(image).reshape(*decoding.size, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
