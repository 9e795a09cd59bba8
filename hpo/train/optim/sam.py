"""Sharpness-aware minimisation around any optimizer (SAM, Foret et al. 2021).

A step uses the gradient at w + rho * g / |g|, where g is the batch's gradient at the weights w. There the batch's loss
is approximately the largest within a distance of rho.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TINY = 1e-12  # added to the norm of a gradient, which may be 0

Piece = TypeVar("Piece")


class Draws(Protocol):
    """All random numbers of a run."""

    def states(self) -> Mapping[str, Tensor]:
        """Return where they are."""

    def rewind(self, states: Mapping[str, Tensor]) -> None:
        """Go back to there."""


def passes(
    batch: Sequence[Piece],
    model: nn.Module,
    parameters: Sequence[Tensor],
    rho: float,
    draws: Draws,
    loss_sum: Tensor,
) -> Iterator[Piece]:
    """Yield a batch's micro-batches twice. The caller adds the gradients of each to `parameters`.

    Between the two passes the weights are moved uphill and the gradients cleared. At the end the weights are restored
    bit for bit. The second pass draws the same masks as the first and does not change running statistics. Its losses
    are not counted.

    Args:
        batch: micro-batches.
        model: the model in training.
        parameters: the parameters that the optimizer trains.
        rho: distance of the uphill move, the 2-norm over all parameters.
        draws: the run's random numbers, also torch's global ones, from which a user's model may draw.
        loss_sum: tensor in which the caller sums losses.
    """
    drawn = draws.states()
    yield from batch
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    before, counted = [parameter.detach().clone() for parameter in trained], loss_sum.clone()
    _climb(trained, rho)
    draws.rewind(drawn)
    with _still_statistics(model):
        yield from batch
    loss_sum.copy_(counted)
    with torch.no_grad():
        torch._foreach_copy_(trained, before)


@torch.no_grad()
def _climb(parameters: Sequence[Tensor], rho: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    length = nn.utils.get_total_norm(gradients) + TINY
    torch._foreach_add_(list(parameters), torch._foreach_mul(gradients, rho / length))
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms unchanged during the context."""
    moving = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True
