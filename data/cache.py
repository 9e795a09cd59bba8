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
from hpo.data.stored import Images

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
    for part, found in (("", (source.images, source.labels)), *_own_parts(source)):
        assert isinstance(found[0], Tensor)
        _save(folder / f"{part}images.npy", found[0])
        _save(folder / f"{part}labels.npy", found[1])
    describe(folder, source.classes, source.notes)


def _own_parts(source: Source) -> list[tuple[str, tuple[Images, Tensor]]]:
    parts = {"validation_": source.own_validation, "test_": source.own_test}
    return [(prefix, own) for prefix, own in parts.items() if own is not None]


def describe(folder: Path, classes: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Write what the classes of the images and labels in a folder are called, and what there is to say of the files."""
    (folder / ABOUT).write_text(json.dumps({"classes": list(classes), "notes": list(notes)}))


def _save(path: Path, values: Tensor) -> None:
    np.save(path, values.numpy(), allow_pickle=False)


def _read(place: Path) -> Source:
    about = json.loads((place / ABOUT).read_text())
    validation, test = (
        (_mapped(place / f"{part}_images.npy"), _loaded(place / f"{part}_labels.npy"))
        if (place / f"{part}_labels.npy").exists()
        else (None, None)
        for part in ("validation", "test")
    )
    return Source(
        images=_mapped(place / "images.npy"),
        labels=_loaded(place / "labels.npy"),
        num_classes=len(about["classes"]),
        classes=tuple(about["classes"]),
        notes=tuple(about.get("notes", ())),
        validation_images=validation[0],
        validation_labels=validation[1],
        test_images=test[0],
        test_labels=test[1],
    )


def _loaded(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def _mapped(path: Path) -> Tensor:
    # "c": torch warns about memory that it may not write to; what is written goes to a copy, never to the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
