"""List the GPUs without opening CUDA. The parent of GPU workers must never hold a CUDA context."""

from __future__ import annotations

import os
import shutil
import subprocess


def visible() -> list[str]:
    """Return a value for CUDA_VISIBLE_DEVICES for each GPU that this process may use; [] without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device.strip() for device in given.split(",") if device.strip() not in ("", "-1")]
    return [line for line in _asked("uuid") if line]


def memory() -> tuple[int, int] | None:
    """Return the bytes used and present in all GPUs that this process may use; None if that is not known."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = _asked("memory.used,memory.total", *([f"--id={which}"] if which else []), seconds=2.0)  # the launcher waits
    try:
        found = [[int(number) * 2**20 for number in line.split(",")] for line in lines if line]
        return (sum(used for used, _ in found), sum(total for _, total in found)) if found else None
    except ValueError:
        return None


def _asked(what: str, *options: str, seconds: float = 20.0) -> list[str]:
    """Return what nvidia-smi says of each GPU, a line each; [] without it or if it needs longer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    format_ = "--format=csv,noheader,nounits"
    command = [program, f"--query-gpu={what}", format_, *options]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in said.stdout.splitlines()] if said.returncode == 0 else []
