"""The costs of using a model, measured before it is trained, for objectives and bounds beside the curve.

All three describe inference: one row at a time, in eval mode, under the study's precision. They do not describe
training, where several trials may share a step. They do not depend on the values of weights, so a trial is measured
before its first epoch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hpo.receipt import processor
from hpo.train import devices
from hpo.train.build import measurement_cache
from hpo.train.build.shape import shape_of
from hpo.train.memory import PeakBytes, address_of, bytes_of
from hpo.train.precision import autocasting
from hpo.train.run import Run
from hpo.train.stack import architecture

WARM_UP_PASSES = 5
PASSES = 50  # most timed passes; at least three are timed
SECONDS = 0.2  # timed seconds after which no further pass is timed
MEGABYTE = 2**20
Forward = Callable[[], object]


def params(model: nn.Module, forward: Forward) -> float:  # noqa: ARG001  (all measures have the same arguments)
    """Return the number of elements of all parameters, trained or frozen. Buffers do not count."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def latency_ms(model: nn.Module, forward: Forward) -> float:
    """Return the milliseconds of one row's forward pass: the fastest of up to 50 passes after 5 for warm-up.

    The fastest pass is the one least disturbed by other processes. On a GPU the device is synchronized around each
    pass.
    """
    device = next(iter(model.parameters())).device
    for _ in range(WARM_UP_PASSES):
        _timed(forward, device)
    seconds = [_timed(forward, device)]
    while len(seconds) < PASSES and (len(seconds) < 3 or sum(seconds) < SECONDS):
        seconds.append(_timed(forward, device))
    return 1e3 * min(seconds)


def _timed(forward: Forward, device: torch.device) -> float:
    devices.synchronize(device)
    began = time.perf_counter()
    forward()
    devices.synchronize(device)
    return time.perf_counter() - began


def memory_mb(model: nn.Module, forward: Forward) -> float:
    """Return the MiB of parameters and buffers plus the peak of all other tensors in one row's forward pass.

    Tensors are counted one by one, so the result is the same on every device. It does not include workspaces of kernels
    nor the rounding of an allocator.
    """
    held = {address_of(tensor): bytes_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with PeakBytes(held) as peak:
        forward()
    return float(sum(held.values()) + peak.most) / MEGABYTE


MEASURES: dict[str, Callable[[nn.Module, Forward], float]] = {
    "params": params,
    "latency_ms": latency_ms,
    "memory_mb": memory_mb,
}
TIMED = ("latency_ms",)  # measures that vary from one measurement to the next


def measure(names: Iterable[str], run: Run, *, threads: int, device: str, code: str) -> dict[str, float]:
    """Return the costs of a run's model by name. The model is left in train mode with unchanged weights.

    A latency is measured once for each architecture on a machine and kept by `measurement_cache.py`. Trials that differ
    only in weights must cost the same, or one would beat the other by chance.

    Args:
        names: keys of MEASURES.
        threads: number of CPU threads.
        device: name of the device.
        code: digest of the user's own code, which may run the same layers differently.
    """
    with _at_rest(run.model, threads):
        forward = _forward(run)
        found = {}
        for name in names:
            key = _key(name, run, threads, device, code) if name in TIMED else ""
            cost = measurement_cache.recall(key) if key else None
            if not isinstance(cost, float):
                cost = MEASURES[name](run.model, forward)
                if key:
                    measurement_cache.keep(key, cost)
            found[name] = cost
    return found


def _key(name: str, run: Run, threads: int, device: str, code: str) -> str:
    shape = shape_of(run.splits)
    layout = architecture.digest(run.model, shape, run.precision, threads)
    described = repr((name, torch.__version__, processor(), device, code, layout))
    return hashlib.sha256(described.encode()).hexdigest()[:32]


@contextmanager
def _at_rest(model: nn.Module, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model.eval()
    try:
        yield
    finally:
        model.train()
        torch.set_num_threads(before)


def _forward(run: Run) -> Forward:
    row = run.inputs.take(torch.zeros(1, dtype=torch.int64, device=run.device))

    @torch.no_grad()
    def forward() -> object:
        with autocasting(run.device, run.precision):
            return run.model(row)

    return forward
