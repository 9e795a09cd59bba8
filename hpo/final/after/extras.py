"""Optional packages, imported only by the steps that need them. `hpo.spec.extras` says what is installed."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def module(name: str) -> Any:
    """Import a module of an optional package. The caller knows that it is installed."""
    with quietly():
        return importlib.import_module(name)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the warnings and log lines of torch's exporters and of torchao within this block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # not by logger, since importing parts of torch resets the levels of its loggers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
