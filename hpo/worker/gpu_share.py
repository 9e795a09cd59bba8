"""Which GPUs a worker has, and how many workers share each."""

from __future__ import annotations

import os
from itertools import takewhile

SHARE = "HPO_WORKER_GPUS"  # environment variable: a worker's GPUs, each divided by the workers that share it


def gpu_sharers() -> int:
    """Return how many workers share each of this worker's GPUs, as `hpo run` or Ray's driver says; else 1, as on the CPU."""
    share = float(os.environ.get(SHARE) or 0)
    return max(1, round(len(given_devices() or [""]) / share)) if share else 1


def given_devices() -> list[str] | None:
    """Return the devices of CUDA_VISIBLE_DEVICES, None without it. As for CUDA, a -1 hides all that come after it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    return [*takewhile(lambda device: device not in ("", "-1"), (device.strip() for device in given.split(",")))]
