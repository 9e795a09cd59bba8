"""How many GPUs a worker has, for what is counted in GPU-hours."""

from __future__ import annotations

import os
import sys

SHARE = "HPO_WORKER_GPUS"  # environment variable; a part of one if several workers share it


def gpu_share() -> float:
    """Return how many GPUs this worker has: 0.5 if two workers share one, 0 on the CPU.

    `hpo run` says it. In a worker that was started by hand or by a cluster, CUDA_VISIBLE_DEVICES says it, else torch, once it
    is loaded.
    """
    if given := os.environ.get(SHARE):
        return float(given)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return float(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    torch = sys.modules.get("torch")
    return 0.0 if torch is None else float(torch.cuda.device_count())
