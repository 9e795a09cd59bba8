"""Refuse calls of Optuna while user code is imported: `hpo` itself creates the study and runs the trials."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from hpo.errors import SpecError


class Refused(SpecError):
    """Raised when user code called Optuna during its import."""


#: What refuses a call in the blocks of `refused`, the innermost last.
_refusals: list[Callable[[], NoReturn]] = []


def check_not_importing() -> None:
    """End the import of user code that calls this. `hpo.search` does so, since it makes and runs a study."""
    if _refusals:
        _refusals[-1]()


class _Stop(BaseException):
    """Ends the import. It is a BaseException, so an `except Exception` in user code does not catch it."""


@contextmanager
def refused() -> Iterator[None]:
    """Refuse, within this block, calls that create or open a study or storage, or that run trials.

    No such call writes anything. Raises Refused, which names the calling line, even if user code catches the refusal.
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
            _refusals.append(refuse)
            restored.callback(_refusals.pop)
            yield
    finally:
        if made:
            raise Refused(f"it runs an Optuna study during its import, at {made[0]}") from None


def _entry_points() -> list[tuple[Any, str]]:
    """Return (owner, attribute) of the functions that such calls go through."""
    optuna: Any = importlib.import_module("optuna")  # by name: hpo.train must not depend on Optuna
    storages = optuna.storages
    return [
        (storages, "get_storage"),  # create_study, load_study, copy_study, delete_study, Study
        (storages.RDBStorage, "__init__"),
        (storages.journal.JournalFileBackend, "__init__"),
        *((optuna.Study, name) for name in ("optimize", "ask", "tell", "enqueue_trial", "add_trial")),
    ]


def _caller(frame: FrameType | None) -> str:
    """Return the line that called Optuna and the module-level line that led to it."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("optuna", "hpo"):
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
