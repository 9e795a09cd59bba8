"""Small image files in folders of classes, each of another grey, so that one can be told from all others."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

SIZE = 4  # edge


def write(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Write so many images of one grey each, `start` and up, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(start, start + count)]
    for grey, path in enumerate(paths, start):
        Image.new("RGB", (SIZE, SIZE), (grey, grey, grey)).save(path)
    return paths


def classes(root: Path, count: int = 8, names: tuple[str, ...] = ("cat", "dog"), start: int = 0) -> Path:
    """Write a folder of so many images for each class."""
    for number, name in enumerate(names):
        write(root / name, count, start + number * count)
    return root


def cycle(folder: Path) -> None:
    """Let a folder hold a link to itself."""
    os.symlink(folder, folder / "again", target_is_directory=True)
