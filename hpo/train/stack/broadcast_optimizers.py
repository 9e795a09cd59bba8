"""The steps of all runs' optimizers at once, for devices on which a call costs more than its computation.

Rows whose optimizers are of one kind are stepped together by torch's formulas, elementwise over [rows, span]. Each row
has its own scalars, such as the learning rate. The host computes them in float64 from the optimizers' groups and step
counts, for many steps ahead, and sends them in one copy. It reads nothing back and does not wait.

The operations of a step depend on all its rows, but the result of a row does not. An operation that a row does not need
leaves its finite values unchanged, bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hpo.train import devices
from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.flat_parameters import ALIGNMENT, FlatParameters
from hpo.train.stack.row_optimizers import (
    ROW_OPTIMIZERS,
    Group,
    Rates,
    Span,
    differ_in_decay_alone,
    move_in,
    spans_of,
    torchs_own,
    trained,
)

AHEAD = 256  # most steps whose scalars are sent at once
TRACTABLE = 5  # RAdam adapts its rate once the length of its average is above this, as in the paper

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


@dataclass(frozen=True)
class Count:
    """The number of a step, from 1, and NAdam's product of momenta after it."""

    step: int
    product: float


# --- the formulas of each kind, after weight decay: the host's part, which computes scalars, and the device's part --------


def _sgd_numbers(group: Group, _count: Count) -> Numbers:
    return _momentum_numbers(group)


def _sgd(block: RowBlock, *momentum: Scalars) -> None:
    _descend(block, block.gradient, block.moments[0], *momentum)


def _adam_numbers(group: Group, count: Count) -> Numbers:
    beta1, beta2 = group["betas"]
    root = math.sqrt(1 - beta2**count.step)  # bias correction of eps and the rate; torch corrects the denominator
    return 1 - beta1, beta2, 1 - beta2, group["eps"] * root, -group["lr"] * root / (1 - beta1**count.step)


def _adam(block: RowBlock, fresh: Scalars, kept: Scalars, added: Scalars, eps: Scalars, rate: Scalars) -> None:
    mean, square = block.moments
    mean.lerp_(block.gradient, fresh.sent)
    _average_square(square, block.gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    block.value.addcmul_(torch.div(mean, root, out=root), rate.sent)


def _radam_numbers(group: Group, count: Count) -> Numbers:
    (beta1, beta2), step = group["betas"], count.step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    rate = -group["lr"] / (1 - beta1**step)
    direct = adaptive = 0.0
    if length > TRACTABLE:
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        adaptive = rate * math.sqrt(ratio) * math.sqrt(1 - beta2**step)
    else:
        direct = rate
    return 1 - beta1, beta2, 1 - beta2, group["eps"], adaptive, direct


def _radam(block: RowBlock, *scalars: Scalars) -> None:
    *of_adam, direct = scalars
    _adam(block, *of_adam)
    if not direct.is_all(0.0):
        block.value.addcmul_(block.moments[0], direct.sent)


def _rmsprop_numbers(group: Group, _count: Count) -> Numbers:
    alpha = group["alpha"]
    return alpha, 1 - alpha, group["eps"], *_momentum_numbers(group)


def _rmsprop(block: RowBlock, kept: Scalars, added: Scalars, eps: Scalars, *momentum: Scalars) -> None:
    square, buffer = block.moments
    _average_square(square, block.gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    _descend(block, torch.div(block.gradient, root, out=root), buffer, *momentum)


def _adagrad_numbers(group: Group, count: Count) -> Numbers:
    return group["eps"], -group["lr"] / (1 + (count.step - 1) * group["lr_decay"])


def _adagrad(block: RowBlock, eps: Scalars, rate: Scalars) -> None:
    root = block.moments[0].addcmul_(block.gradient, block.gradient).sqrt().add_(eps.sent)
    block.value.addcmul_(torch.div(block.gradient, root, out=root), rate.sent)


def _adamax_numbers(group: Group, count: Count) -> Numbers:
    beta1, beta2 = group["betas"]
    return 1 - beta1, beta2, group["eps"], -group["lr"] / (1 - beta1**count.step)


def _adamax(block: RowBlock, fresh: Scalars, kept: Scalars, eps: Scalars, rate: Scalars) -> None:
    mean, norm = block.moments
    mean.lerp_(block.gradient, fresh.sent)
    size = block.gradient.abs().add_(eps.sent)
    torch.maximum(norm.mul_(kept.sent), size, out=norm)
    block.value.addcmul_(torch.div(mean, norm, out=size), rate.sent)


def _momentum_of_nadam(group: Group, step: int) -> float:
    momentum: float = group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    return momentum


def _nadam_numbers(group: Group, count: Count) -> Numbers:
    (beta1, beta2), step, product = group["betas"], count.step, count.product
    mu, next_mu = (_momentum_of_nadam(group, step + later) for later in (0, 1))
    root = math.sqrt(1 - beta2**step)
    rate = -group["lr"] * root
    return (
        1 - beta1,
        beta2,
        1 - beta2,
        group["eps"] * root,
        rate * (1 - mu) / (1 - product),
        rate * next_mu / (1 - product * next_mu),
    )


def _nadam(
    block: RowBlock,
    fresh: Scalars,
    kept: Scalars,
    added: Scalars,
    eps: Scalars,
    direct: Scalars,
    through: Scalars,
) -> None:
    mean, square = block.moments
    mean.lerp_(block.gradient, fresh.sent)
    _average_square(square, block.gradient, kept, added)
    root = square.sqrt().add_(eps.sent)
    block.value.addcdiv_((block.gradient * direct.sent).addcmul_(mean, through.sent), root)


def _average_square(square: Tensor, gradient: Tensor, kept: Scalars, added: Scalars) -> None:
    """Update a running mean of squares. Not by lerp, which gives NaN once a square has overflowed."""
    square.mul_(kept.sent).addcmul_(gradient * added.sent, gradient)


def _momentum_numbers(group: Group) -> Numbers:
    lr, momentum = group["lr"], group["momentum"]
    if not momentum:
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
    """The step of one kind of optimizer on many rows, after weight decay."""

    numbers: Callable[[Group, Count], Numbers]  # scalars of one row
    step: Callable[..., None]  # takes a block and a column of each scalar
    decoupled: bool | None = False  # whether weight decay multiplies the weights; None: as the group says


FORMS: dict[type[Optimizer], Form] = {
    SGD: Form(numbers=_sgd_numbers, step=_sgd),
    SGDW: Form(numbers=_sgd_numbers, step=_sgd, decoupled=True),
    Adam: Form(numbers=_adam_numbers, step=_adam),
    AdamW: Form(numbers=_adam_numbers, step=_adam, decoupled=True),
    Adagrad: Form(numbers=_adagrad_numbers, step=_adagrad),
    RMSprop: Form(numbers=_rmsprop_numbers, step=_rmsprop),
    Adamax: Form(numbers=_adamax_numbers, step=_adamax),
    NAdam: Form(numbers=_nadam_numbers, step=_nadam, decoupled=None),
    RAdam: Form(numbers=_radam_numbers, step=_radam, decoupled=None),
}


# --- which groups are stepped together -----------------------------------------------------------------------------------


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
            product = before.mul(_momentum_of_nadam(groups[0], step)).item()  # in a tensor, to round as torch does
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
        self._members[row] = [
            Member(
                row,
                optimizer,
                places,
                [owned[place] for place in places],
                [spans[place] for place in places],
                int(owned[places[0]].steps[0]),
            )
            for places in _alike(optimizer, spans)
        ]

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
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for member in chain.from_iterable(self._members.get(row, []) for row in rows):
            alike.setdefault(member.likeness, []).append(member)
        stepped = torch.zeros((self._rows.count, 1))
        stepped[list(rows)] = 1
        return Plan(
            parts=[MemberGroup(members, self._rows) for members in alike.values()],
            others=[self._others[row] for row in rows if row in self._others],
            counts=[(counts, stepped.to(counts)) for counts in self._counts.values()],
        )


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


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return an index of these ascending rows: a slice, which copies nothing, if they are contiguous."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)
