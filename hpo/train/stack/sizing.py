"""The best number K of runs in a stack on this machine, measured by doubling K while throughput grows.

On a device whose free memory is known, the memory of a stack is predicted before the stack is made: a stack of 2 and one
of 4 runs are counted tensor by tensor, and memory grows by the same number of bytes with each further run.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, pairwise

import torch

from hpo.data import Splits
from hpo.spec.failures import Kind, kind_of
from hpo.train import devices, memory
from hpo.train.loop import Loop
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.layers import Forward
from hpo.train.stack.row_validation import EVALUATION_BATCH
from hpo.train.stack.select import Make
from hpo.train.stack.stack import Stack

GAIN = 1.08  # smallest gain in throughput over the best K so far that makes a larger K worth it
MISSES = 2  # misses in a row that end the search; a single one may be noise
MOST = 64
MEMORY_BYTES = 2 * 2**30  # on a CPU: limit of the rows of a stack, and of this process's growth during the measurement
SHARE = 0.9  # of a device's free memory that a stack may take
COUNTED = (2, 4)  # runs of the stacks whose memory is counted
COUNTED_STEPS = 2  # from the second on, activations lie beside the optimizers' states
SLOW_STEP_SECONDS = 0.25  # step of a single run beside which the overhead of calls does not matter
STEPS = 12  # most measured steps; at least two are measured
SECONDS = 0.15  # measured time after which no further step is taken
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Need:
    """The bytes that stacks of one kind of run take on their device: a fixed part, and a part for each run.

    It has parameters, gradients, optimizer states, averages, activations, and the larger of a step's and validation's.
    """

    fixed: int
    each: int

    def of(self, slots: int) -> int:
        """Return the bytes of a stack of this many runs."""
        return self.fixed + self.each * slots

    def most(self, free: int) -> int:
        """Return how many runs fit into SHARE of this many free bytes; at least 1, since a run alone is the loop's."""
        return max(1, (int(SHARE * free) - self.fixed) // self.each)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The best number of runs in a stack, the measured rates, and the memory."""

    slots: int  # 1: the loop is best
    rates: dict[int, float]  # training rows per second of all runs together, by K; 1 is the loop
    peak: int | None = None  # measured bytes of the best stack, by the device's allocator; None on a CPU


def step_alone(run: Run) -> float:
    """Return the seconds per step of one run in the loop."""
    executor = Loop()
    executor.put(run)
    return step_seconds(executor.train_epoch, run.device)


def need_of(forward: Forward, make: Make, splits: Splits) -> Need:
    """Count the memory of stacks of runs that `make` builds. The result is exact but for workspaces of kernels."""
    few, many = (_counted(forward, make, splits, slots) for slots in COUNTED)
    each = (many - few) // (COUNTED[1] - COUNTED[0])
    return Need(fixed=few - COUNTED[0] * each, each=each)


def _counted(forward: Forward, make: Make, splits: Splits, slots: int) -> int:
    """Return the peak bytes of a stack: in the first steps of an epoch, and in a validation."""
    asked = count()
    size = EVALUATION_BATCH
    small = replace(splits, train=select.first(splits.train, size), validation=select.first(splits.validation, size))
    in_steps = _peak_of(forward, make, splits, slots, lambda: next(asked) == COUNTED_STEPS)
    in_validation = _peak_of(forward, make, small, slots, lambda: False)
    return max(in_steps, in_validation)


def _peak_of(forward: Forward, make: Make, splits: Splits, slots: int, stop: Callable[[], bool]) -> int:
    """Return the peak bytes on the device while a new stack trains to the end of an epoch, or until `stop`."""
    peak = memory.PeakBytes(device=splits.device.type)
    with peak:
        runs = [make(seed, splits, None) for seed in range(slots)]
        _stack_of(forward, runs).train_epoch(stop)
    return peak.most


def measure(
    forward: Forward,
    make: Callable[[int], Run],
    step: float,
    *,
    may_lose: bool = True,
    need: Need | None = None,
    sharers: int = 1,
) -> Size:
    """Measure stacks of 2, 4, 8, ... runs against the loop and return the best size.

    Args:
        forward: the forward pass of the stack.
        make: makes a new run from a seed.
        step: seconds per step in the loop.
        may_lose: whether the loop may win. If false, the result is the best stack.
        need: the memory of stacks; None on a CPU.
        sharers: how many processes share the device.
    """
    runs = [make(0)]
    batch, device = runs[0].batch_size, runs[0].device
    rates = {1: batch / step}
    peaks: dict[int, int | None] = {}
    best, misses, slots = 1, 0, 2
    before = _peak_bytes()
    while slots <= MOST and misses < MISSES and _fits(runs[0], slots, need, before, sharers):
        runs += [make(seed) for seed in range(len(runs), slots)]
        devices.begin_peak(device)
        try:
            rates[slots] = slots * batch / _stacked_step(forward, runs)
        except RuntimeError as error:  # the CPU's allocator raises a plain RuntimeError
            if kind_of(error) is not Kind.OUT_OF_MEMORY:
                raise
            break
        peaks[slots] = devices.peak_bytes(device)
        if rates[slots] >= GAIN * rates[best] or (best == 1 and not may_lose):
            best, misses = slots, 0
        else:
            misses += 1
        slots *= 2
    return Size(slots=best, rates=rates, peak=peaks.get(best))


def _fits(run: Run, slots: int, need: Need | None, before: int, sharers: int) -> bool:
    """Return whether a stack fits into memory: by its need, else by its rows and by this process's growth since `before`."""
    free = devices.free_bytes(run.device, sharers)
    if need is not None and free is not None:
        return slots <= need.most(free)
    return max(_bytes(run, slots), _peak_bytes() - before) <= MEMORY_BYTES


def _stack_of(forward: Forward, runs: list[Run]) -> Stack:
    stack = Stack(forward, runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return stack


def _stacked_step(forward: Forward, runs: list[Run]) -> float:
    return step_seconds(_stack_of(forward, runs).train_epoch, runs[0].device)


def step_seconds(train_epoch: Callable[[Callable[[], bool]], object], device: torch.device) -> float:
    """Return the median seconds per step, measured between the calls of `stop`, which come before each step.

    One thread of a CPU is measured by its own CPU time. By the wall clock another process might decide, and the result
    is remembered.
    """
    now = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    asked: list[float] = []

    def stop() -> bool:
        devices.synchronize(device)
        asked.append(now())
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
