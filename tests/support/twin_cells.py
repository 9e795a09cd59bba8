"""The fused cells of recurrent layers, which torch has for accelerators alone, for the twin device.

The formulas are those of torch's documentation of LSTM and GRU. What a backward pass needs lies in the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _sum(*given: Tensor | None) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*[one for one in given if one is not None])).sum(0)


def lstm(inputs: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new hidden state, the new cell, and the four gates as workspace."""
    i, f, g, o = _sum(inputs, hidden, *biases).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * cell + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def lstm_backward(
    of_hidden: Tensor | None, of_cell: Tensor | None, cell: Tensor, new: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of the gates' sums, of the old cell, and of a bias."""
    i, f, g, o = workspace.chunk(4, 1)
    shown = new.tanh()
    at_hidden = torch.zeros_like(new) if of_hidden is None else of_hidden
    at_cell = at_hidden * o * (1 - shown * shown) + (0.0 if of_cell is None else of_cell)
    parts = [
        at_cell * g * i * (1 - i),
        at_cell * cell * f * (1 - f),
        at_cell * i * (1 - g * g),
        at_hidden * shown * o * (1 - o),
    ]
    gates = torch.cat(parts, 1)
    return gates, at_cell * f, gates.sum(0) if has_bias else None


def gru(
    inputs: Tensor, hidden: Tensor, state: Tensor, of_inputs: Tensor | None = None, of_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the new hidden state and the workspace: both gates, the candidate, the old state and its share."""
    given, kept = _sum(inputs, of_inputs).chunk(3, 1), _sum(hidden, of_hidden).chunk(3, 1)
    reset, update = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
    candidate = (given[2] + reset * kept[2]).tanh()
    return candidate + update * (state - candidate), torch.cat([reset, update, candidate, state, kept[2]], 1)


def gru_backward(
    gradient: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the inputs' and the state's sums, of the old state, and of both biases."""
    reset, update, candidate, state, kept = workspace.chunk(5, 1)
    at_candidate = gradient * (1 - update) * (1 - candidate * candidate)
    at_reset = at_candidate * kept * reset * (1 - reset)
    at_update = gradient * (state - candidate) * update * (1 - update)
    inputs = torch.cat([at_reset, at_update, at_candidate], 1)
    hidden = torch.cat([at_reset, at_update, at_candidate * reset], 1)
    biases = (inputs.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return inputs, hidden, gradient * update, *biases


CELLS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": lstm,
    "_thnn_fused_lstm_cell_backward_impl": lstm_backward,
    "_thnn_fused_gru_cell": gru,
    "_thnn_fused_gru_cell_backward": gru_backward,
}
