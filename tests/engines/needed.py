"""What a test with a real engine needs on its machine."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

SBIN = "/usr/sbin"  # Debian's daemons; a user's PATH may lack it


def program(name: str, package: str) -> str:
    """Return the path of a program of a Debian package; skip the test, or fail it in CI, without one."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if found is None:
        _without(f"needs {name} of Debian's package {package}")
    assert found is not None
    return found


def module(name: str, extra: str) -> None:
    """Skip the test, or fail it in CI, without a Python module of an extra of hpo."""
    if importlib.util.find_spec(name) is None:
        _without(f"needs the module {name}: pip install 'hpo-torch[{extra}]'")


def as_root(why: str) -> None:
    """Skip the test, or fail it in CI, without root's rights."""
    if os.geteuid() != 0:
        _without(f"needs root: it {why}")


def _without(missing: str) -> None:
    if os.environ.get("HPO_TEST_ENGINES") == "required":
        pytest.fail(missing)
    pytest.skip(missing)
