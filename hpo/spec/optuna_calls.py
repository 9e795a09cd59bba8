"""Optuna's calls while user code is imported: refused, for `hpo` makes the study and runs the trials itself."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from hpo.errors import SpecError


class Refused(SpecError):
    """Raised when code that was imported called Optuna."""


class _Stop(BaseException):
    """Ends the import; a BaseException, so that no `except Exception` of the user's goes on."""


@contextmanager
def refused() -> Iterator[None]:
    """Refuse, within this block, what makes or opens a study or a storage and what runs trials.

    Nothing is written then. Raises Refused that names the line, whatever the user's code makes of the refusal.
    """
    made: list[str] = []

    def refuse(*_: Any, **__: Any) -> NoReturn:
        made.append(_caller(sys._getframe(1)))
        raise _Stop

    try:
        with ExitStack() as restored:
            for owner, name in _entry_points():
                restored.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, refuse)
            yield
    finally:
        if made:
            raise Refused(f"it runs a study of its own while it is imported, at {made[0]}") from None


def _entry_points() -> list[tuple[Any, str]]:
    """Return the attributes through which each such call goes, with their owners."""
    optuna: Any = importlib.import_module("optuna")  # by name: who trains knows no Optuna, unless user code comes in
    storages = optuna.storages
    return [
        (storages, "get_storage"),  # create_study, load_study, copy_study, delete_study, Study
        (storages.RDBStorage, "__init__"),
        (storages.journal.JournalFileBackend, "__init__"),
        *((optuna.Study, name) for name in ("optimize", "ask", "tell", "enqueue_trial", "add_trial")),
    ]


def _caller(frame: FrameType | None) -> str:
    """Return the line that called Optuna, and the line of the module that led to it."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "optuna":
        frame = frame.f_back
    if frame is None:
        return "in a thread of its own"
    told, module = _line(frame), frame
    while module.f_code.co_name != "<module>" and module.f_back is not None:
        module = module.f_back
    return told if module.f_code.co_name != "<module>" or module is frame else f"{told}, called from {_line(module)}"


def _line(frame: FrameType) -> str:
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{number} ({linecache.getline(file, number).strip()})"
