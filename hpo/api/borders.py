"""What a call into `hpo` leaves as it was in the caller's process, and the errors that it raises."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hpo.errors import StorageError


@contextmanager
def called() -> Iterator[None]:
    """Restore Optuna's verbosity, the filters of warnings and `sys.argv` after the block.

    Raises StorageError for an error of the database.
    """
    import optuna

    from hpo.storage.connect import FAILURES, cause
    from hpo.strategy.quiet import quiet_warnings

    verbosity, argv = optuna.logging.get_verbosity(), list(sys.argv)
    try:
        with warnings.catch_warnings():
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            quiet_warnings()
            yield
    except FAILURES as error:
        raise StorageError(f"the storage failed: {cause(error)}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)
        sys.argv[:] = argv
