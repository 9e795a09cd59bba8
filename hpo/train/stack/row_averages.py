"""The averages of K runs' weights, each in a row like the weights, so that a stack validates them as one model."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpo.train import devices
from hpo.train.optim.averaging import Average, Pairs
from hpo.train.stack.flat_parameters import FlatParameters


class RowAverages:
    """The averages of the runs in a stack. They take no memory until a run has one."""

    def __init__(self, rows: FlatParameters, *, at_once: bool) -> None:
        self._rows = rows
        self._at_once = at_once
        self._takers: list[int] = []  # rows whose weights are taken after each step
        self._shares: deque[Tensor] = deque()  # of the next steps [K, 1]
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

    def remove(self, row: int) -> None:
        """Remove a row's average and give it its own tensors."""
        if row in self._averages:
            average, _ = self._averages.pop(row)
            average.values = {name: value.clone() for name, value in average.values.items()}

    def begin(self, rows: Sequence[int], epoch_of: Mapping[int, int], steps: int) -> None:
        """Prepare the next steps of these rows. Epochs, by row, count from 1."""
        known = self._averages
        self._takers = [row for row in rows if row in known and known[row][0].takes_step(epoch_of[row])]
        if self._takers and self._at_once:
            self._shares = deque(self._shares_of(self._takers, steps))

    def take_step(self) -> None:
        """Take the weights after a step, where an average wants them."""
        if self._takers and self._at_once:
            self._take_at_once(self._takers, self._shares.popleft())
        elif self._takers:
            self._take(self._takers)

    def take_epoch(self, epoch_of: Mapping[int, int]) -> None:
        """Take the weights of all rows at the end of their epochs, where an average wants them."""
        takers = [row for row, (average, _) in self._averages.items() if average.takes_epoch(epoch_of[row])]
        if takers and self._at_once:
            self._take_at_once(takers, *self._shares_of(takers, 1))
        else:
            self._take(takers)

    def _take(self, rows: Sequence[int]) -> None:
        for row in rows:
            average, pairs = self._averages[row]
            average.take(pairs)

    def _shares_of(self, rows: Sequence[int], steps: int) -> Sequence[Tensor]:
        """Return the shares of the newest weights in the averages [K, 1] of so many takes; 0 for other rows."""
        shares = torch.zeros((steps, self._rows.count, 1), dtype=self._rows.values.dtype)
        for row in rows:
            average, _ = self._averages[row]
            counts = range(average.count + 1, average.count + steps + 1)
            taken = [average.averaging.share(count) for count in counts]
            shares[:, row, 0] = torch.tensor(taken, dtype=shares.dtype)
        device = self._rows.values.device
        return devices.sent(shares, device).unbind(0)

    @torch.no_grad()
    def _take_at_once(self, rows: Sequence[int], shares: Tensor) -> None:
        assert self._values is not None
        self._values.lerp_(self._rows.values, shares)
        for name, average in self._buffers.items():
            newest = self._rows.buffers[name]
            of_row = shares.view(-1, *[1] * (average.ndim - 1))
            if average.is_floating_point():
                average.lerp_(newest, of_row.to(average.dtype))
            else:
                average.copy_(torch.where(of_row > 0, newest, average))
        for row in rows:
            self._averages[row][0].count += 1

    @torch.no_grad()
    def judged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters [K, ...] and buffers [K, ...] for validation: averages where runs have one, else weights."""
        rows = self._rows
        if self._values is None or not any(average.count for average, _ in self._averages.values()):
            return rows.parameters, rows.buffers
        shown = [row in self._averages and self._averages[row][0].count > 0 for row in range(rows.count)]
        if not all(shown):
            has_average = torch.tensor(shown, device=rows.values.device)
            pairs = [
                (self._values, rows.values),
                *((buffer, rows.buffers[name]) for name, buffer in self._buffers.items()),
            ]
            for average, newest in pairs:
                average.copy_(torch.where(has_average.view(-1, *[1] * (average.ndim - 1)), average, newest))
        parameters = {name: rows.stacked(self._values, first) for name, first in rows.names.items()}
        buffers = {name: self._buffers[first] for name, first in rows.buffer_names.items()}
        return parameters, buffers

    def _make_room(self) -> None:
        if self._values is None:
            self._values = torch.zeros_like(self._rows.values)
            firsts = set(self._rows.buffer_names.values())
            self._buffers = {name: torch.zeros_like(self._rows.buffers[name]) for name in firsts}
