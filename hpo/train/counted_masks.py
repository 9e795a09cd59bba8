"""Dropout masks by counting: each random word is a hash of its place and of its trial's key, so it needs no generator.

A generator draws for one trial and one step at a time, so on a GPU the launches grow with the trials. Here one call draws
for all trials of a stack and for many steps. The integers are the same on every device.

The hash is that of SplittableRandom (Steele, Lea & Flood 2014): the finaliser of splitmix64 on a sequence with a step of
its own for each stream. On a CPU it takes several times as long as a generator, so there trials draw from generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.models.dropout import LEVELS, factor_of_kept, highest_kept
from hpo.spec.seeds import derive
from hpo.train import devices

MEMORY = 64 * 2**20  # most bytes of the factors of all layers that are drawn ahead; one step's are always drawn
CALLS_APART = 2**44  # words between two calls of dropout in a step; a trial has fewer for one call
WORD = 2**64
MOST_ALIKE = 24  # a step of a stream has at least so many changes from bit to bit, as in SplittableRandom
MIXED = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # shift right, then factor


@dataclass(frozen=True)
class Stream:
    """The random words of one trial."""

    key: int
    step: int  # odd

    @classmethod
    def of(cls, seed: int) -> Stream:
        """Return the stream of a trial's masks."""
        step = 2 * derive(seed, "masks", "step") + 1
        if (step ^ (step >> 1)).bit_count() < MOST_ALIKE:
            step ^= 0xAAAAAAAAAAAAAAAA
        return cls(2 * derive(seed, "masks") + 1, step)


def words(keys: Tensor, steps: Tensor, places: Tensor) -> Tensor:
    """Return the words at these places of streams: int64, in the shape that the arguments broadcast to.

    Args:
        keys: of the streams, int64.
        steps: of the streams, int64.
        places: int64.
    """
    state = torch.addcmul(keys, places, steps)
    for shift, factor in MIXED:
        state ^= (state >> shift) & (2 ** (64 - shift) - 1)  # torch shifts the sign in
        if factor is not None:
            state *= signed(factor)
    return state


def signed(word: int) -> int:
    """Return the int64 with the bits of a word in [0, 2**64)."""
    return word - WORD if word >= WORD // 2 else word


@dataclass(frozen=True, eq=False)
class _Ahead:
    """Factors of one call of dropout for some steps."""

    kind: tuple[tuple[int, ...], int, torch.dtype]  # levels, elements, number type
    first: int  # step
    factors: Tensor  # [steps, K, elements]

    def has(self, step: int, kind: tuple[tuple[int, ...], int, torch.dtype]) -> bool:
        return kind == self.kind and 0 <= step - self.first < len(self.factors)


class CountedMasks:
    """The dropout factors of K trials, by their streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: tuple[Stream | None, ...] = ()
        self._starts: tuple[int, ...] = ()  # step of each trial that is step 0 here
        self._base = 0  # step at which the epoch begins
        self._until = 0
        self._step = 0
        self._call = 0
        self._calls = 0  # most calls of dropout in a step so far
        self._sent: tuple[Tensor, ...] | None = None
        self._ahead: dict[int, _Ahead] = {}  # by call
        self._limits: dict[tuple[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]] = {}

    def begin(self, streams: Sequence[Stream | None], starts: Sequence[int], steps: int) -> None:
        """Begin an epoch. What was drawn ahead stays if the trials are the same and go on by the same number of steps.

        Args:
            streams: the stream of each row; None: its factors are of no use.
            starts: number of the epoch's first step, counted from the trial's first step, for each row.
            steps: steps from there on, beyond which nothing is drawn.
        """
        both = zip(streams, starts, self._starts, strict=False)
        passed = {start - before for stream, start, before in both if stream is not None}
        if tuple(streams) != self._streams or len(passed) != 1 or min(passed) < 0:
            self._streams, self._starts = tuple(streams), tuple(starts)
            self._sent, self._ahead, passed = None, {}, {0}
        self._base = passed.pop()
        self._until = self._base + steps
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Go to the first call of dropout in a step of the epoch."""
        self._calls = max(self._calls, self._call)
        self._step, self._call = self._base + step, 0

    def back_to(self, call: int) -> None:
        """Go back to a call of dropout in this step."""
        self._call = call

    @property
    def call(self) -> int:
        """Return the number of calls of dropout in this step so far."""
        return self._call

    def factors(self, kept: Sequence[int], elements: int, dtype: torch.dtype) -> Tensor | None:
        """Return the factors of the step's next call of dropout [K, elements]; None if no row drops anything.

        A factor is 0 where an element is dropped, else 1 / keep probability.

        Args:
            kept: for each row, how many of 2**16 draws keep an element.
            elements: number of elements of a row.
        """
        call, kind = self._call, (tuple(kept), elements, dtype)
        self._call += 1
        if min(kept) == LEVELS:
            return None
        ahead = self._ahead.get(call)
        if ahead is None or not ahead.has(self._step, kind):
            ahead = None
            self._ahead.pop(call, None)  # before the next is made, to hold one only
            self._ahead[call] = ahead = self._drawn(call, *kind)
        return ahead.factors[self._step - ahead.first]

    @torch.no_grad()
    def _drawn(self, call: int, kept: tuple[int, ...], elements: int, dtype: torch.dtype) -> _Ahead:
        rows, per_step = len(kept), -(-elements // 4)
        # The first step's calls are not counted yet, so nothing is drawn ahead in it.
        most = max(1, MEMORY // (self._calls * rows * elements * dtype.itemsize)) if self._calls else 1
        steps = max(1, min(most, self._until - self._step))
        first = call * CALLS_APART + self._step * per_step
        places = torch.arange(first, first + steps * per_step, device=self._device).view(steps, 1, per_step)
        key, step, start = self._keys()
        bits = words(key + step * start * per_step, step, places).view(torch.int16)[:, :, :elements]
        factors = torch.empty((steps, rows, elements), dtype=dtype, device=self._device)
        highest, factor = self._limits_of(kept, dtype)
        torch.le(bits, highest, out=factors)
        return _Ahead((kept, elements, dtype), self._step, factors.mul_(factor))

    def _keys(self) -> tuple[Tensor, ...]:
        """Return key and step of each row's stream, and the row's start, each [K, 1]."""
        if self._sent is None:
            streams = [(0, 0) if one is None else (signed(one.key), signed(one.step)) for one in self._streams]
            numbers = [(*stream, start) for stream, start in zip(streams, self._starts, strict=True)]
            sent = devices.sent(torch.tensor(numbers).t().contiguous(), self._device)
            self._sent = sent.unsqueeze(2).unbind(0)
        return self._sent

    def _limits_of(self, kept: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return by row [K, 1] the highest draw that keeps an element, and the factor of kept elements."""
        if (kept, dtype) not in self._limits:
            highest = torch.tensor([highest_kept(levels) for levels in kept], dtype=torch.int16)
            factor = torch.tensor([factor_of_kept(levels) for levels in kept], dtype=dtype)
            self._limits[kept, dtype] = (
                devices.sent(highest, self._device).unsqueeze(1),
                devices.sent(factor, self._device).unsqueeze(1),
            )
        return self._limits[kept, dtype]
