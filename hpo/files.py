"""Atomic writing of files, and reading and writing of JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpo.errors import StudyError


def cache_folder() -> Path:
    """Return the user's cache folder of hpo: HPO_CACHE, else XDG_CACHE_HOME/hpo, else ~/.cache/hpo."""
    folder = os.environ.get("HPO_CACHE")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpo"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` when the block ends.

    The file and its folder are synced to the disk. If the block raises, `path` is unchanged. The temporary file is in the same
    folder. Its name is the name of `path` with a leading dot and a random part before the suffix.
    """
    unfinished = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)  # without it a power failure may undo the rename
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; StudyError if it cannot be read or holds something else."""
    if not path.is_file():  # reading a pipe may block forever
        raise StudyError(f"{path}: cannot be read: it is not a file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path}: is not valid JSON: {error}; restore it, or name another folder") from None
    if not isinstance(found, dict):
        raise StudyError(f"{path}: holds no JSON object; restore it, or name another folder")
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically. Numbers that are not finite become null."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Return the value with None for each float that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
