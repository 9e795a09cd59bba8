"""Steps that are captured once and then replayed, so that a step of many launches costs one.

A replay repeats the captured operations on the captured tensors. What changes from step to step must be written into
those tensors before: the batch, its rows, the dropout factors. A number of the host that changes would be baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hpo.train import devices

log = logging.getLogger(__name__)
WARM_UPS = 2  # runs before a capture, in which libraries choose kernels and take memory

Body = Callable[[], None]
Replay = Callable[[], None]


def _captured_by_cuda(device: torch.device, body: Body) -> Replay:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # threads that read data ahead pin memory
        body()
    return graph.replay


#: How a body is captured, by type of device. The body is run several times.
CAPTURES: dict[str, Callable[[torch.device, Body], Replay]] = {"cuda": _captured_by_cuda}


def can_capture(device: torch.device) -> bool:
    """Return whether steps can be captured on this type of device."""
    return device.type in CAPTURES


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
    """A step that is captured when it is first taken. If that fails, it is run as it is, and the reason is kept."""

    def __init__(
        self,
        device: torch.device,
        body: Callable[..., None],
        masks: FixedMasks,
        changed: Callable[[], Sequence[Tensor]],
    ) -> None:
        """Capture nothing yet.

        Args:
            device: device of all tensors.
            body: the step, a function of trees of tensors. It may keep no number of the host that changes.
            masks: the dropout factors that the body reads.
            changed: returns the tensors whose values the body changes and reads. Captures leave them as they were.
        """
        self.failure: str | None = None
        self._device = device
        self._body = body
        self._masks = masks
        self._changed = changed
        self._places: list[Tensor] = []
        self._spec: TreeSpec | None = None
        self._replay: Replay | None = None

    def forget(self) -> None:
        """Capture the step anew when it is taken next, since something that was captured has been replaced."""
        self._replay = None

    def take(self, *inputs: Any) -> None:
        """Take the step with these trees of tensors, whose shapes are always the same."""
        values, spec = tree_flatten(inputs)
        is_first = self._spec is None
        if is_first:
            self._spec, self._places = spec, [value.clone() for value in values]
        for place, value in zip(self._places, values, strict=True):
            place.copy_(value)
        if not is_first and not self._masks.write():
            self._replay = None
        if self._replay is None and self.failure is None:
            self._capture()
        if self._replay is None:
            self._run()
        else:
            self._replay()

    def _run(self) -> None:
        assert self._spec is not None
        self._masks.begin()
        self._body(*tree_unflatten(self._places, self._spec))

    def _capture(self) -> None:
        changed = list(self._changed())
        before, random = [one.clone() for one in changed], devices.random_states(self._device)
        try:
            self._replay = CAPTURES[self._device.type](self._device, self._run)
        except Exception as error:  # whatever a user's model does that cannot be captured
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("the step cannot be captured as a graph (%s); it runs without", self.failure)
        finally:
            devices.restore_random(self._device, random)
            with torch.no_grad():
                for one, value in zip(changed, before, strict=True):
                    one.copy_(value)
