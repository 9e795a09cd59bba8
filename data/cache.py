"""Disk cache of prepared sources, as raw arrays that are opened by memory map.

An entry appears whole, by a rename, or not at all. Other processes wait while it is being made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hpo.data.files import BadFile, data_dir
from hpo.data.inputs import Inputs
from hpo.data.source import Source

FORMAT = 1  # increase it when the files of an entry change their meaning
ABOUT = "about.json"  # written last


def cached(name: str, key: Any, write: Callable[[Path], None]) -> Source:
    """Return the source cached under a name and a key. Its images are a memory map.

    If there is none, `write` is called, once among all processes. If it raises, nothing is cached and the error is
    passed on. BadFile if the cache folder cannot be written.

    Args:
        key: plain values for JSON, everything that the source depends on.
        write: writes a source into a folder with `keep`, or writes arrays and calls `describe`.
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
        raise BadFile(
            f"{folder}: cannot be written: {error.strerror}; name another folder with HPO_DATA_DIR"
        ) from error


def _make(place: Path, write: Callable[[Path], None]) -> None:
    unfinished = place.with_name(f"{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
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
    """Write a source that is in memory into a folder."""
    for part, found in (("", (source.inputs, source.targets)), *_own_parts(source)):
        assert isinstance(found[0], Tensor)
        _save(folder / f"{part}images.npy", found[0])
        _save(folder / f"{part}labels.npy", found[1])
    of_task = {"task": source.task, "target_names": list(source.target_names)}
    describe(folder, source.classes, source.notes, {} if source.task == "classification" else of_task)


def _own_parts(source: Source) -> list[tuple[str, tuple[Inputs, Tensor]]]:
    parts = {"validation_": source.own_validation, "test_": source.own_test}
    return [(prefix, own) for prefix, own in parts.items() if own is not None]


def describe(
    folder: Path, classes: Sequence[str], notes: Sequence[str] = (), of_task: Mapping[str, Any] | None = None
) -> None:
    """Write the names of the classes, by number, and the notes on the files into a folder.

    Args:
        of_task: the task and the names of its targets, if it is no classification.
    """
    found = {"classes": list(classes), "notes": list(notes), **(of_task or {})}
    (folder / ABOUT).write_text(json.dumps(found))


def _save(path: Path, values: Tensor) -> None:
    np.save(path, values.numpy(), allow_pickle=False)


def _read(place: Path) -> Source:
    about = json.loads((place / ABOUT).read_text())
    task = about.get("task", "classification")
    validation, test = (
        (_mapped(place / f"{part}_images.npy"), _loaded(place / f"{part}_labels.npy"))
        if (place / f"{part}_labels.npy").exists()
        else (None, None)
        for part in ("validation", "test")
    )
    return Source(
        inputs=_mapped(place / "images.npy"),
        targets=_loaded(place / "labels.npy"),
        task=task,
        target_names=tuple(about.get("target_names", ())),
        num_classes=len(about["classes"]) if task == "classification" else 0,
        classes=tuple(about["classes"]),
        notes=tuple(about.get("notes", ())),
        validation_inputs=validation[0],
        validation_targets=validation[1],
        test_inputs=test[0],
        test_targets=test[1],
    )


def _loaded(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def _mapped(path: Path) -> Tensor:
    # "c" (copy on write): torch warns about read-only memory. Writes go to a copy, never to the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
