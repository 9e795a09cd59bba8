"""What a result was made from: code, versions, machine, seeds. One receipt a trial, kept in the ledger and in exports."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("hpo", "torch", "torchvision", "optuna", "numpy", "scikit-learn")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a curve depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit(folder: Path) -> str:
    """Return the commit of the folder's repository, with "-dirty" if tracked files differ from it; "" outside of git."""
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
    """Return the name of the CPU: curves repeat bit for bit only on one type of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def receipt(*, folder: Path, device: str, threads: int | None, **more: Any) -> dict[str, Any]:
    """Return the receipt of a trial that this process trains, with whatever else the caller knows.

    Two commits: of the folder of the study's own code, and of `hpo` where it runs from a checkout.
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
