"""Steps that are captured once and then replayed, so that a step of many launches costs one.

A replay repeats the captured operations on the captured tensors. What changes from step to step must be written into
those tensors before: the batch, its rows, the dropout factors. A number of the host that changes would be baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hpo.train import devices

log = logging.getLogger(__name__)
WARM_UPS = 2  # runs before a capture, in which libraries choose kernels and take memory
SETTLED = 100  # steps that are run after a change before the step is captured again: a capture costs about as much

Body = Callable[[], None]
Replay = Callable[[], None]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures. cuBLAS keeps a workspace for each stream, so there is only one."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured_by_cuda(device: torch.device, body: Body) -> Replay:
    stream, before = _side_stream(device), torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    body()
        finally:
            before.wait_stream(stream)
        # Threads that read data ahead pin memory meanwhile, so only this thread is restricted.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
    except BaseException:
        _clean_up_after(device, before)
        raise
    return graph.replay


def _clean_up_after(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Undo what a failed capture leaves: its stream as the current one, and a random generator that waits for its end."""
    torch.cuda.set_stream(stream)
    for generator in devices.default_generators(device):
        if generator.device.type == "cuda":
            generator.graphsafe_set_state(generator.clone_state())


#: How a body is captured, by type of device. The body is run several times.
CAPTURES: dict[str, Callable[[torch.device, Body], Replay]] = {"cuda": _captured_by_cuda}


#: Why captures of this process failed. After one, none is tried again: CUDA may be left in a state that fails others.
failures: list[str] = []


def can_capture(device: torch.device) -> bool:
    """Return whether steps can be captured on this type of device, and no capture of this process has failed."""
    return device.type in CAPTURES and not failures


class Draws(Protocol):
    """What draws the factors of a step's dropout layers."""

    def factors(self, name: str, elements: int) -> Tensor | None:
        """Return the factors of a layer's next call; None if nothing is dropped."""


class FixedMasks:
    """The dropout factors of a captured step. They lie in places of their own, which are written before each replay."""

    def __init__(self, draw: Callable[..., Tensor | None]) -> None:
        """Make places when factors are asked for.

        Args:
            draw: draws the factors of a step's next call. It gets what `factors` gets.
        """
        self._draw = draw
        self._places: list[tuple[tuple[Any, ...], Tensor | None]] = []  # in the order of the calls
        self._next = 0

    def begin(self) -> None:
        """Go to the first call of the step."""
        self._next = 0

    def factors(self, *call: Any) -> Tensor | None:
        """Return the place of the next call. The first step's factors are drawn here."""
        if self._next == len(self._places):
            drawn = self._draw(*call)
            self._places.append((call, None if drawn is None else drawn.clone()))
        self._next += 1
        return self._places[self._next - 1][1]

    def write(self) -> bool:
        """Draw the factors of the next step into their places. Return false if a place is new, for another capture."""
        is_known = True
        for index, (call, place) in enumerate(self._places):
            drawn = self._draw(*call)
            if place is not None:
                place.fill_(1.0) if drawn is None else place.copy_(drawn)
            elif drawn is not None:
                self._places[index] = call, drawn.clone()
                is_known = False
        return is_known


class CapturedStep:
    """A step that is captured when it is first taken. If that fails, it is run as it is, and the reason is kept.

    It keeps no function of its owner. With such a cycle of references a finished stack would hold its memory until the
    garbage collector comes by.
    """

    def __init__(self, device: torch.device, masks: FixedMasks) -> None:
        """Capture nothing yet.

        Args:
            device: device of all tensors.
            masks: the dropout factors that the step reads.
        """
        self.failure: str | None = None
        self._device = device
        self._masks = masks
        self._places: list[Tensor] = []
        self._spec: TreeSpec | None = None
        self._replay: Replay | None = None
        self._wait = 0  # steps that are run as they are before the next capture

    def forget(self) -> None:
        """Capture the step anew after a while, since something that was captured has been replaced."""
        if self._replay is not None or self._wait:
            self._wait = SETTLED
        self._replay = None

    def take(self, body: Callable[..., None], changed: Callable[[], Sequence[Tensor]], *inputs: Any) -> None:
        """Take the step.

        Args:
            body: the step, a function of the inputs. It may keep no number of the host that changes.
            changed: returns the tensors whose values the body changes and reads. Captures leave them as they were.
            inputs: trees of tensors, whose shapes are always the same.
        """
        values, spec = tree_flatten(inputs)
        is_first = self._spec is None
        if is_first:
            self._spec, self._places = spec, [value.clone() for value in values]
        else:
            for place, value in zip(self._places, values, strict=True):
                place.copy_(value)
        if not is_first and not self._masks.write():
            self._replay = None
        if self._replay is None and self.failure is None and not self._wait:
            self._capture(partial(self._run, body), changed())
        if self._replay is None:
            self._wait = max(0, self._wait - 1)
            self._run(body)
        else:
            self._replay()

    def _run(self, body: Callable[..., None]) -> None:
        assert self._spec is not None
        self._masks.begin()
        body(*tree_unflatten(self._places, self._spec))

    def _capture(self, run: Body, changed: Sequence[Tensor]) -> None:
        before, random = [one.clone() for one in changed], devices.random_states(self._device)
        try:
            self._replay = CAPTURES[self._device.type](self._device, run)
        except Exception as error:  # whatever a user's model does that cannot be captured
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(self.failure)
            log.warning(
                "the step cannot be captured as a graph (%s); this process goes on without graphs", self.failure
            )
        finally:
            devices.restore_random(self._device, random)
            with torch.no_grad():
                for one, value in zip(changed, before, strict=True):
                    one.copy_(value)
