"""The files of a folder as tensors, for checkpoints of libraries that write folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch


def pack(folder: Path) -> dict[str, torch.Tensor]:
    """Return the files of a folder: {path within the folder: bytes as uint8}."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): torch.from_numpy(np.fromfile(file, np.uint8)) for file in files}


def unpack(files: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write what `pack` returned into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content.numpy().tofile(path)
