"""Checkpoint files: whole or not there, with a digest, and holding nothing that runs code when it is read.

What is in the state is the caller's business, as long as it is made of tensors and plain Python values.
"""

from __future__ import annotations

import copy
import hashlib
import os
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hpo.errors import CheckpointError
from hpo.spec.failures import SPOILING, kind_of

PLAIN = (bool, int, float, str, type(None))


def save(path: Path | str, state: dict[str, Any]) -> str:
    """Write the state to a file that appears whole or not at all, and return the SHA-256 of the file as hex.

    Folders are made. When this returns, the file has reached the disk. CheckpointError if `load` could not
    read it back; OSError if the disk does not take it, and then what stood there before still does.
    """
    path = Path(path)
    _refuse_objects(state, "state")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # same folder, so that the rename is atomic
    try:
        with open(unfinished, "x+b") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return digest


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(_compact(state, {}), file)
    except RuntimeError as error:  # in which torch wraps what the disk had to say
        if kind_of(error) in SPOILING:
            raise  # what the GPU had to say
        raise OSError(f"the state could not be written: {error.__context__ or error}") from error


def load(path: Path | str, digest: str | None = None) -> dict[str, Any]:
    """Read a state back with its tensors on the CPU; CheckpointError if the file is missing, another, or
    unreadable.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; apart, so that only opening is told as such
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be opened ({error.strerror}); check that this machine sees the checkpoint folder"
        ) from error
    with file:  # hashed and read through one handle, so that both see one file
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if digest is not None and found != digest:
            raise CheckpointError(
                f"checkpoint {path} has SHA-256 {found}, recorded is {digest}: it was overwritten or "
                "damaged; restore the file, or start the trial again from epoch 0"
            )
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reads damaged files into errors of any type
            raise CheckpointError(
                f"checkpoint {path} cannot be read by torch {torch.__version__} ({type(error).__name__}: "
                f"{error}); restore the file, or start the trial again from epoch 0"
            ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(state).__name__}, not a dict; give a file written by `save`"
        )
    return state


def _refuse_objects(value: object, where: str) -> None:
    """Raise at saving, where it can be mended, rather than when `load` meets a type that it will not run code
    for.
    """
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, child in value.items():
            if type(key) not in PLAIN:
                raise CheckpointError(
                    f"{where} has the key {key!r} of type {type(key).__name__}; use a plain Python value"
                )
            _refuse_objects(child, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, child in enumerate(value):
            _refuse_objects(child, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in PLAIN:
        raise CheckpointError(
            f"{where} is {value!r} of type {type(value).__name__}; "
            "a checkpoint holds tensors and plain Python values only"
        )


def _compact(value: Any, copies: dict[tuple[object, ...], Any]) -> Any:
    """Return a state in which no tensor is a view of something larger: torch writes whole storages.

    Args:
        copies: of such views, so that two of one place stay one.
    """
    if isinstance(value, dict):
        compact = copy.copy(value)  # with what torch notes on the dict of a model
        compact.update((key, _compact(child, copies)) for key, child in value.items())
        return compact
    if isinstance(value, list | tuple):
        return type(value)(_compact(child, copies) for child in value)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    storage = value.untyped_storage()
    if storage.nbytes() <= value.numel() * value.element_size():
        return value
    place = (storage.data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype, value.device)
    if place not in copies:
        copies[place] = value.detach().clone()
    return copies[place]


def _sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk; without it a power cut may undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
