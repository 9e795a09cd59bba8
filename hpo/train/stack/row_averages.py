"""The averages of K runs' weights, each in a row like the weights, so that a stack validates them as one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpo.train.optim.averaging import Average, Pairs
from hpo.train.stack.flat_parameters import FlatParameters


class RowAverages:
    """The averages of the runs in a stack. They take no memory until a run has one."""

    def __init__(self, rows: FlatParameters) -> None:
        self._rows = rows
        self._values: Tensor | None = None
        self._buffers: dict[str, Tensor] = {}
        self._averages: dict[int, tuple[Average, Pairs]] = {}  # by row

    @torch.no_grad()
    def put(self, row: int, average: Average | None, model: nn.Module) -> None:
        """Move the average of the run in this row, if it has one, into the row."""
        if average is None:
            return
        self._make_room()
        assert self._values is not None
        self._values[row].zero_()  # also the gaps between parameters
        buffers = {name for name, _ in model.named_buffers()}
        for name, value in average.values.items():
            place = self._buffers[name][row] if name in buffers else self._rows.of(self._values, row, name)
            average.values[name] = place.copy_(value)
        pairs = [(self._values[row], self._rows.values[row])]
        pairs += [(average.values[name], self._rows.buffers[name][row]) for name in sorted(buffers)]
        self._averages[row] = (average, Pairs.of(pairs))

    def __bool__(self) -> bool:
        return bool(self._averages)

    def remove(self, row: int) -> None:
        """Remove a row's average and give it its own tensors."""
        if row in self._averages:
            average, _ = self._averages.pop(row)
            average.values = {name: value.clone() for name, value in average.values.items()}

    def take_step(self, rows: Sequence[int], epoch_of: Mapping[int, int]) -> None:
        """Take the weights of these rows after a step, where an average wants them. Epochs, by row, count from 1."""
        for row in self._averages.keys() & set(rows):
            average, pairs = self._averages[row]
            if average.takes_step(epoch_of[row]):
                average.take(pairs)

    def take_epoch(self, epoch_of: Mapping[int, int]) -> None:
        """Take the weights of all rows at the end of their epochs, where an average wants them."""
        for row, (average, pairs) in self._averages.items():
            if average.takes_epoch(epoch_of[row]):
                average.take(pairs)

    @torch.no_grad()
    def judged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters [K, ...] and buffers [K, ...] for validation: averages where runs have one, else weights."""
        rows = self._rows
        if self._values is None or not any(average.count for average, _ in self._averages.values()):
            return rows.parameters, rows.buffers
        for row in range(rows.count):
            if row not in self._averages or not self._averages[row][0].count:
                self._values[row].copy_(rows.values[row])
                for name, buffer in self._buffers.items():
                    buffer[row].copy_(rows.buffers[name][row])
        parameters = {name: rows.stacked(self._values, first) for name, first in rows.names.items()}
        buffers = {name: self._buffers[first] for name, first in rows.buffer_names.items()}
        return parameters, buffers

    def _make_room(self) -> None:
        if self._values is None:
            self._values = torch.zeros_like(self._rows.values)
            firsts = set(self._rows.buffer_names.values())
            self._buffers = {name: torch.zeros_like(self._rows.buffers[name]) for name in firsts}
