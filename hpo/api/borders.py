"""What a call into `hpo` leaves as it was in the caller's process, and the errors that it raises."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hpo.errors import StorageError


class _Caller:
    """The settings of the caller's process. The first of several calls at a time changes them, the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._restore = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._calls:
                self._change()
            self._calls += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._restore.close()

    def _change(self) -> None:
        import optuna

        from hpo.strategy.quiet import quiet_warnings

        self._restore.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        self._restore.callback(_set_argv, sys.argv, list(sys.argv))
        self._restore.enter_context(warnings.catch_warnings())
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        quiet_warnings()


def _set_argv(argv: list[str], content: list[str]) -> None:
    argv[:] = content
    sys.argv = argv


_caller = _Caller()


@contextmanager
def called() -> Iterator[None]:
    """Restore Optuna's verbosity, the filters of warnings and `sys.argv` once all calls of this process have ended.

    Raises StorageError for an error of the database.
    """
    from hpo.storage.connect import FAILURES, cause

    try:
        with _caller:
            yield
    except FAILURES as error:
        raise StorageError(f"the storage failed: {cause(error)}") from error
