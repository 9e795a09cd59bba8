"""What a run uses of this machine, and how fast it trains, in words for its picture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hpo.launch import gpus
from hpo.study.status import Summary
from hpo.study.trial_history import FinishedTrial

LOOK_SECONDS = 5.0  # between two looks at the memory
WINDOW_SECONDS = 15.0  # over which the speed is taken


class Usage:
    """Devices, memory and epochs per second of one run's workers."""

    def __init__(
        self,
        processes: Callable[[], Sequence[int]],
        workers: int,
        devices: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes = processes  # ids of the living workers
        self._where = f"{workers} worker{'s' if workers > 1 else ''} on " + (
            f"{devices} GPU{'s' if devices > 1 else ''}" if devices else "the CPU"
        )
        self._has_gpus = devices > 0
        self._clock = clock
        self._memory, self._looked_at = "", -LOOK_SECONDS
        self._known: dict[int, int] | None = None  # epochs of the running trials at the last look
        self._gained: deque[tuple[float, int]] = deque()  # (time, epochs since the look before)

    def line(self, summary: Summary, ended: Sequence[FinishedTrial]) -> str:
        """Return devices, memory and speed.

        Args:
            summary: the study.
            ended: trials that have finished since the last call.
        """
        if self._clock() - self._looked_at >= LOOK_SECONDS:
            self._memory, self._looked_at = self._look(), self._clock()
        speed = self._speed(summary, ended)
        return " · ".join(filter(None, [self._where, self._memory, speed]))

    def _look(self) -> str:
        main = sum(map(resident, self._processes()))
        told = [f"{main / 2**30:.1f} GiB of memory"] if main else []
        if self._has_gpus and (used := gpus.memory()):
            told.append(f"{used[0] / 2**30:.1f} of {used[1] / 2**30:.0f} GiB of the GPUs")
        return " · ".join(told)

    def _speed(self, summary: Summary, ended: Sequence[FinishedTrial]) -> str:
        now, known = self._clock(), self._known
        gained = 0
        if known is not None:
            for trial in summary.running:  # one that is taken up again comes with epochs of before
                gained += trial.epochs - known.get(trial.number, 0 if trial.attempt == 1 else trial.epochs)
            gained += sum(trial.epochs - known.get(trial.number, 0) for trial in ended)
        self._gained.append((now, max(0, gained)))
        self._known = {trial.number: trial.epochs for trial in summary.running}
        while now - self._gained[0][0] > WINDOW_SECONDS:
            self._gained.popleft()
        since = now - self._gained[0][0]
        total = sum(gained for _, gained in self._gained) - self._gained[0][1]
        return f"{total / since:.3g} epochs/s" if since and total else ""


def resident(process: int) -> int:
    """Return the bytes of memory that a process has for itself, with its share of what it shares; 0 if it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
