"""Penalties on the weights of K runs in rows, and bounds on the norms of their units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpo.train.optim.penalties import Penalties, units_of, weights_of
from hpo.train.stack.flat_parameters import FlatParameters

EPS = 1e-7  # as in torch.renorm


class RowPenalties:
    """Applies penalties and bounds to K runs whose weights lie in rows, each with its own strengths."""

    def __init__(self, rows: FlatParameters, model: nn.Module) -> None:
        self._rows = rows
        self._moving = rows.gradients.shape[1]
        trained = [p for name, p in model.named_parameters() if rows.spans[name][1] <= self._moving]
        self._is_weight = torch.zeros_like(rows.gradients[0])
        for name in weights_of(model, trained):
            self._is_weight[slice(*rows.spans[name])] = 1
        self._units = units_of(model, trained)

    def add_to_gradient(self, row: int, penalties: Penalties) -> None:
        """Add the gradient of one run's penalties to its gradient."""
        if not (penalties.l1 or penalties.l2):
            return
        weights = self._rows.values[row, : self._moving] * self._is_weight
        if penalties.l2:
            self._rows.gradients[row].add_(weights, alpha=penalties.l2)
        if penalties.l1:
            self._rows.gradients[row].add_(weights.sign(), alpha=penalties.l1)

    def limits(self, penalties: Mapping[int, Penalties]) -> Tensor | None:
        """Return the largest norm of a unit by row [K, 1], infinite without a bound; None if no row has a bound."""
        bounds = {row: one.max_norm for row, one in penalties.items() if one.max_norm is not None}
        values = self._rows.values
        most = [bounds.get(row, torch.inf) for row in range(len(values))]
        return values.new_tensor(most).unsqueeze(1) if bounds else None

    @torch.no_grad()
    def bound(self, limits: Tensor) -> None:
        """Scale units that are longer than their row's limit [K, 1] down to it, in all rows at once."""
        for name, dimension in self._units.items():
            weight = self._rows.parameters[name].movedim(dimension + 1, 1)  # [K, units, ...]
            norms = torch.linalg.vector_norm(weight.flatten(2), dim=2)
            scale = torch.where(norms > limits, limits / (norms + EPS), 1.0)
            weight.mul_(scale.view(*scale.shape, *[1] * (weight.ndim - 2)))
