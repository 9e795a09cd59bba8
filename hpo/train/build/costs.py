"""What a model costs once it is trained, known before it is: for objectives and bounds beside the curve.

All three are of using the model, one image at a time in eval mode under the study's precision, and not of training it, where
several trials may share a step. Weights are of no account, so a trial is measured before its first epoch.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.receipt import processor
from hpo.train.build import measurement_cache
from hpo.train.precision import Precision, autocasting, number_type
from hpo.train.run import Run
from hpo.train.stack import architecture

WARM_UP_PASSES = 5
PASSES = 50  # timed, at most, and three at least
SECONDS = 0.2  # of timed passes, likewise
MEGABYTE = 2**20
Forward = Callable[[], object]


def params(model: nn.Module, forward: Forward) -> float:  # noqa: ARG001  (all are asked alike)
    """Count the elements of all parameters, trained or frozen; buffers are none."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def latency_ms(model: nn.Module, forward: Forward) -> float:
    """Measure the milliseconds of one image's forward pass on the device: the fastest of up to 50 passes after 5 others.

    The fastest is the one that nothing else disturbed, of all that runs on this machine beside it. On a GPU each pass is
    waited for.
    """
    device = next(iter(model.parameters())).device
    for _ in range(WARM_UP_PASSES):
        _timed(forward, device)
    seconds = [_timed(forward, device)]
    while len(seconds) < PASSES and (len(seconds) < 3 or sum(seconds) < SECONDS):
        seconds.append(_timed(forward, device))
    return 1e3 * min(seconds)


def _timed(forward: Forward, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def memory_mb(model: nn.Module, forward: Forward) -> float:
    """Count the MiB of weights and buffers, and of the most that lives beside them at once in one image's forward pass.

    It is counted tensor by tensor and so the same on every device: without what a kernel takes for itself, and without what
    an allocator rounds up to.
    """
    held = {_address(tensor): _bytes(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _Peak(held) as peak:
        forward()
    return float(sum(held.values()) + peak.most) / MEGABYTE


def _bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, for as long as each lives."""

    def __init__(self, known: Iterable[int]) -> None:
        """Begin with nothing.

        Args:
            known: addresses of storages that count elsewhere.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._alive = set(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:  # neither a view nor written in place
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), int(storage.nbytes())
        if address and address not in self._alive:
            self._alive.add(address)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


MEASURES: dict[str, Callable[[nn.Module, Forward], float]] = {
    "params": params,
    "latency_ms": latency_ms,
    "memory_mb": memory_mb,
}
TIMED = ("latency_ms",)  # no two measurements of these are the same


def measure(names: Iterable[str], run: Run, *, threads: int, device: str, code: str) -> dict[str, float]:
    """Return what the model of a run costs, by name; the model is left in train mode, its weights as they were.

    What is timed is timed once for each architecture on a machine and remembered by `measurement_cache.py`. Trials that differ
    in their weights alone must cost the same, or each would beat the others by chance.

    Args:
        threads: of the CPU.
        device: its name.
        code: a digest of the user's own code, which may run the same layers otherwise.
    """
    with _at_rest(run.model, threads):
        forward = _forward(run.model, run.splits.train.images.shape[1:], run.device, run.precision)
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
    layout = architecture.digest(run.model, tuple(run.splits.train.images.shape[1:]), run.precision, threads)
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


def _forward(model: nn.Module, shape: Iterable[int], device: torch.device, precision: Precision) -> Forward:
    image = torch.zeros((1, *shape), dtype=number_type(model), device=device)

    @torch.no_grad()
    def forward() -> object:
        with autocasting(device, precision):
            return model(image)

    return forward
