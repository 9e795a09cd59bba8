"""The weights of K models of one architecture, each model's in one row.

A row holds a model's parameters one after the other, so that a stack reads each parameter of all models as one tensor
[K, ...] and an optimizer sees all of a model's as one tensor [size]. The models' own parameters and buffers are views of
their rows while they are here: what a stack trains, `model.state_dict()` shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = (
    16  # elements; every parameter of every row starts at the same place of a cache line, as kernels round by it
)
MOMENTS = 2  # tensors of a row's size that an optimizer keeps, at most: two for all that we know


class Rows:
    """Parameters, gradients, moments and buffers of K models."""

    def __init__(self, model: nn.Module, order: Sequence[str], count: int) -> None:
        """Make room for `count` models like this one.

        Args:
            order: the names of the parameters as they follow one another in a row.
        """
        self.count = count
        known = dict(model.named_parameters())
        sample = known[order[0]]
        self.spans: dict[str, tuple[int, int]] = {}
        size = 0
        for name in order:
            self.spans[name] = (size, size + known[name].numel())
            size += -(-known[name].numel() // ALIGNMENT) * ALIGNMENT
        self.size = size
        self.values = sample.detach().new_zeros(count, size)
        self.gradients = torch.zeros_like(self.values)
        self.moments = [torch.zeros_like(self.values) for _ in range(MOMENTS)]
        self.shapes = {name: known[name].shape for name in order}
        self.parameters = {
            name: self._stacked(self.values, name).requires_grad_(known[name].requires_grad) for name in order
        }
        self.gradient_of = {name: self._stacked(self.gradients, name) for name in order}
        self.buffers = {name: buffer.new_zeros((count, *buffer.shape)) for name, buffer in model.named_buffers()}

    def _stacked(self, rows: Tensor, name: str) -> Tensor:
        """Return one parameter of all rows [K, ...]."""
        start, end = self.spans[name]
        return rows[:, start:end].view(self.count, *self.shapes[name])

    def of(self, rows: Tensor, row: int, name: str) -> Tensor:
        """Return one parameter of one row, in its own shape."""
        start, end = self.spans[name]
        return rows[row, start:end].view(self.shapes[name])

    @torch.no_grad()
    def adopt(self, row: int, model: nn.Module) -> None:
        """Bring a model into a row: its values are copied, its parameters and buffers become views of the row."""
        self.values[row].zero_()  # what lies between parameters as well
        for name, parameter in model.named_parameters():
            place = self.of(self.values, row, name)
            place.copy_(parameter)
            parameter.data = place
            parameter.grad = None
        for name, buffer in model.named_buffers():
            place = self.buffers[name][row]
            place.copy_(buffer)
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = place

    @torch.no_grad()
    def snapshot(self, row: int) -> dict[str, Tensor]:
        """Return a copy of a row's buffers, which training moves whether the row is to be trained or not."""
        return {name: buffer[row].clone() for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def restore(self, row: int, buffers: dict[str, Tensor]) -> None:
        """Bring a row's buffers back to a snapshot."""
        for name, buffer in buffers.items():
            self.buffers[name][row].copy_(buffer)
