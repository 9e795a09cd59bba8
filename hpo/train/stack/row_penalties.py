"""Penalties on the weights of K runs in rows, and bounds on the norms of their units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpo.train import devices
from hpo.train.optim.penalties import Penalties, units_of, weights_of
from hpo.train.stack.flat_parameters import FlatParameters

EPS = 1e-7  # as in torch.renorm


class RowPenalties:
    """Applies penalties and bounds to K runs whose weights lie in rows, each with its own strengths."""

    def __init__(self, rows: FlatParameters, model: nn.Module, *, at_once: bool) -> None:
        self._rows = rows
        self._at_once = at_once
        self._moving = rows.gradients.shape[1]
        trained = [p for name, p in model.named_parameters() if rows.spans[name][1] <= self._moving]
        self._is_weight = torch.zeros_like(rows.gradients[0])
        for name in weights_of(model, trained):
            self._is_weight[slice(*rows.spans[name])] = 1
        self._units = units_of(model, trained)
        self._penalties: list[Penalties] = []
        self._strengths: tuple[Tensor, Tensor] | None = None  # of l1 and l2, each [K, 1]; only for all rows at once
        self._limits: Tensor | None = None  # largest norm of a unit by row [K, 1], infinite without a bound

    def begin(self, penalties: Sequence[Penalties]) -> None:
        """Take the penalties of the rows for the next steps."""
        if penalties == self._penalties:
            return
        self._penalties, self._strengths, self._limits = list(penalties), None, None
        if self._at_once and any(one.l1 or one.l2 for one in penalties):
            self._strengths = self._sent([one.l1 for one in penalties]), self._sent([one.l2 for one in penalties])
        if any(one.max_norm is not None for one in penalties):
            self._limits = self._sent([torch.inf if one.max_norm is None else one.max_norm for one in penalties])

    def add_to_gradients(self) -> None:
        """Add the gradients of the penalties to the gradients."""
        if self._strengths is not None:
            l1, l2 = self._strengths
            weights = self._rows.values[:, : self._moving] * self._is_weight
            self._rows.gradients.addcmul_(weights, l2).addcmul_(weights.sign(), l1)
        elif not self._at_once:
            for row, one in enumerate(self._penalties):
                self._add_to_gradient(row, one)

    def _add_to_gradient(self, row: int, penalties: Penalties) -> None:
        if not (penalties.l1 or penalties.l2):
            return
        weights = self._rows.values[row, : self._moving] * self._is_weight
        if penalties.l2:
            self._rows.gradients[row].add_(weights, alpha=penalties.l2)
        if penalties.l1:
            self._rows.gradients[row].add_(weights.sign(), alpha=penalties.l1)

    @torch.no_grad()
    def bound(self) -> None:
        """Scale units that are longer than their row's limit down to it, in all rows at once."""
        if self._limits is None:
            return
        for name, dimension in self._units.items():
            weight = self._rows.parameters[name].movedim(dimension + 1, 1)  # [K, units, ...]
            norms = torch.linalg.vector_norm(weight.flatten(2), dim=2)
            scale = torch.where(norms > self._limits, self._limits / (norms + EPS), 1.0)
            weight.mul_(scale.view(*scale.shape, *[1] * (weight.ndim - 2)))

    def _sent(self, numbers: Sequence[float]) -> Tensor:
        """Return numbers by row [K, 1] on the device."""
        values = self._rows.values
        column = torch.tensor(numbers, dtype=values.dtype).unsqueeze(1)
        return devices.sent(column, values.device)
