"""A function of the user's that no file holds, such as one of a notebook's cell: kept as a file in the study's folder.

The file has a line of JSON, then what cloudpickle wrote. The digest is in the line, so it is read without loading the function.
"""

from __future__ import annotations

import io
import json
import pickle
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpo.errors import SpecError, StudyError
from hpo.files import atomic_write
from hpo.spec.captures import Captures, module_of

FILE = "function.pickle"
AGAIN = "call hpo.search with the function again"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is known of a pickled function without loading it."""

    digest: str
    parts: dict[str, str]  # the digest of the code and of each captured value, by words for it
    folders: list[str]  # that its modules are imported from
    python: str  # version without the last number; bytecode fits no other


def is_pickled(reference: str | None) -> bool:
    """Return whether a reference names a pickled function."""
    return reference is not None and reference.partition(":")[0] == FILE


def write(function: Any, folder: Path) -> str:
    """Pickle a function into a folder and return the reference to it.

    Raises SpecError, which names the object, for a captured value that cannot be pickled, is too large, is an open handle, or
    lies on a GPU.
    """
    captures = Captures(function)
    try:
        content = _dumps(function)
    except Exception as error:  # whatever a class of the user's raises
        raise SpecError(f"the function cannot be pickled: {type(error).__name__}: {error}") from error
    head = Head(
        digest=captures.digest,
        parts=captures.parts,
        folders=captures.folders,
        python=_python(),
    )
    _write(folder / FILE, json.dumps(asdict(head)).encode() + b"\n" + content)
    return f"{FILE}:{getattr(function, '__name__', type(function).__name__)}"


def _dumps(function: Any) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            module = module_of(value)
            return (getattr, (module, value.__name__)) if module else super().reducer_override(value)

    file = io.BytesIO()
    Pickler(file).dump(function)
    return file.getvalue()


def keep(source: Path, folder: Path) -> None:
    """Copy the pickled function from one folder into another, in place of the one that is there."""
    if source.absolute() != folder.absolute():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / FILE, (source / FILE).read_bytes())


def _write(file: Path, content: bytes) -> None:
    try:
        with atomic_write(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise StudyError(f"{file}: cannot be written: {error.strerror}") from None


def head(folder: Path) -> Head:
    """Read what is known of the pickled function in a folder. Raises SpecError if it cannot be read."""
    return _read(folder)[0]


def load(folder: Path) -> Any:
    """Load the pickled function in a folder. Raises SpecError for a file of another version of Python."""
    found, content = _read(folder)
    if found.python != _python():
        raise SpecError(
            f"{folder / FILE}: was pickled by Python {found.python}, here is {_python()}; "
            f"start workers with Python {found.python}, or {AGAIN}"
        )
    return pickle.loads(content)


def changed(old: Path, new: Path) -> str:
    """Return in words what differs between the pickled functions in two folders, "" if that is not known."""
    try:
        before, after = head(old).parts, head(new).parts
    except SpecError:
        return ""
    return ", ".join(_differences(before, after))


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [part for part in sorted({*before, *after}) if before.get(part) != after.get(part)]


def _read(folder: Path) -> tuple[Head, bytes]:
    file = folder / FILE
    try:
        line, _, content = file.read_bytes().partition(b"\n")
        return Head(**json.loads(line)), content
    except OSError as error:
        raise SpecError(f"{file}: the pickled function cannot be read: {error.strerror}; {AGAIN}") from None
    except (ValueError, TypeError):
        raise SpecError(f"{file}: holds no pickled function; {AGAIN}") from None


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])
