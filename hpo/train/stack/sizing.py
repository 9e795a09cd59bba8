"""The best number K of runs in a stack on this machine, measured by doubling K while throughput grows."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from hpo.spec.failures import Kind, kind_of
from hpo.train.loop import Loop
from hpo.train.run import Run
from hpo.train.stack.stack import Forward, Stack

GAIN = 1.08  # smallest gain in throughput over the best K so far that makes a larger K worth it
MISSES = 2  # misses in a row that end the search; a single one may be noise
MOST = 64
MEMORY_BYTES = 2 * 2**30  # limit of the rows of a stack, and of this process's growth during the measurement
SLOW_STEP_SECONDS = 0.25  # step of a single run beside which the overhead of calls does not matter
STEPS = 12  # most measured steps; at least two are measured
SECONDS = 0.15  # measured time after which no further step is taken
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """The best number of runs in a stack, and the measured rates."""

    slots: int  # 1: the loop is best
    rates: dict[int, float]  # training images per second of all runs together, by K; 1 is the loop


def step_alone(run: Run) -> float:
    """Return the seconds per step of one run in the loop."""
    executor = Loop()
    executor.put(run)
    return _step_seconds(executor.train_epoch, run.device)


def measure(forward: Forward, make: Callable[[int], Run], step: float, *, may_lose: bool = True) -> Size:
    """Measure stacks of 2, 4, 8, ... runs against the loop and return the best size.

    Args:
        forward: the forward pass of the stack.
        make: makes a new run from a seed.
        step: seconds per step in the loop.
        may_lose: whether the loop may win. If false, the result is the best stack.
    """
    runs = [make(0)]
    batch = runs[0].batch_size
    rates = {1: batch / step}
    best, misses, slots = 1, 0, 2
    before = _peak_bytes()
    while slots <= MOST and misses < MISSES and max(_bytes(runs[0], slots), _peak_bytes() - before) <= MEMORY_BYTES:
        runs += [make(seed) for seed in range(len(runs), slots)]
        try:
            rates[slots] = slots * batch / _stacked_step(forward, runs)
        except RuntimeError as error:  # the CPU's allocator raises a plain RuntimeError
            if kind_of(error) is not Kind.OUT_OF_MEMORY:
                raise
            break
        if rates[slots] >= GAIN * rates[best] or (best == 1 and not may_lose):
            best, misses = slots, 0
        else:
            misses += 1
        slots *= 2
    return Size(slots=best, rates=rates)


def _stacked_step(forward: Forward, runs: list[Run]) -> float:
    stack = Stack(forward, runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return _step_seconds(stack.train_epoch, runs[0].device)


def _step_seconds(train_epoch: Callable[[Callable[[], bool]], object], device: torch.device) -> float:
    """Return the median seconds per step, measured between the calls of `stop`, which come before each step."""
    asked: list[float] = []

    def stop() -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        asked.append(time.perf_counter())
        measured = len(asked) - 1 - WARM_UP_STEPS
        return measured >= STEPS or (measured >= 2 and asked[-1] - asked[WARM_UP_STEPS] >= SECONDS)

    while train_epoch(stop):
        pass
    steps = [later - earlier for earlier, later in pairwise(asked)]
    return statistics.median(steps[WARM_UP_STEPS:])


def _peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(run: Run, slots: int) -> int:
    """Return the bytes of a stack's rows: values, gradients, two moments, and averages if runs have them."""
    return (4 if run.average is None else 5) * slots * sum(p.numel() * p.element_size() for p in run.model.parameters())
