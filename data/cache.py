"""Sources kept on disk in the form in which they are used: raw bytes that a memory map opens at once.

An entry appears whole, by a rename, or not at all; whoever comes while it is being made waits for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hpo.data.files import BadFile, data_dir
from hpo.data.source import Source

FORMAT = 1  # raised when an entry's files change their meaning
ABOUT = "about.json"  # written last


def cached(name: str, key: Any, write: Callable[[Path], None]) -> Source:
    """Return the source kept under a name and a key of plain values; its images are a memory map.

    If there is none, `write` is called with a folder, once among all processes, and leaves a source in it as `keep` and
    `describe` do. What it raises is passed on, and nothing is kept then.
    """
    text = json.dumps([FORMAT, key], sort_keys=True)
    place = data_dir() / "cache" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not place.exists():
        _prepare(place.parent)
        with FileLock(f"{place}.lock"):
            if not place.exists():
                _make(place, write)
    return _read(place)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadFile(f"{folder}: cannot be written: {error.strerror}; name another folder by HPO_DATA_DIR") from error


def _make(place: Path, write: Callable[[Path], None]) -> None:
    unfinished = place.with_name(f"{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        write(unfinished)
        for path in [*unfinished.iterdir(), unfinished]:
            _sync(path)
        unfinished.rename(place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync(place.parent)


def keep(folder: Path, source: Source) -> None:
    """Write a source that is in memory."""
    assert isinstance(source.images, Tensor)
    assert source.test_images is None or isinstance(source.test_images, Tensor)
    _save(folder / "images.npy", source.images)
    _save(folder / "labels.npy", source.labels)
    if source.test_images is not None and source.test_labels is not None:
        _save(folder / "test_images.npy", source.test_images)
        _save(folder / "test_labels.npy", source.test_labels)
    describe(folder, source.classes)


def describe(folder: Path, classes: Sequence[str]) -> None:
    """Write what the classes of the images and labels in a folder are called."""
    (folder / ABOUT).write_text(json.dumps({"classes": list(classes)}))


def _save(path: Path, values: Tensor) -> None:
    np.save(path, values.numpy(), allow_pickle=False)


def _read(place: Path) -> Source:
    classes = json.loads((place / ABOUT).read_text())["classes"]
    has_test = (place / "test_labels.npy").exists()
    return Source(
        images=_mapped(place / "images.npy"),
        labels=torch.from_numpy(np.load(place / "labels.npy")),
        num_classes=len(classes),
        classes=tuple(classes),
        test_images=_mapped(place / "test_images.npy") if has_test else None,
        test_labels=torch.from_numpy(np.load(place / "test_labels.npy")) if has_test else None,
    )


def _mapped(path: Path) -> Tensor:
    # "c": torch warns about memory that it may not write to; what is written goes to a copy, never to the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
