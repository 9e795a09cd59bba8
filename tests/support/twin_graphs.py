"""Graphs on the pretended accelerator: capture records operations, and a replay runs them again on the recorded tensors.

So what is baked in at a capture stays as it was, as in a CUDA graph. A rate, a step or an index of the host that changes
afterwards makes a replay differ from the step that it stands for. A capture refuses waits and copies, as CUDA does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from hpo.train import graphs
from tests.support import twin

dispatch = twin._dispatch


class Recorder:
    """The operations of a body, in their order."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, dict[str, Any], Any]] = []
        self.replays = 0

    def record(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation and record it; RuntimeError if the host would wait, or copies across devices."""
        with twin.counting() as counts:
            result = dispatch(op, args, dict(kwargs))
        if counts.waits or counts.to_device or counts.to_host:
            raise RuntimeError(f"{op}: operation not permitted when stream is capturing")
        self._operations.append((op, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again, and write their results where the recorded ones lie. It is one launch."""
        self.replays += 1
        watching = list(twin._counting)
        twin._counting.clear()
        try:
            for op, args, kwargs, recorded in self._operations:
                result = dispatch(op, args, dict(kwargs))
                for new, old in zip(tree_leaves(result), tree_leaves(recorded), strict=True):
                    if isinstance(new, twin.Twin) and new.numbers.data_ptr() != old.numbers.data_ptr():
                        old.numbers.copy_(new.numbers)
        finally:
            twin._counting.extend(watching)
        twin._count_launches("graph", 1)


made: list[Recorder] = []


def capture(_device: torch.device, body: Callable[[], None]) -> Callable[[], None]:
    """Run a body to warm up, then record it."""
    for _ in range(graphs.WARM_UPS):
        body()
    recorder = Recorder()
    with mock.patch.object(twin, "_dispatch", recorder.record):
        body()
    made.append(recorder)
    return recorder.replay


@contextmanager
def plugged_in() -> Iterator[list[Recorder]]:
    """Make the device available, with graphs. Yield the captured ones."""
    made.clear()
    with (
        twin.plugged_in(),
        mock.patch.dict(graphs.CAPTURES, {twin.NAME: capture}),
        mock.patch.object(graphs, "failures", []),
    ):
        yield made
    made.clear()
