"""One step of all runs' optimizers at once, for devices on which a call costs more than its computation.

Rows whose optimizers are of one kind are stepped together by torch's formulas, elementwise over [rows, span]. Each row
has its own scalars, such as the learning rate. Before every step the host computes them in float64 from the optimizers'
groups and step counts, and sends them in one copy. It reads nothing back and does not wait. So the device's part of a
step, which reads the scalars from one place, could be captured as a graph.

The operations of a step depend on all its rows, but the result of a row does not. An operation that a row does not need
leaves its finite values unchanged, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from hpo.train import devices
from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS, Group, Span, move_in, spans_of, torchs_own, trained

Numbers = tuple[float, ...]  # the scalars of one row in one step


@dataclass(frozen=True, eq=False)
class Scalars:
    """One of the scalars of a step, for every row."""

    known: tuple[float, ...]  # on the host
    sent: Tensor  # [n, 1] on the device

    def is_all(self, number: float) -> bool:
        """Return whether the scalar is this number in every row."""
        return self.known.count(number) == len(self.known)


@dataclass(frozen=True, eq=False)
class RowBlock:
    """The tensors of a step, each [n, size of a span]."""

    value: Tensor
    gradient: Tensor
    moments: Sequence[Tensor]


# --- the formulas of each kind: the host's part, which computes scalars, and the device's part ---------------------------


def _sgd_numbers(group: Group, span: Span, _step: int) -> Numbers:
    return group["weight_decay"], *_momentum_numbers(group, span)


def _sgd(block: RowBlock, decay: Scalars, *momentum: Scalars) -> None:
    _descend(block, _decayed(block, decay), block.moments[0], *momentum)


def _sgdw_numbers(group: Group, span: Span, _step: int) -> Numbers:
    return _shrinkage(group), *_momentum_numbers(group, span)


def _sgdw(block: RowBlock, shrinkage: Scalars, *momentum: Scalars) -> None:
    _shrink(block, shrinkage)
    _descend(block, block.gradient, block.moments[0], *momentum)


def _adam_numbers(group: Group, _span: Span, step: int) -> Numbers:
    return group["weight_decay"], *_moment_numbers(group, step)


def _adam(block: RowBlock, decay: Scalars, *moments: Scalars) -> None:
    _descend_by_moments(block, _decayed(block, decay), *moments)


def _adamw_numbers(group: Group, _span: Span, step: int) -> Numbers:
    return _shrinkage(group), *_moment_numbers(group, step)


def _adamw(block: RowBlock, shrinkage: Scalars, *moments: Scalars) -> None:
    _shrink(block, shrinkage)
    _descend_by_moments(block, block.gradient, *moments)


def _moment_numbers(group: Group, step: int) -> Numbers:
    beta1, beta2 = group["betas"]
    root = math.sqrt(1 - beta2**step)  # bias correction of eps and the rate; torch corrects the denominator
    return 1 - beta1, beta2, 1 - beta2, group["eps"] * root, -group["lr"] * root / (1 - beta1**step)


def _descend_by_moments(
    block: RowBlock, gradient: Tensor, fresh: Scalars, kept: Scalars, added: Scalars, eps: Scalars, rate: Scalars
) -> None:
    mean, square = block.moments
    mean.lerp_(gradient, fresh.sent)
    _average_square(square, gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    block.value.addcmul_(torch.div(mean, root, out=root), rate.sent)


def _rmsprop_numbers(group: Group, span: Span, _step: int) -> Numbers:
    alpha = group["alpha"]
    return group["weight_decay"], alpha, 1 - alpha, group["eps"], *_momentum_numbers(group, span)


def _rmsprop(block: RowBlock, decay: Scalars, kept: Scalars, added: Scalars, eps: Scalars, *momentum: Scalars) -> None:
    gradient = _decayed(block, decay)
    square, buffer = block.moments
    _average_square(square, gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    _descend(block, torch.div(gradient, root, out=root), buffer, *momentum)


def _adagrad_numbers(group: Group, _span: Span, step: int) -> Numbers:
    return group["weight_decay"], group["eps"], -group["lr"] / (1 + (step - 1) * group["lr_decay"])


def _adagrad(block: RowBlock, decay: Scalars, eps: Scalars, rate: Scalars) -> None:
    gradient = _decayed(block, decay)
    root = block.moments[0].addcmul_(gradient, gradient).sqrt().add_(eps.sent)
    block.value.addcmul_(torch.div(gradient, root, out=root), rate.sent)


def _adamax_numbers(group: Group, _span: Span, step: int) -> Numbers:
    beta1, beta2 = group["betas"]
    return group["weight_decay"], 1 - beta1, beta2, group["eps"], -group["lr"] / (1 - beta1**step)


def _adamax(block: RowBlock, decay: Scalars, fresh: Scalars, kept: Scalars, eps: Scalars, rate: Scalars) -> None:
    gradient = _decayed(block, decay)
    mean, norm = block.moments
    mean.lerp_(gradient, fresh.sent)
    size = gradient.abs().add_(eps.sent)
    torch.maximum(norm.mul_(kept.sent), size, out=norm)
    block.value.addcmul_(torch.div(mean, norm, out=size), rate.sent)


def _nadam_numbers(group: Group, span: Span, step: int) -> Numbers:
    beta1, beta2 = group["betas"]
    decoupled = group["decoupled_weight_decay"]
    mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** ((step + later) * group["momentum_decay"])) for later in (0, 1))
    product = span.products.mul_(mu)[0].item()  # in a tensor on the host, to round as torch does
    root = math.sqrt(1 - beta2**step)
    rate = -group["lr"] * root
    return (
        _shrinkage(group) if decoupled else 1.0,
        0.0 if decoupled else group["weight_decay"],
        1 - beta1,
        beta2,
        1 - beta2,
        group["eps"] * root,
        rate * (1 - mu) / (1 - product),
        rate * next_mu / (1 - product * next_mu),
    )


def _nadam(
    block: RowBlock,
    shrinkage: Scalars,
    decay: Scalars,
    fresh: Scalars,
    kept: Scalars,
    added: Scalars,
    eps: Scalars,
    direct: Scalars,
    through: Scalars,
) -> None:
    _shrink(block, shrinkage)
    gradient = _decayed(block, decay)
    mean, square = block.moments
    mean.lerp_(gradient, fresh.sent)
    _average_square(square, gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    block.value.addcdiv_((gradient * direct.sent).addcmul_(mean, through.sent), root)


def _shrinkage(group: Group) -> float:
    """Return the factor by which decoupled weight decay multiplies the weights."""
    decay: float = group["weight_decay"]
    return 1 - group["lr"] * decay if decay else 1.0  # 1 for an infinite rate as well


def _shrink(block: RowBlock, shrinkage: Scalars) -> None:
    if not shrinkage.is_all(1.0):
        block.value.mul_(shrinkage.sent)


def _decayed(block: RowBlock, decay: Scalars) -> Tensor:
    """Return the gradient with coupled weight decay."""
    return block.gradient if decay.is_all(0.0) else torch.addcmul(block.gradient, block.value, decay.sent)


def _average_square(square: Tensor, gradient: Tensor, kept: Scalars, added: Scalars) -> None:
    """Update a running mean of squares. Not by lerp, which gives NaN once a square has overflowed."""
    square.mul_(kept.sent).addcmul_(gradient * added.sent, gradient)


def _momentum_numbers(group: Group, span: Span) -> Numbers:
    lr, momentum = group["lr"], group["momentum"]
    if not span.has(momentum):
        return 1.0, 0.0, -lr, 0.0  # the buffer is kept for a later momentum
    if group.get("nesterov"):
        return momentum, 1.0, -lr, -lr * momentum
    return momentum, 1.0, 0.0, -lr


def _descend(
    block: RowBlock, direction: Tensor, buffer: Tensor, kept: Scalars, added: Scalars, direct: Scalars, through: Scalars
) -> None:
    """Take a step with or without momentum.

    The new buffer is kept * buffer + added * direction. The new value is value + direct * direction + through * buffer.
    """
    if not added.is_all(0.0):
        fresh = direction if added.is_all(1.0) else direction * added.sent
        torch.addcmul(fresh, buffer, kept.sent, out=buffer)
    if not direct.is_all(0.0):
        block.value.addcmul_(direction, direct.sent)
    if not through.is_all(0.0):
        block.value.addcmul_(buffer, through.sent)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The step of one kind of optimizer on many rows."""

    numbers: Callable[[Group, Span, int], Numbers]  # scalars of one row; the step's number counts from 1
    step: Callable[..., None]  # takes a block and a column of each scalar


FORMS: dict[type[Optimizer], Form] = {
    SGD: Form(numbers=_sgd_numbers, step=_sgd),
    SGDW: Form(numbers=_sgdw_numbers, step=_sgdw),
    Adam: Form(numbers=_adam_numbers, step=_adam),
    AdamW: Form(numbers=_adamw_numbers, step=_adamw),
    Adagrad: Form(numbers=_adagrad_numbers, step=_adagrad),
    RMSprop: Form(numbers=_rmsprop_numbers, step=_rmsprop),
    Adamax: Form(numbers=_adamax_numbers, step=_adamax),
    NAdam: Form(numbers=_nadam_numbers, step=_nadam),
}


# --- which groups are stepped together -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Member:
    """One parameter group of a row's optimizer."""

    row: int
    optimizer: Optimizer
    place: int  # index of the group; looked up in every step, since loading a state replaces the optimizer's groups
    span: Span
    columns: slice  # part of the row that the group owns
    taken: int  # number of steps

    @property
    def likeness(self) -> tuple[Any, ...]:
        """A key: members with equal keys are stepped together."""
        return type(self.optimizer), self.columns.start, self.columns.stop

    def numbers(self) -> Numbers:
        """Count a step and return its scalars."""
        self.taken += 1
        group = self.optimizer.param_groups[self.place]
        return FORMS[type(self.optimizer)].numbers(group, self.span, self.taken)


class MemberGroup:
    """Members that are stepped together."""

    def __init__(self, members: Sequence[Member], rows: FlatParameters) -> None:
        kind, columns = type(members[0].optimizer), members[0].columns
        self._members = members
        self._step = FORMS[kind].step
        tensors = [rows.values, rows.gradients, *rows.moments[: len(ROW_OPTIMIZERS[kind].moments)]]
        self._wholes = [tensor[:, columns] for tensor in tensors]
        self._index = _index([member.row for member in members], rows.values.device)

    def numbers(self) -> list[Numbers]:
        """Return each scalar of the next step, for all members."""
        return list(zip(*(member.numbers() for member in self._members), strict=True))

    def step(self, numbers: Sequence[Numbers], sent: Tensor) -> None:
        """Step all members.

        Args:
            numbers: the scalars, as `numbers` returned them.
            sent: the same scalars on the device, [scalars * members].
        """
        places = sent.view(len(numbers), len(self._members), 1)
        columns = [Scalars(known, place) for known, place in zip(numbers, places.unbind(0), strict=True)]
        index = self._index
        if isinstance(index, slice):
            value, gradient, *moments = (whole[index] for whole in self._wholes)
            self._step(RowBlock(value, gradient, moments), *columns)
            return
        value, gradient, *moments = (whole.index_select(0, index) for whole in self._wholes)
        self._step(RowBlock(value, gradient, moments), *columns)
        changed = [self._wholes[0], *self._wholes[2:]]
        for whole, tensor in zip(changed, (value, *moments), strict=True):
            whole.index_copy_(0, index, tensor)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the optimizers of some rows are stepped."""

    rows: tuple[int, ...]
    parts: list[MemberGroup]
    others: list[Callable[[], None]]  # torch's own steps
    counts: list[tuple[Tensor, Tensor]]  # step counts [rows, parameters], and what each step adds to them [rows, 1]


class Broadcast:
    """Steps the optimizers of all rows, those of one kind together."""

    def __init__(self, rows: FlatParameters) -> None:
        self._rows = rows
        self._members: dict[int, list[Member]] = {}
        self._others: dict[int, Callable[[], None]] = {}
        self._counts: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._plan: Plan | None = None
        self._sent = rows.values.new_empty(0)  # scalars of the step, on the device

    def put(self, row: int, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        """Add an optimizer whose parameters lie in a row, with their names. Its state moves into the row."""
        self._plan = None
        spans = spans_of(optimizer, names, self._rows)
        if spans is None:
            self._others[row] = torchs_own(optimizer, names, self._rows, row)
            return
        owned = move_in(optimizer, names, self._rows, row, spans, self._counts_of(optimizer, row))
        self._members[row] = [
            Member(row, optimizer, place, span, columns, int(span.steps[0]))
            for place, (span, columns) in enumerate(zip(owned, spans, strict=True))
            if columns.stop > columns.start
        ]

    def remove(self, row: int) -> None:
        """Remove a row's optimizer. Its state stays in the row."""
        self._plan = None
        self._members.pop(row, None)
        self._others.pop(row, None)

    def take(self, rows: Sequence[int]) -> None:
        """Step the optimizers of these rows, which must be ascending."""
        if self._plan is None or self._plan.rows != tuple(rows):
            self._plan = self._planned(rows)
        plan = self._plan
        numbers = [part.numbers() for part in plan.parts]
        sizes = [sum(map(len, of_part)) for of_part in numbers]
        sent = self._send(list(chain.from_iterable(chain.from_iterable(numbers))))
        for part, of_part, place in zip(plan.parts, numbers, torch.split(sent, sizes), strict=True):
            part.step(of_part, place)
        for counts, ones in plan.counts:
            counts.add_(ones)
        for step in plan.others:
            step()

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
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for member in chain.from_iterable(self._members.get(row, []) for row in rows):
            alike.setdefault(member.likeness, []).append(member)
        stepped = torch.zeros((self._rows.count, 1))
        stepped[list(rows)] = 1
        return Plan(
            rows=tuple(rows),
            parts=[MemberGroup(members, self._rows) for members in alike.values()],
            others=[self._others[row] for row in rows if row in self._others],
            counts=[(counts, stepped.to(counts)) for counts in self._counts.values()],
        )

    def _send(self, numbers: Sequence[float]) -> Tensor:
        """Copy scalars to the device without waiting. They stay at one address as long as their number stays the same.

        The pinned memory is new in every step, since the copy may still be pending. torch keeps the memory until then.
        """
        if len(self._sent) != len(numbers):
            self._sent = self._sent.new_empty(len(numbers))
        host = devices.pinned(torch.tensor(numbers, dtype=self._sent.dtype), self._sent.device)
        return self._sent.copy_(host, non_blocking=True)


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return an index of these ascending rows: a slice, which copies nothing, if they are contiguous."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)
