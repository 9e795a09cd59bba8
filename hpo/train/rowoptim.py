"""One step of a run's optimizer on its row: the run's own torch optimizer, done without torch's loop over parameters.

The state stays in the optimizer, as views of the row's moments, under torch's names: a state dict of a run in a stack is one
of the same run alone. Kinds that are not known here, or are asked for something unusual, take torch's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from hpo.train.rows import Rows

Group = Mapping[str, Any]
Step = Callable[["Span", Group], None]


@dataclass(frozen=True, eq=False)
class Span:
    """The part of a row that one parameter group owns, as flat tensors."""

    value: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor  # steps taken, a float tensor without dimensions, as torch keeps it
    product: Tensor  # NAdam's product of momenta


# Optimizers whose torch has a fused kernel for this device are called as torch calls it; the others are torch's formulas.


def _sgd(span: Span, group: Group) -> None:
    momentum = group["momentum"]
    torch._fused_sgd_(
        [span.value],
        [span.gradient],
        [span.moments[0]] if momentum else [],  # the kernel wants no buffer where there is no momentum
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"] and momentum != 0,
        maximize=False,
        is_first_step=False,  # a buffer of zeros makes the first step what torch makes it
    )


def _adam(kernel: Callable[..., None]) -> Step:
    def step(span: Span, group: Group) -> None:
        beta1, beta2 = group["betas"]
        span.step.add_(1)
        kernel(
            [span.value],
            [span.gradient],
            [span.moments[0]],
            [span.moments[1]],
            [],
            [span.step],
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
    span.step.add_(1)
    torch._fused_adagrad_(
        [span.value],
        [span.gradient],
        [span.moments[0]],
        [span.step],
        lr=group["lr"],
        lr_decay=group["lr_decay"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _rmsprop(span: Span, group: Group) -> None:
    span.step.add_(1)
    alpha, momentum = group["alpha"], group["momentum"]
    gradient = _decayed(span, group)
    square = span.moments[0].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    average = square.sqrt().add_(group["eps"])
    if momentum:
        span.value.sub_(span.moments[1].mul_(momentum).addcdiv_(gradient, average), alpha=group["lr"])
    else:
        span.value.addcdiv_(gradient, average, value=-group["lr"])


def _adamax(span: Span, group: Group) -> None:
    beta1, beta2 = group["betas"]
    span.step.add_(1)
    gradient = _decayed(span, group)
    mean, norm = span.moments
    mean.lerp_(gradient, 1 - beta1)
    torch.maximum(norm.mul_(beta2), gradient.abs().add_(group["eps"]), out=norm)
    span.value.addcdiv_(mean, norm, value=-group["lr"] / (1 - beta1 ** span.step.item()))


def _nadam(span: Span, group: Group) -> None:
    beta1, beta2 = group["betas"]
    span.step.add_(1)
    step, decay = span.step.item(), group["momentum_decay"]
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        span.value.mul_(1 - group["lr"] * group["weight_decay"])
        gradient = span.gradient
    else:
        gradient = _decayed(span, group)
    mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** ((step + later) * decay)) for later in (0, 1))
    product = span.product.mul_(mu).item()
    mean, square = span.moments
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    span.value.addcdiv_(gradient, root, value=-group["lr"] * (1 - mu) / (1 - product))
    span.value.addcdiv_(mean, root, value=-group["lr"] * next_mu / (1 - product * next_mu))


def _decayed(span: Span, group: Group) -> Tensor:
    """Return the gradient with coupled weight decay."""
    decay = group["weight_decay"]
    return span.gradient.add(span.value, alpha=decay) if decay else span.gradient


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An optimizer that we can step on a row."""

    step: Step
    moments: tuple[str, ...]  # torch's names of what we keep in the row's moments
    fused: bool = False  # our step is torch's fused kernel
    counts: bool = True  # torch keeps a count of steps
    usual: Mapping[str, Any]  # options that must have these values


PLAIN = {"maximize": False, "differentiable": False}
KINDS: dict[type[Optimizer], Kind] = {
    SGD: Kind(step=_sgd, moments=("momentum_buffer",), fused=True, counts=False, usual={**PLAIN, "dampening": 0}),
    Adam: Kind(
        step=_adam(torch._fused_adam_),
        moments=("exp_avg", "exp_avg_sq"),
        fused=True,
        usual={**PLAIN, "amsgrad": False, "decoupled_weight_decay": False, "capturable": False},
    ),
    AdamW: Kind(
        step=_adam(torch._fused_adamw_),
        moments=("exp_avg", "exp_avg_sq"),
        fused=True,
        usual={**PLAIN, "amsgrad": False, "capturable": False},
    ),
    Adagrad: Kind(step=_adagrad, moments=("sum",), fused=True, usual=PLAIN),
    RMSprop: Kind(
        step=_rmsprop,
        moments=("square_avg", "momentum_buffer"),
        usual={**PLAIN, "centered": False, "capturable": False},
    ),
    Adamax: Kind(step=_adamax, moments=("exp_avg", "exp_inf"), usual={**PLAIN, "capturable": False}),
    NAdam: Kind(step=_nadam, moments=("exp_avg", "exp_avg_sq"), usual={**PLAIN, "capturable": False}),
}


def order_of(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[str]:
    """Return the names of all parameters, the optimizer's first, group by group: so each group is one span of a row."""
    owned = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return owned + [name for name in names.values() if name not in owned]


def stepper(optimizer: Optimizer, names: Mapping[Tensor, str], rows: Rows, row: int) -> Callable[[], None]:
    """Return one step of an optimizer whose parameters lie in a row; its state moves into the row.

    Args:
        names: of the parameters that lie in the row.
    """
    kind = KINDS.get(type(optimizer))
    spans = [_span_of([names[parameter] for parameter in group["params"]], rows) for group in optimizer.param_groups]
    if kind is None or None in spans or not all(_is_usual(kind, group, rows) for group in optimizer.param_groups):
        return _torchs_own(optimizer, names, rows, row)
    parts = []
    for group, span in zip(optimizer.param_groups, spans, strict=True):
        assert span is not None
        start, end = span
        step = torch.zeros((), dtype=torch.get_default_dtype())
        moments = tuple(moment[row, start:end] for moment in rows.moments)
        for moment in moments:
            moment.zero_()
        here = Span(rows.values[row, start:end], rows.gradients[row, start:end], moments, step, torch.ones(()))
        _move_in(optimizer, group["params"], names, rows, row, kind, here)
        parts.append((here, group))

    def take() -> None:
        for here, group in parts:
            kind.step(here, group)

    return take


def _span_of(names: list[str], rows: Rows) -> tuple[int, int] | None:
    """Return from where to where these parameters lie in a row, None if they do not follow one another."""
    order = list(rows.spans)
    first = order.index(names[0])
    if order[first : first + len(names)] != names:
        return None
    return rows.spans[names[0]][0], rows.spans[names[-1]][1]


def _is_usual(kind: Kind, group: Group, rows: Rows) -> bool:
    on_cpu = rows.values.device.type == "cpu"
    known = all(group.get(option, value) == value for option, value in kind.usual.items())
    return known and on_cpu and (not kind.fused or rows.values.dtype in (torch.float32, torch.float64))


def _move_in(
    optimizer: Optimizer,
    parameters: list[Tensor],
    names: Mapping[Tensor, str],
    rows: Rows,
    row: int,
    kind: Kind,
    here: Span,
) -> None:
    """Copy the state of a group's parameters into the row and let the optimizer keep views of it."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for moment, name in zip(rows.moments, kind.moments, strict=False):
            place = rows.of(moment, row, names[parameter])
            if state.get(name) is not None:
                place.copy_(state[name])
            state[name] = place
        if kind.counts:
            here.step.fill_(float(state.get("step", 0.0)))
            state["step"] = here.step
        if "mu_product" in state or isinstance(optimizer, NAdam):
            here.product.fill_(float(state.get("mu_product", 1.0)))
            state["mu_product"] = here.product


def _torchs_own(optimizer: Optimizer, names: Mapping[Tensor, str], rows: Rows, row: int) -> Callable[[], None]:
    """Return torch's own step on the row's views."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = rows.of(rows.gradients, row, names[parameter])

    def take() -> None:
        optimizer.step()

    return take
