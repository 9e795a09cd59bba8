"""How many runs a stack is best made of here: measured by doubling K for as long as all of them together go faster."""

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

GAIN = 1.08  # by which twice as many must be faster to be worth it
MISSES = 2  # in a row that end the climb: one may be noise
MOST = 64
MEMORY_BYTES = 2 * 2**30  # that the rows of a stack may take, and that this process may grow by while it measures
SLOW_STEP_SECONDS = 0.25  # of one run alone: no call's overhead counts beside such a step
STEPS = 12  # measured, at most, and two at least
SECONDS = 0.15  # of measured steps, likewise
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """The best number of runs in a stack, and what was measured."""

    slots: int  # 1: the loop
    rates: dict[int, float]  # training images a second, of all runs together, by K; 1 is the loop


def step_alone(run: Run) -> float:
    """Return the seconds that a step of one run takes in the loop."""
    executor = Loop()
    executor.put(run)
    return _step_seconds(executor.train_epoch, run.device)


def measure(forward: Forward, make: Callable[[int], Run], step: float, *, may_lose: bool = True) -> Size:
    """Measure stacks of 2, 4, 8, ... runs, which `make` builds by seed, against the loop.

    Args:
        step: seconds of a step in the loop.
        may_lose: whether the loop may win; else only the best of the stacks is looked for.
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
        except RuntimeError as error:  # as the CPU's allocator says it, too
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
    """Return the median seconds of a step, from when the executor asks whether to stop, which it does before each."""
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
    """Return the most memory of the machine that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(run: Run, slots: int) -> int:
    """Return what the rows of a stack take: values, gradients and two moments, and averages if there are any."""
    return (4 if run.average is None else 5) * slots * sum(p.numel() * p.element_size() for p in run.model.parameters())
