"""Which parameter groups of all rows are stepped together, and their step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer

from hpo.train.stack.broadcast_optimizers import FORMS, Count, Numbers, RowBlock, Scalars, momentum_of_nadam
from hpo.train.stack.flat_parameters import ALIGNMENT, FlatParameters
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS
from hpo.train.stack.row_state import differ_in_decay_alone
from hpo.train.stack.span import Group, Span


@dataclass(eq=False)
class Member:
    """Successive parameter groups of a row's optimizer that differ in weight decay alone."""

    row: int
    optimizer: Optimizer
    places: Sequence[int]  # indices of the groups; looked up in every step, since loading a state replaces the groups
    spans: Sequence[Span]
    columns: Sequence[slice]  # part of the row that each group owns
    taken: int  # number of steps
    _ahead: deque[tuple[bool, float]] = field(default_factory=deque)  # of later steps: has momentum, product of momenta

    @property
    def whole(self) -> slice:
        """The part of the row that all groups own together."""
        return slice(self.columns[0].start, self.columns[-1].stop)

    @property
    def likeness(self) -> tuple[Any, ...]:
        """A key: members with equal keys are stepped together."""
        return type(self.optimizer), *((columns.start, columns.stop) for columns in self.columns)

    def _groups(self) -> list[Group]:
        return [self.optimizer.param_groups[place] for place in self.places]

    def forget(self) -> None:
        """Forget the scalars of later steps."""
        self._ahead.clear()

    def foresee(self) -> Numbers:
        """Return the scalars of the first step that is not foreseen: the weight decay of each group, and the form's."""
        groups = self._groups()
        form = FORMS[type(self.optimizer)]
        decoupled = groups[0]["decoupled_weight_decay"] if form.decoupled is None else form.decoupled
        decays = chain.from_iterable(_decay_numbers(group, decoupled=decoupled) for group in groups)
        step, product = self.taken + len(self._ahead) + 1, self._ahead[-1][1] if self._ahead else 1.0
        if isinstance(self.optimizer, NAdam):
            before = torch.full_like(self.spans[0].products[:1], product) if self._ahead else self.spans[0].products[:1]
            product = before.mul(momentum_of_nadam(groups[0], step)).item()  # in a tensor, to round as torch does
        self._ahead.append((bool(groups[0].get("momentum")), product))
        return *decays, *form.numbers(groups[0], Count(step, product))

    def count(self) -> None:
        """Count a step that was foreseen."""
        self.taken += 1
        has_momentum, product = self._ahead.popleft()
        for span in self.spans:
            span.has(float(has_momentum))
            if isinstance(self.optimizer, NAdam):
                span.products.fill_(product)


def _decay_numbers(group: Group, *, decoupled: bool) -> Numbers:
    """Return by how much the weights are multiplied, and how much of them is added to the gradient."""
    decay: float = group["weight_decay"]
    if not decay:
        return 1.0, 0.0  # for an infinite rate as well
    return (1 - group["lr"] * decay, 0.0) if decoupled else (1.0, decay)


def members_of(row: int, optimizer: Optimizer, owned: Sequence[Span], columns: Sequence[slice]) -> list[Member]:
    """Return the members of a row.

    Args:
        owned: the span of each group of the optimizer, as `move_in` returns them.
        columns: the part of the row that each group owns.
    """
    return [
        Member(
            row,
            optimizer,
            places,
            [owned[place] for place in places],
            [columns[place] for place in places],
            int(owned[places[0]].steps[0]),
        )
        for places in _alike(optimizer, columns)
    ]


def _alike(optimizer: Optimizer, spans: Sequence[slice]) -> list[list[int]]:
    """Return the places of an optimizer's groups, those that follow each other and differ in weight decay alone together."""
    found: list[list[int]] = []
    groups = optimizer.param_groups
    for place, columns in enumerate(spans):
        if columns.stop == columns.start:  # a group may be empty, or frozen
            continue
        before = found[-1] if found else []
        follows = bool(before) and 0 <= columns.start - spans[before[-1]].stop < ALIGNMENT
        if follows and differ_in_decay_alone([groups[before[0]], groups[place]]):
            before.append(place)
        else:
            found.append([place])
    return found


class MemberGroup:
    """Members that are stepped together."""

    def __init__(self, members: Sequence[Member], rows: FlatParameters) -> None:
        kind, whole = type(members[0].optimizer), members[0].whole
        self.members = members
        self._form = FORMS[kind]
        self._parts = [slice(part.start - whole.start, part.stop - whole.start) for part in members[0].columns]
        tensors = [rows.values, rows.gradients, *rows.moments[: len(ROW_OPTIMIZERS[kind].moments)]]
        self._wholes = [tensor[:, whole] for tensor in tensors]
        self._index = _index([member.row for member in members], rows.values.device)

    def foresee(self) -> list[Numbers]:
        """Return each scalar of the first step that is not foreseen, for all members."""
        return list(zip(*(member.foresee() for member in self.members), strict=True))

    def step(self, numbers: Sequence[Numbers], sent: Tensor) -> None:
        """Step all members.

        Args:
            numbers: the scalars, as `foresee` returned them.
            sent: the same scalars on the device, [scalars * members].
        """
        places = sent.view(len(numbers), len(self.members), 1)
        columns = [Scalars(known, place) for known, place in zip(numbers, places.unbind(0), strict=True)]
        index = self._index
        if isinstance(index, slice):
            value, gradient, *moments = (whole[index] for whole in self._wholes)
            self._take(RowBlock(value, gradient, moments), columns)
            return
        value, gradient, *moments = (whole.index_select(0, index) for whole in self._wholes)
        self._take(RowBlock(value, gradient, moments), columns)
        changed = [self._wholes[0], *self._wholes[2:]]
        for whole, tensor in zip(changed, (value, *moments), strict=True):
            whole.index_copy_(0, index, tensor)

    def _take(self, block: RowBlock, columns: Sequence[Scalars]) -> None:
        of_decay = 2 * len(self._parts)
        for part, (kept, added) in zip(
            self._parts, zip(columns[:of_decay:2], columns[1:of_decay:2], strict=True), strict=True
        ):
            value = block.value[:, part]
            if not kept.is_all(1.0):
                value.mul_(kept.sent)
            if not added.is_all(0.0):
                block.gradient[:, part].addcmul_(value, added.sent)
        self._form.step(block, *columns[of_decay:])


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return an index of these ascending rows: a slice, which copies nothing, if they are contiguous."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)


def grouped(members: Iterable[Member], rows: FlatParameters) -> list[MemberGroup]:
    """Return the groups of members that are stepped together."""
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        alike.setdefault(member.likeness, []).append(member)
    return [MemberGroup(found, rows) for found in alike.values()]
