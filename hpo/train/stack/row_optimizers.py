"""The kinds of optimizers that are stepped on a row, without torch's loop over parameters.

Where torch has a fused kernel, it is called as torch calls it. The other steps are torch's formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.span import MOMENTUM, Group, Span

Step = Callable[[Span, Group], None]


def _sgd(span: Span, group: Group) -> None:
    _descend(span, group, group["weight_decay"])


def _sgdw(span: Span, group: Group) -> None:
    _shrink(span, group)
    _descend(span, group, 0.0)


def _descend(span: Span, group: Group, decay: float) -> None:
    momentum = group["momentum"]
    has_momentum = span.has(momentum)
    torch._fused_sgd_(
        [span.value],
        [span.gradient],
        [span.moments[0]] if has_momentum else [],  # the kernel takes no buffer without momentum
        weight_decay=decay,
        momentum=momentum,
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"] and has_momentum,
        maximize=False,
        is_first_step=False,  # with a buffer of zeros the first step is the same as torch's
    )


def _adam(kernel: Callable[..., None]) -> Step:
    def step(span: Span, group: Group) -> None:
        beta1, beta2 = group["betas"]
        kernel(
            [span.value],
            [span.gradient],
            [span.moments[0]],
            [span.moments[1]],
            [],
            [span.count()],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    return step


def _adagrad(span: Span, group: Group) -> None:
    torch._fused_adagrad_(
        [span.value],
        [span.gradient],
        [span.moments[0]],
        [span.count()],
        lr=group["lr"],
        lr_decay=group["lr_decay"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _rmsprop(span: Span, group: Group) -> None:
    span.count()
    alpha, momentum = group["alpha"], group["momentum"]
    gradient = _decayed(span, group)
    square = span.moments[0].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    average = square.sqrt().add_(group["eps"])
    if span.has(momentum):
        span.value.sub_(span.moments[1].mul_(momentum).addcdiv_(gradient, average), alpha=group["lr"])
    else:
        span.value.addcdiv_(gradient, average, value=-group["lr"])


def _adamax(span: Span, group: Group) -> None:
    beta1, beta2 = group["betas"]
    step = span.count().item()
    gradient = _decayed(span, group)
    mean, norm = span.moments
    mean.lerp_(gradient, 1 - beta1)
    torch.maximum(norm.mul_(beta2), gradient.abs().add_(group["eps"]), out=norm)
    span.value.addcdiv_(mean, norm, value=-group["lr"] / (1 - beta1**step))


def _nadam(span: Span, group: Group) -> None:
    beta1, beta2 = group["betas"]
    step, decay = span.count().item(), group["momentum_decay"]
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        span.value.mul_(1 - group["lr"] * group["weight_decay"])
        gradient = span.gradient
    else:
        gradient = _decayed(span, group)
    mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** ((step + later) * decay)) for later in (0, 1))
    product = span.products.mul_(mu)[0].item()
    mean, square = span.moments
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    span.value.addcdiv_(gradient, root, value=-group["lr"] * (1 - mu) / (1 - product))
    span.value.addcdiv_(mean, root, value=-group["lr"] * next_mu / (1 - product * next_mu))


def _couple(span: Span, group: Group) -> None:
    """Add coupled weight decay to the gradient."""
    if decay := group["weight_decay"]:
        span.gradient.add_(span.value, alpha=decay)


def _shrink(span: Span, group: Group) -> None:
    """Apply decoupled weight decay to the value."""
    if decay := group["weight_decay"]:
        span.value.mul_(1 - group["lr"] * decay)


def _decayed(span: Span, group: Group) -> Tensor:
    """Return the gradient with coupled weight decay."""
    decay = group["weight_decay"]
    return span.gradient.add(span.value, alpha=decay) if decay else span.gradient


@dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """How a kind of optimizer is stepped on a row."""

    step: Step | None  # None: torch's own step, row by row
    moments: tuple[str, ...]  # torch's names of the tensors that are kept in the row's moments
    counts: bool = True  # whether torch keeps a count of steps
    usual: Mapping[str, Any]  # options that must have these values
    # Weight decay as a separate step, so that groups that differ only in it are stepped as one. None: no such step.
    decay: Step | None = _couple


PLAIN = {"maximize": False, "differentiable": False}
ROW_OPTIMIZERS: dict[type[Optimizer], RowOptimizer] = {
    SGD: RowOptimizer(step=_sgd, moments=(MOMENTUM,), counts=False, usual={**PLAIN, "dampening": 0}),
    SGDW: RowOptimizer(step=_sgdw, moments=(MOMENTUM,), counts=False, usual={**PLAIN, "dampening": 0}, decay=_shrink),
    Adam: RowOptimizer(
        step=_adam(torch._fused_adam_),
        moments=("exp_avg", "exp_avg_sq"),
        usual={**PLAIN, "amsgrad": False, "decoupled_weight_decay": False, "capturable": False},
    ),
    AdamW: RowOptimizer(
        step=_adam(torch._fused_adamw_),
        moments=("exp_avg", "exp_avg_sq"),
        usual={**PLAIN, "amsgrad": False, "capturable": False},
        decay=_shrink,
    ),
    Adagrad: RowOptimizer(step=_adagrad, moments=("sum",), usual=PLAIN),
    RMSprop: RowOptimizer(
        step=_rmsprop,
        moments=("square_avg", MOMENTUM),
        usual={**PLAIN, "centered": False, "capturable": False},
    ),
    Adamax: RowOptimizer(step=_adamax, moments=("exp_avg", "exp_inf"), usual={**PLAIN, "capturable": False}),
    NAdam: RowOptimizer(
        step=_nadam, moments=("exp_avg", "exp_avg_sq"), usual={**PLAIN, "capturable": False}, decay=None
    ),
    RAdam: RowOptimizer(step=None, moments=("exp_avg", "exp_avg_sq"), usual={**PLAIN, "capturable": False}, decay=None),
}
