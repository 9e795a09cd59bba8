"""One step of a run's own torch optimizer on its row, without torch's loop over parameters.

The state stays in the optimizer under torch's names, as views of the row's moments. So the state dict is the same in a
stack and alone. Other kinds of optimizers, and unusual options, use torch's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.flat_parameters import FlatParameters

MOMENTUM = "momentum_buffer"

Group = Mapping[str, Any]
Step = Callable[["Span", Group], None]
Rates = Callable[[int], None]  # sets the rates of the optimizers that are stepped to those of a batch


@dataclass(frozen=True, eq=False)
class Span:
    """The part of a row that one parameter group owns, as flat tensors."""

    value: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]
    steps: Tensor  # number of steps; torch keeps one for each parameter [n], all equal
    products: Tensor  # NAdam's product of momenta; torch keeps one for each parameter [n], all equal
    late: list[tuple[dict[str, Any], Tensor]]  # states without a momentum buffer yet, each with its place in the row

    def count(self) -> Tensor:
        """Count a step and return the number of steps."""
        self.steps.add_(1)
        return self.steps[0]

    def has(self, momentum: float) -> bool:
        """Return whether momentum is not 0. From then on the states hold a momentum buffer, as torch's do."""
        while momentum and self.late:
            state, place = self.late.pop()
            state[MOMENTUM] = place
        return momentum != 0


# Where torch has a fused kernel, it is called as torch calls it. The other steps are torch's formulas.


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


NUMBER_TYPES = (torch.float32, torch.float64)  # in others, a step's scalars would be less exact than in torch's kernels
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


class Steps(Protocol):
    """The steps of all optimizers whose parameters lie in rows."""

    at_once: bool  # whether all rows are treated in the same calls, also by what comes before and after the step

    def put(self, row: int, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        """Add an optimizer whose parameters lie in a row, with their names. Its state moves into the row."""

    def remove(self, row: int) -> None:
        """Remove a row's optimizer. Its state stays in the row, see `own_state`."""

    def begin(self, rows: Sequence[int], rates: Rates, until: int) -> None:
        """Prepare the next steps of these rows, which must be ascending, up to the batch `until`."""

    def take(self, batch: int) -> None:
        """Take the step of a batch. Batches follow each other. Rates may be set to those of a later batch meanwhile."""


class RowByRow:
    """Steps each row by itself. This is fastest where a call costs little, as on a CPU."""

    at_once = False

    def __init__(self, rows: FlatParameters) -> None:
        self._rows = rows
        self._steps: dict[int, Callable[[], None]] = {}
        self._taken: Sequence[int] = ()
        self._rates: Rates = lambda _batch: None

    def put(self, row: int, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        self._steps[row] = stepper(optimizer, names, self._rows, row)

    def remove(self, row: int) -> None:
        del self._steps[row]

    def begin(self, rows: Sequence[int], rates: Rates, until: int) -> None:  # noqa: ARG002
        self._taken, self._rates = rows, rates

    def take(self, batch: int) -> None:
        self._rates(batch)
        for row in self._taken:
            self._steps[row]()


def order_of(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[str]:
    """Return the names of the parameters that an optimizer steps, group by group. In this order a group is one span."""
    return [names[parameter] for group in optimizer.param_groups for parameter in trained(group)]


def stepper(optimizer: Optimizer, names: Mapping[Tensor, str], rows: FlatParameters, row: int) -> Callable[[], None]:
    """Return a function that steps an optimizer whose parameters lie in a row. Its state moves into the row.

    Args:
        names: names of the parameters.
    """
    kind = ROW_OPTIMIZERS.get(type(optimizer))
    step = None if kind is None else kind.step
    spans = spans_of(optimizer, names, rows)
    if kind is None or step is None or spans is None or rows.values.device.type != "cpu":
        return torchs_own(optimizer, names, rows, row)
    as_one = _span_of(order_of(optimizer, names), rows)
    if kind.decay is not None and as_one is not None and differ_in_decay_alone(optimizer.param_groups):
        return _step_as_one(step, kind.decay, optimizer, names, rows, row, spans, slice(*as_one))
    parts = move_in(optimizer, names, rows, row, spans)

    def take() -> None:
        for here, group in zip(parts, optimizer.param_groups, strict=True):
            if len(here.value):  # a group may be empty, or frozen
                step(here, group)

    return take


def differ_in_decay_alone(groups: Sequence[Group]) -> bool:
    """Return whether there are several groups that differ only in weight decay. Schedules change all rates alike."""

    def others(group: Group) -> dict[str, Any]:
        return {option: value for option, value in group.items() if option not in ("params", "weight_decay")}

    return len(groups) > 1 and all(others(group) == others(groups[0]) for group in groups)


def _step_as_one(
    step: Step,
    decay: Step,
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    rows: FlatParameters,
    row: int,
    spans: Sequence[slice],
    span: slice,
) -> Callable[[], None]:
    """Return a step that decays each group and then steps all groups in one call.

    For a small model a call costs more than its computation.
    """
    sizes = [len(trained(group)) for group in optimizer.param_groups]
    counts = torch.zeros(sum(sizes))
    parts = move_in(optimizer, names, rows, row, spans, torch.split(counts, sizes))
    whole = Span(
        rows.values[row, span],
        rows.gradients[row, span],
        tuple(moment[row, span] for moment in rows.moments),
        counts,
        torch.ones(0),
        [late for part in parts for late in part.late],
    )

    def take() -> None:
        groups = optimizer.param_groups
        for part, group in zip(parts, groups, strict=True):
            decay(part, group)
        step(whole, {**groups[0], "weight_decay": 0.0})

    return take


def spans_of(optimizer: Optimizer, names: Mapping[Tensor, str], rows: FlatParameters) -> list[slice] | None:
    """Return the part of a row that each group of an optimizer owns; None if torch's own step is needed."""
    kind = ROW_OPTIMIZERS.get(type(optimizer))
    groups = optimizer.param_groups
    spans = [_span_of([names[parameter] for parameter in trained(group)], rows) for group in groups]
    if (
        kind is None
        or rows.values.dtype not in NUMBER_TYPES
        or not all(_is_usual(kind, group) for group in groups)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return None
    known = [slice(*span) for span in spans if span is not None]
    return known if len(known) == len(groups) else None


def move_in(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    rows: FlatParameters,
    row: int,
    spans: Sequence[slice],
    counts: Sequence[Tensor] | None = None,
) -> list[Span]:
    """Move an optimizer's state into a row, so that the optimizer keeps views of it; return the span of each group.

    Args:
        names: names of the parameters.
        spans: parts of the row, as `spans_of` returns them.
        counts: step counts [n] for each group's n parameters; None: new tensors.
    """
    groups = optimizer.param_groups
    counts = counts or [torch.zeros(len(trained(group))) for group in groups]
    return [
        _move_in(optimizer, trained(group), names, rows, row, span, count)
        for group, span, count in zip(groups, spans, counts, strict=True)
    ]


def own_state(optimizer: Optimizer) -> None:
    """Give an optimizer whose state lies in a row its own tensors again, as copies."""
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})


def trained(group: Group) -> list[Tensor]:
    """Return the trained parameters of a group."""
    return [parameter for parameter in group["params"] if parameter.requires_grad]


def _span_of(names: list[str], rows: FlatParameters) -> tuple[int, int] | None:
    """Return start and end of these parameters in a row; None if they are not contiguous."""
    if not names:
        return 0, 0
    order = list(rows.spans)
    first = order.index(names[0])
    if order[first : first + len(names)] != names:
        return None
    return rows.spans[names[0]][0], rows.spans[names[-1]][1]


def _is_usual(kind: RowOptimizer, group: Group) -> bool:
    return all(group.get(option, value) == value for option, value in kind.usual.items())


def _move_in(
    optimizer: Optimizer,
    parameters: list[Tensor],
    names: Mapping[Tensor, str],
    rows: FlatParameters,
    row: int,
    span: slice,
    counts: Tensor,
) -> Span:
    """Do what `move_in` does for the parameters of one group."""
    kind = ROW_OPTIMIZERS[type(optimizer)]
    moments = tuple(moment[row, span].zero_() for moment in rows.moments)
    counts.zero_()
    products = torch.ones(len(parameters))
    here = Span(rows.values[row, span], rows.gradients[row, span], moments, counts, products, [])
    for index, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        places = {name: rows.of(m, row, names[parameter]) for name, m in zip(kind.moments, rows.moments, strict=False)}
        if kind.counts:
            places["step"] = counts[index]
        if isinstance(optimizer, NAdam):
            places["mu_product"] = products[index]
        for name, place in places.items():
            if state.get(name) is not None:
                place.copy_(torch.as_tensor(state[name]))
                state[name] = place
            elif name == MOMENTUM:
                here.late.append((state, place))
            else:
                state[name] = place
    return here


def torchs_own(optimizer: Optimizer, names: Mapping[Tensor, str], rows: FlatParameters, row: int) -> Callable[[], None]:
    """Return torch's own step on the row's views."""
    gradients = [
        (parameter, rows.of(rows.gradients, row, names[parameter]))
        for group in optimizer.param_groups
        for parameter in trained(group)
    ]

    def take() -> None:
        for parameter, gradient in gradients:  # in every step, since a step may end with `zero_grad`
            parameter.grad = gradient
        optimizer.step()

    return take
