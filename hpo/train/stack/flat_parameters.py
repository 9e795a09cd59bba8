"""The parameters of K models of one architecture, each model's in one row.

A row holds all parameters of a model one after the other. So a stack sees one parameter of all models as one tensor
[K, ...], and an optimizer sees all parameters of a model as one tensor [size]. Meanwhile the models' own parameters and
buffers are views of their rows, so `model.state_dict()` shows the trained values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Elements. Every parameter of every row starts at the same place of a cache line, since kernels round depending on it.
ALIGNMENT = 16
MOMENTS = 2  # most tensors of a row's size that one of our known optimizers keeps


class FlatParameters:
    """Parameters, gradients, moments and buffers of K models."""

    def __init__(self, model: nn.Module, trained: Sequence[str], count: int) -> None:
        """Allocate rows for `count` models like this one.

        Args:
            trained: names of the trained parameters, in their order in a row. The others follow, without gradients.
        """
        self.count = count
        known = dict(model.named_parameters())
        fixed = [name for name in known if name not in set(trained)]
        self.spans: dict[str, tuple[int, int]] = {}
        moving = self._lay_out(trained, known)
        size = self._lay_out(fixed, known, moving)
        self.values = known[trained[0]].detach().new_zeros(count, size)
        self.gradients = self.values.new_zeros(count, moving)
        self.moments = [torch.zeros_like(self.gradients) for _ in range(MOMENTS)]
        self.trained = list(trained)
        self._gaps: list[Tensor] | None = None  # zeros for the places between parameters, of all rows
        self.shapes = {name: parameter.shape for name, parameter in known.items()}
        self.parameters = {name: self.stacked(self.values, name) for name in self.spans}
        self.leaves = [self.parameters[name].requires_grad_() for name in trained]
        self.leaf_gradients = [self.stacked(self.gradients, name) for name in trained]
        self.buffers = {name: buffer.new_zeros((count, *buffer.shape)) for name, buffer in model.named_buffers()}
        # A shared tensor has several names. These map each name to the first.
        self.names = _first_names(model.named_parameters(remove_duplicate=False))
        self.buffer_names = _first_names(model.named_buffers(remove_duplicate=False))
        self.parameters |= {name: self.parameters[first] for name, first in self.names.items()}
        self.buffers |= {name: self.buffers[first] for name, first in self.buffer_names.items()}

    def _lay_out(self, names: Iterable[str], known: dict[str, nn.Parameter], size: int = 0) -> int:
        for name in names:
            self.spans[name] = (size, size + known[name].numel())
            size += -(-known[name].numel() // ALIGNMENT) * ALIGNMENT
        return size

    def span_of(self, names: Sequence[str]) -> slice | None:
        """Return the part of a row that these parameters take; None if they are not contiguous."""
        if not names:
            return slice(0, 0)
        order = list(self.spans)
        first = order.index(names[0])
        if order[first : first + len(names)] != list(names):
            return None
        return slice(self.spans[names[0]][0], self.spans[names[-1]][1])

    def stacked(self, rows: Tensor, name: str) -> Tensor:
        """Return one parameter of all rows, as a view [K, ...]."""
        start, end = self.spans[name]
        return rows[:, start:end].view(self.count, *self.shapes[name])

    def of(self, rows: Tensor, row: int, name: str) -> Tensor:
        """Return one parameter of one row, as a view in its own shape."""
        start, end = self.spans[name]
        return rows[row, start:end].view(self.shapes[name])

    @torch.no_grad()
    def take_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients of all leaves into the rows in one call."""
        if self._gaps is None:
            ends = [self.spans[name] for name in self.trained]
            starts = [*(start for start, _ in ends[1:]), self.gradients.shape[1]]
            self._gaps = [
                self.gradients.new_zeros(self.count, start - end) for (_, end), start in zip(ends, starts, strict=True)
            ]
        parts = (gradient.reshape(self.count, -1) for gradient in gradients)
        pairs = zip(parts, self._gaps, strict=True)
        torch.cat([part for pair in pairs for part in pair if part.shape[1]], dim=1, out=self.gradients)

    @torch.no_grad()
    def adopt(self, row: int, model: nn.Module) -> None:
        """Move a model into a row: its values are copied, and its parameters and buffers become views of the row."""
        for rows in (self.values, self.gradients):
            rows[row].zero_()  # also the gaps between parameters
        for name, parameter in model.named_parameters():
            place = self.of(self.values, row, name)
            place.copy_(parameter)
            parameter.data = place
            parameter.grad = None
        places = {buffer: self.buffers[name][row] for name, buffer in model.named_buffers()}
        for buffer, place in places.items():
            place.copy_(buffer)
        _exchange_buffers(model, places)

    @torch.no_grad()
    def snapshot(self, row: int) -> dict[str, Tensor]:
        """Return a copy of a row's buffers. A training step changes them even if the row is not trained."""
        return {name: buffer[row].clone() for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def restore(self, row: int, buffers: dict[str, Tensor]) -> None:
        """Set a row's buffers to those of a snapshot."""
        for name, buffer in buffers.items():
            self.buffers[name][row].copy_(buffer)


@torch.no_grad()
def own_tensors(model: nn.Module) -> None:
    """Give a model in a row its own tensors again, as copies."""
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
        parameter.grad = None
    _exchange_buffers(model, {buffer: buffer.clone() for buffer in model.buffers()})


def _exchange_buffers(model: nn.Module, others: dict[Tensor, Tensor]) -> None:
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        if buffer in others:  # a module used in two places has the new one already
            model.get_submodule(owner)._buffers[attribute] = others[buffer]


def _first_names(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return for each name of a tensor the tensor's first name."""
    first: dict[Tensor, str] = {}
    return {name: first.setdefault(tensor, name) for name, tensor in named}
