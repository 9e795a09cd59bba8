"""The receipt of a trial: the code, versions, machine and seeds of its result. It is kept in the ledger and in exports."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import hpo

BEST_STEP = "best_step"  # of a user's own loop: the step of the best report, whose weights its checkpoint holds
PACKAGES = ("torch", "torchvision", "optuna", "numpy", "scikit-learn")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which a curve depends."""
    found = {"python": platform.python_version(), "hpo": hpo.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit(folder: Path) -> str:
    """Return the git commit of the folder, with "-dirty" if tracked files were changed; "" outside of git."""
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return ""
    return head + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def processor() -> str:
    """Return the model name of the CPU. Curves repeat bit for bit only on the same model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def receipt(*, folder: Path, device: str, threads: int | None, **more: Any) -> dict[str, Any]:
    """Return the receipt of a trial that this process trains.

    Args:
        folder: the folder of the user's code, whose commit is recorded beside that of `hpo`.
        device: the name of the device.
        threads: the number of CPU threads, None if unknown.
        more: further entries.
    """
    return {
        "commit": git_commit(folder),
        "hpo_commit": git_commit(Path(__file__).parent),
        "versions": versions(),
        "device": device,
        "processor": processor(),
        "threads": threads,
        "host": platform.node(),
        "pid": os.getpid(),
        **more,
    }
