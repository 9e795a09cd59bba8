"""Code of the user's own, named in a study file as `package.module:name` or `file.py:name`.

It resolves against the study file's folder, which goes last on `sys.path`, so that nothing of ours is shadowed by it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.errors import SpecError, nearest

OURS = ("models", "data")  # parts that once were imported without `hpo.`


def is_reference(name: str) -> bool:
    """Say whether a name in a study file means code of the user's own."""
    return ":" in name


def load(reference: str, folder: Path, path: str) -> Any:
    """Import what a reference names; SpecError at `path` with the cause if that fails."""
    location, _, name = reference.partition(":")
    if not location or not name or location.startswith("."):
        raise SpecError(f'{path} = {reference!r}: names no code; write "file.py:function" or "package.module:function"')
    module = _module(location, folder, path)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise SpecError(f"{path} = {reference!r}: {location} has no {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not callable(found):
        raise SpecError(f"{path} = {reference!r}: is no function, but of type {type(found).__name__}")
    return found


def _module(location: str, folder: Path, path: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if location.endswith(".py") and not (folder / location).is_file():
        raise SpecError(f"{path}: no file {folder / location}; paths are relative to the study file")
    try:
        return _file_module(folder / location) if location.endswith(".py") else importlib.import_module(location)
    except (Exception, SystemExit) as error:
        raise SpecError(
            f"{path}: importing {location} failed: {type(error).__name__}: {error}{_where(error)}{_moved(error)}"
        ) from error


def _moved(error: BaseException) -> str:
    """Return the mend for code that imports our parts without `hpo.`, "" for any other failure."""
    if isinstance(error, ModuleNotFoundError) and error.name in OURS:
        return f"; hpo's own is imported as `hpo.{error.name}`"
    return ""


def _where(error: BaseException) -> str:
    """Return ' (file:line)' of the user's own line that failed, "" if the failure is not inside a file of theirs."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename not in (__file__, importlib.__file__) and not f.filename.startswith("<")]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""


def _file_module(file: Path) -> ModuleType:
    name = f"hpo_user_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def digest(references: Iterable[str], folder: Path, others: Iterable[Path] = ()) -> str:
    """Return the SHA-256 of the files that the references name and of other files; "" if there are none.

    What the references' files import is not in it, nor are others that are not there.
    """
    files = sorted({_source(reference.partition(":")[0], folder) for reference in references})
    files += sorted({other for other in others if other.is_file()})
    if not files:
        return ""
    return hashlib.sha256(b"\0".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _source(location: str, folder: Path) -> Path:
    if location.endswith(".py"):
        return folder / location
    origin = getattr(importlib.import_module(location), "__file__", None)  # already imported by `load`
    if origin is None:
        raise SpecError(f"{location}: has no file of its own (it is built in, or a folder without __init__.py)")
    return Path(origin)
