"""Checkpoint files: written atomically, with a digest, and without objects that run code when they are read.

A state may contain anything that is made of tensors and plain Python values.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hpo.errors import CheckpointError
from hpo.files import atomic_write
from hpo.spec.failures import SPOILING, kind_of

PLAIN = (bool, int, float, str, type(None))


def save(path: Path | str, state: dict[str, Any]) -> str:
    """Write the state atomically to a file and return the file's SHA-256 as hex.

    Missing folders are made. When this returns, the file has reached the disk. CheckpointError if `load` could not read
    the state. OSError if the disk refuses it; an older file at this path is then unchanged.
    """
    path = Path(path)
    refuse_objects(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished, open(unfinished, "x+b") as file:
        _write(state, file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(_compact(state), file)
    except RuntimeError as error:  # torch wraps the disk's errors in it
        if kind_of(error) in SPOILING:
            raise  # an error of the GPU, not of the disk
        raise OSError(f"the state could not be written: {error.__context__ or error}") from error


def load(path: Path | str, digest: str | None = None) -> dict[str, Any]:
    """Read a state, with its tensors on the CPU; CheckpointError if the file is missing, unreadable or another one.

    Args:
        digest: the expected SHA-256 as hex; None: not checked.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; separate, so that only it raises "cannot be opened"
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be opened ({error.strerror}); check that this machine sees the checkpoint folder"
        ) from error
    with file:  # one handle for hashing and reading, so that both see the same file
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if digest is not None and found != digest:
            raise CheckpointError(
                f"checkpoint {path} has SHA-256 {found}, but {digest} is recorded: it was overwritten or "
                "damaged; restore the file, or start the trial again from epoch 0"
            )
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch may raise any exception for a damaged file
            raise CheckpointError(
                f"checkpoint {path} cannot be read by torch {torch.__version__} ({type(error).__name__}: "
                f"{error}); restore the file, or start the trial again from epoch 0"
            ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(state).__name__}, not a dict; give a file written by `save`"
        )
    return state


def refuse_objects(value: object, where: str = "state") -> None:
    """Raise CheckpointError for a type that `load` would refuse: at saving the state can still be mended."""
    if type(value) in (dict, OrderedDict, Counter):
        assert isinstance(value, dict)
        for key, child in value.items():
            if type(key) not in PLAIN:
                raise CheckpointError(
                    f"{where} has the key {key!r} of type {type(key).__name__}; use a plain Python value"
                )
            refuse_objects(child, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, child in enumerate(value):
            refuse_objects(child, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in PLAIN:
        raise CheckpointError(
            f"{where} is {value!r} of type {type(value).__name__}; "
            f"a checkpoint holds tensors and plain Python values only{_instead(value)}"
        )


def _instead(value: object) -> str:
    """Return what to write in the place of a number or array of NumPy."""
    if isinstance(value, np.ndarray):
        return "; write torch.from_numpy(...)"
    return "; write .item()" if isinstance(value, np.generic) else ""


def on_cpu(state: Any) -> Any:
    """Return a copy of a state with its tensors on the CPU. Equal views of one storage stay one tensor."""
    copies: dict[tuple[object, ...], torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        place = _place(tensor) if tensor.layout == torch.strided else (id(tensor),)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    return _with_tensors(state, copied)


def _compact(state: Any) -> Any:
    """Return a state in which no tensor is a view of a larger storage, since torch writes whole storages.

    Equal views stay one tensor.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}

    def compact(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided:
            return tensor
        if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
            return tensor
        place = _place(tensor)
        if place not in copies:
            copies[place] = tensor.detach().clone()
        return copies[place]

    return _with_tensors(state, compact)


def _with_tensors(value: Any, changed: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of a state with each tensor replaced by what `changed` returns for it."""
    if isinstance(value, dict):
        found = copy.copy(value)  # keeps the metadata that torch sets on a model's state dict
        for key, child in value.items():
            found[key] = _with_tensors(child, changed)
        return found
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(child, changed) for child in value)
    return changed(value) if isinstance(value, torch.Tensor) else value


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two equal views of one storage have in common."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
