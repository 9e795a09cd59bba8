"""The steps of all runs' optimizers one after the other, for devices on which a call costs little, as on a CPU.

Each step is one call on the row, or torch's own step for other kinds of optimizers and unusual options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS, Step
from hpo.train.stack.row_state import differ_in_decay_alone, move_in, order_of, spans_of, trained
from hpo.train.stack.span import Span
from hpo.train.stack.steps import Rates, torchs_own


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
    as_one = rows.span_of(order_of(optimizer, names))
    if kind.decay is not None and as_one is not None and differ_in_decay_alone(optimizer.param_groups):
        return _step_as_one(step, kind.decay, optimizer, names, rows, row, spans, as_one)
    parts = move_in(optimizer, names, rows, row, spans)

    def take() -> None:
        for here, group in zip(parts, optimizer.param_groups, strict=True):
            if len(here.value):  # a group may be empty, or frozen
                step(here, group)

    return take


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
