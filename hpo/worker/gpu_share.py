"""How many GPUs a worker has, and how many workers share one."""

from __future__ import annotations

import os
import sys
from itertools import takewhile

SHARE = "HPO_WORKER_GPUS"  # environment variable; a part of one if several workers share it


def gpu_share() -> float:
    """Return how many GPUs this worker has: 0.5 if two workers share one, 0 on the CPU.

    `hpo run` says it. In a worker that was started by hand or by a cluster, CUDA_VISIBLE_DEVICES says it, else torch, once it
    is loaded.
    """
    if given := os.environ.get(SHARE):
        return float(given)
    devices = given_devices()
    if devices is not None:
        return float(len(devices))
    torch = sys.modules.get("torch")
    return 0.0 if torch is None else float(torch.cuda.device_count())


def gpu_sharers() -> int:
    """Return how many workers share this worker's GPU, as far as `hpo run` says it; 1 on the CPU."""
    share = gpu_share()
    return max(1, round(1 / share)) if share else 1


def given_devices() -> list[str] | None:
    """Return the devices of CUDA_VISIBLE_DEVICES, None without it. As for CUDA, a -1 hides all that come after it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    return [*takewhile(lambda device: device not in ("", "-1"), (device.strip() for device in given.split(",")))]
