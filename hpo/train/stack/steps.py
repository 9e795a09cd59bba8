"""What a stack asks of the steps of its optimizers, and torch's own step, for what no row knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.row_state import trained

Rates = Callable[[int], None]  # sets the rates of the optimizers that are stepped to those of a batch


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
