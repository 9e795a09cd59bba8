"""Which GPUs there are, asked without opening CUDA: the parent of GPU workers must never hold a context."""

from __future__ import annotations

import os
import shutil
import subprocess


def visible() -> list[str]:
    """Return what to set CUDA_VISIBLE_DEVICES to for each GPU that this process may use; [] without any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device.strip() for device in given.split(",") if device.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run(
            [program, "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []
