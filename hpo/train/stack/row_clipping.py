"""Clipping of the gradients of K runs in rows, each with its own limits. A norm over all runs would couple them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.train import devices
from hpo.train.run import Run
from hpo.train.stack.flat_parameters import FlatParameters

EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class RowClipping:
    """Clips the gradients of K runs, row by row or all rows at once."""

    def __init__(self, rows: FlatParameters, *, at_once: bool) -> None:
        self._rows = rows
        self._at_once = at_once
        self._limits: list[tuple[float | None, float | None]] = []  # value and norm, by row
        self._values: tuple[Tensor, Tensor] | None = None  # lowest and highest value [K, 1]
        self._norms: Tensor | None = None  # [K, 1], infinite without a limit

    def begin(self, runs: Sequence[Run | None]) -> None:
        """Take the limits of these runs, by row, for the next steps."""
        limits = [(None, None) if run is None else (run.clip_value, run.clip_norm) for run in runs]
        if limits == self._limits:
            return
        self._limits, self._values, self._norms = limits, None, None
        if self._at_once:
            values, norms = ([one[of] for one in limits] for of in (0, 1))
            if any(one is not None for one in values):
                highest = self._sent(values)
                self._values = -highest, highest
            if any(one is not None for one in norms):
                self._norms = self._sent(norms)

    def take(self) -> None:
        """Clip the gradients of a step."""
        if self._at_once:
            self._clip_at_once()
            return
        for gradient, (value, norm) in zip(self._rows.gradients, self._limits, strict=True):
            if value is not None:
                gradient.clamp_(-value, value)
            if norm is not None:
                gradient.mul_(torch.clamp(norm / (torch.linalg.vector_norm(gradient) + EPS), max=1.0))

    def _clip_at_once(self) -> None:
        gradients = self._rows.gradients
        if self._values is not None:
            gradients.clamp_(*self._values)
        if self._norms is not None:
            found = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            factors = torch.clamp(self._norms / (found + EPS), max=1.0)
            gradients.mul_(torch.where(self._norms.isinf(), 1.0, factors))  # infinity over infinity is no number

    def _sent(self, limits: Sequence[float | None]) -> Tensor:
        values = self._rows.values
        numbers = torch.tensor([[torch.inf if one is None else one] for one in limits], dtype=values.dtype)
        return devices.sent(numbers, values.device)
