"""Packages that only some steps need: imported when one of them is asked for, and named where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpo.errors import Fault

#: extra of ours -> the packages in it
EXTRAS = {"int8": ("torchao",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def need(extra: str, purpose: str) -> None:
    """Raise Fault with the command that installs an extra, unless all of its packages are there."""
    missing = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    if missing:
        raise Fault(
            f"{purpose}: needs {', '.join(missing)}, not installed here: pip install 'hpo[{extra}]' "
            f"(from a checkout: pip install --constraint constraints.txt '.[{extra}]')"
        )


def module(name: str) -> Any:
    """Import a module of a package that may be missing; whoever calls has asked `need` before."""
    with quietly():
        return importlib.import_module(name)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what torch's exporters and torchao tell their own developers (deprecations, steps) from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # not by logger: importing parts of torch gives its loggers their levels anew
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
