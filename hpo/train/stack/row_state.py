"""An optimizer's state in a row: which part of the row each parameter group owns, and how the state moves in and out.

The state stays in the optimizer under torch's names, as views of the row's moments. So the state dict is the same in a
stack and alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer

from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from hpo.train.stack.span import MOMENTUM, Group, Span

NUMBER_TYPES = (torch.float32, torch.float64)  # in others, a step's scalars would be less exact than in torch's kernels


def trained(group: Group) -> list[Tensor]:
    """Return the trained parameters of a group."""
    return [parameter for parameter in group["params"] if parameter.requires_grad]


def order_of(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[str]:
    """Return the names of the parameters that an optimizer steps, group by group. In this order a group is one span."""
    return [names[parameter] for group in optimizer.param_groups for parameter in trained(group)]


def differ_in_decay_alone(groups: Sequence[Group]) -> bool:
    """Return whether there are several groups that differ only in weight decay. Schedules change all rates alike."""

    def others(group: Group) -> dict[str, Any]:
        return {option: value for option, value in group.items() if option not in ("params", "weight_decay")}

    return len(groups) > 1 and all(others(group) == others(groups[0]) for group in groups)


def spans_of(optimizer: Optimizer, names: Mapping[Tensor, str], rows: FlatParameters) -> list[slice] | None:
    """Return the part of a row that each group of an optimizer owns; None if torch's own step is needed."""
    kind = ROW_OPTIMIZERS.get(type(optimizer))
    groups = optimizer.param_groups
    spans = [rows.span_of([names[parameter] for parameter in trained(group)]) for group in groups]
    if (
        kind is None
        or rows.values.dtype not in NUMBER_TYPES
        or not all(_is_usual(kind, group) for group in groups)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return None
    known = [span for span in spans if span is not None]
    return known if len(known) == len(groups) else None


def _is_usual(kind: RowOptimizer, group: Group) -> bool:
    return all(group.get(option, value) == value for option, value in kind.usual.items())


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


def own_state(optimizer: Optimizer) -> None:
    """Give an optimizer whose state lies in a row its own tensors again, as copies."""
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})
