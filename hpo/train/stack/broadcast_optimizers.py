"""The kinds of optimizers that are stepped on many rows at once, by torch's formulas, elementwise over [rows, span].

Each kind has a part for the host and a part for the device. The host computes a row's scalars in float64. The device
takes the step, after weight decay, with a column of each scalar.

The operations of a step depend on all its rows, but the result of a row does not. An operation that a row does not need
leaves its finite values unchanged, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.span import Group

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


def momentum_of_nadam(group: Group, step: int) -> float:
    momentum: float = group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    return momentum


def _nadam_numbers(group: Group, count: Count) -> Numbers:
    (beta1, beta2), step, product = group["betas"], count.step, count.product
    mu, next_mu = (momentum_of_nadam(group, step + later) for later in (0, 1))
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
