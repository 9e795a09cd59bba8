"""The steps of all runs' optimizers at once, for devices on which a call costs more than its computation.

Rows whose optimizers are of one kind are stepped together. Each row has its own scalars, such as the learning rate. The
host computes them from the optimizers' groups and step counts, for many steps ahead, and sends them in one copy. It
reads nothing back and does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpo.train import devices
from hpo.train.stack.broadcast_optimizers import Numbers
from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.members import Member, MemberGroup, grouped, members_of
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS
from hpo.train.stack.row_state import move_in, spans_of, trained
from hpo.train.stack.steps import Rates, torchs_own

AHEAD = 256  # most steps whose scalars are sent at once


@dataclass(frozen=True, eq=False)
class Plan:
    """How the optimizers of some rows are stepped."""

    parts: list[MemberGroup]
    others: list[Callable[[], None]]  # torch's own steps
    counts: list[tuple[Tensor, Tensor]]  # step counts [rows, parameters], and what each step adds to them [rows, 1]


@dataclass(frozen=True, eq=False)
class Foreseen:
    """The scalars of some steps."""

    first: int  # batch
    numbers: list[list[list[Numbers]]]  # by step and member group
    sent: Tensor  # [steps, scalars of all groups] on the device

    def has(self, batch: int) -> bool:
        """Return whether the scalars of this batch are here."""
        return 0 <= batch - self.first < len(self.numbers)

    def of(self, batch: int) -> Iterator[tuple[list[Numbers], Tensor]]:
        """Yield the scalars of a batch for each member group."""
        numbers = self.numbers[batch - self.first]
        sizes = [sum(map(len, of_group)) for of_group in numbers]
        return zip(numbers, torch.split(self.sent[batch - self.first], sizes), strict=True)


class Broadcast:
    """Steps the optimizers of all rows, those of one kind together."""

    at_once = True

    def __init__(self, rows: FlatParameters) -> None:
        self._rows = rows
        self._members: dict[int, list[Member]] = {}
        self._others: dict[int, Callable[[], None]] = {}
        self._counts: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._plan = Plan([], [], [])
        self._rates: Rates = lambda _batch: None
        self._until = 0
        self._foreseen: Foreseen | None = None

    def put(self, row: int, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        """Add an optimizer whose parameters lie in a row, with their names. Its state moves into the row."""
        self._plans = {}
        spans = spans_of(optimizer, names, self._rows)
        if spans is None:
            self._others[row] = torchs_own(optimizer, names, self._rows, row)
            return
        owned = move_in(optimizer, names, self._rows, row, spans, self._counts_of(optimizer, row))
        self._members[row] = members_of(row, optimizer, owned, spans)

    def remove(self, row: int) -> None:
        """Remove a row's optimizer. Its state stays in the row."""
        self._plans = {}
        self._members.pop(row, None)
        self._others.pop(row, None)

    def begin(self, rows: Sequence[int], rates: Rates, until: int) -> None:
        """Prepare the next steps of these rows, up to the batch `until`."""
        for member in chain.from_iterable(self._members.values()):
            member.forget()
        if tuple(rows) not in self._plans:
            self._plans[tuple(rows)] = self._planned(rows)
        self._plan, self._rates, self._until, self._foreseen = self._plans[tuple(rows)], rates, until, None

    def take(self, batch: int) -> None:
        """Take the step of a batch. Batches follow each other."""
        plan = self._plan
        if self._foreseen is None or not self._foreseen.has(batch):
            self._foreseen = self._foresee(batch)
        for part, (numbers, sent) in zip(plan.parts, self._foreseen.of(batch), strict=True):
            part.step(numbers, sent)
            for member in part.members:
                member.count()
        for counts, ones in plan.counts:
            counts.add_(ones)
        if plan.others:
            self._rates(batch)
        for step in plan.others:
            step()

    def _foresee(self, batch: int) -> Foreseen:
        """Compute the scalars of the steps from this batch on, and send them without waiting."""
        numbers = []
        for ahead in range(batch, min(batch + AHEAD, self._until)):
            self._rates(ahead)
            numbers.append([part.foresee() for part in self._plan.parts])
        flat = [list(chain.from_iterable(chain.from_iterable(of_step))) for of_step in numbers]
        device = self._rows.values.device
        return Foreseen(batch, numbers, devices.sent(torch.tensor(flat, dtype=self._rows.values.dtype), device))

    def _counts_of(self, optimizer: Optimizer, row: int) -> list[Tensor] | None:
        """Return the step counts of a row's parameters by group; None if the optimizer keeps no counts.

        They are views of one tensor for all rows, on the device and of the type that torch uses.
        """
        if not ROW_OPTIMIZERS[type(optimizer)].counts:
            return None
        groups = optimizer.param_groups
        bounds = list(accumulate((len(trained(group)) for group in groups), initial=0))
        counts = []
        for group, (start, end) in zip(groups, pairwise(bounds), strict=True):
            fused = bool(group.get("fused"))
            device = self._rows.values.device if fused else torch.device("cpu")
            key = device, torch.float32 if fused else torch.get_default_dtype()
            if key not in self._counts:
                self._counts[key] = torch.zeros((self._rows.count, bounds[-1]), device=key[0], dtype=key[1])
            counts.append(self._counts[key][row, start:end])
        return counts

    def _planned(self, rows: Sequence[int]) -> Plan:
        members = chain.from_iterable(self._members.get(row, []) for row in rows)
        stepped = torch.zeros((self._rows.count, 1))
        stepped[list(rows)] = 1
        return Plan(
            parts=grouped(members, self._rows),
            others=[self._others[row] for row in rows if row in self._others],
            counts=[(counts, stepped.to(counts)) for counts in self._counts.values()],
        )
