"""Waiting for what another thread or process does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

#: Seconds after which a test gives up on something. A busy machine may be ten times slower than an idle one.
PATIENCE = 300.0


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def heard(process: subprocess.Popen[str]) -> str:
    """Wait for a process's next line and return it."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def ended(process: subprocess.Popen[str]) -> int:
    """Wait for a process's end and return its exit code."""
    process.communicate(timeout=PATIENCE)
    return process.returncode
