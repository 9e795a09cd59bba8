"""Recurrent networks on series and texts: GRU (Cho et al. 2014) and LSTM (Hochreiter & Schmidhuber 1997).

Alone, a layer is torch's own kernel. It has no rule for vmap, so a stack of models computes the steps one by one
(`Recurrent.by_steps`). Both compute the same, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, Unpack

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from hpo.models import shapes, tokens
from hpo.models.blocks import Depth, Rate
from hpo.models.dropout import Dropout
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape, TokenShape
from hpo.models.tokens import TokenEmbedding

Cell = Literal["gru", "lstm"]
Pooling = Literal["last", "mean", "max"]
Size = Annotated[int, Ge(1), Le(2**16)]
GATES: dict[Cell, int] = {"gru": 3, "lstm": 4}


class Recurrent(nn.Module):
    """One layer in one direction: [B, T, C] to the states [B, T, width], from a state of zeros.

    Parameters have the names, shapes and order of gates of `nn.GRU` and `nn.LSTM`, without their suffix.
    """

    def __init__(self, cell: Cell, inputs: int, width: int) -> None:
        super().__init__()
        self.cell: Cell = cell
        self.width = width
        self.by_steps = False  # set in the copy that vmap runs
        bound, gates = 1 / math.sqrt(width), GATES[cell]
        self.weight_ih = nn.Parameter(torch.empty(gates * width, inputs).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(gates * width, width).uniform_(-bound, bound))
        self.bias_ih = nn.Parameter(torch.empty(gates * width).uniform_(-bound, bound))
        self.bias_hh = nn.Parameter(torch.empty(gates * width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Return the state after each step."""
        if self.by_steps:
            return _BY_STEPS[self.cell](self, x)
        weights: list[Tensor] = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        start = torch.zeros(1, len(x), self.width, dtype=x.dtype, device=x.device)
        if self.cell == "gru":
            return torch.gru(x, start, weights, True, 1, 0.0, self.training, False, True)[0]
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0]

    def extra_repr(self) -> str:
        return f"{self.cell}, {self.weight_ih.shape[1]}, {self.width}"


def _gru(layer: Recurrent, x: Tensor) -> Tensor:
    sizes = [2 * layer.width, layer.width]  # of the two gates, and of the new state
    of_gates, of_new = torch.split(F.linear(x, layer.weight_ih, layer.bias_ih), sizes, 2)
    state, states = torch.zeros_like(of_new[:, 0]), []
    for gates, new in zip(of_gates.unbind(1), of_new.unbind(1), strict=True):
        own_gates, own = torch.split(F.linear(state, layer.weight_hh, layer.bias_hh), sizes, 1)
        reset, update = torch.sigmoid(gates + own_gates).chunk(2, 1)
        state = torch.lerp(torch.tanh(torch.addcmul(new, reset, own)), state, update)
        states.append(state)
    return torch.stack(states, 1)


def _lstm(layer: Recurrent, x: Tensor) -> Tensor:
    given = F.linear(x, layer.weight_ih, layer.bias_ih + layer.bias_hh)
    state = memory = torch.zeros_like(given[:, 0, : layer.width])
    states = []
    for step in given.unbind(1):
        enter, forget, new, leave = (step + F.linear(state, layer.weight_hh)).chunk(4, 1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(leave) * torch.tanh(memory)
        states.append(state)
    return torch.stack(states, 1)


_BY_STEPS: dict[Cell, Callable[[Recurrent, Tensor], Tensor]] = {"gru": _gru, "lstm": _lstm}


class Layer(nn.Module):
    """A recurrent layer, perhaps with a second one beside it that reads backward."""

    def __init__(self, cell: Cell, inputs: int, width: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.ahead = Recurrent(cell, inputs, width)
        self.back = Recurrent(cell, inputs, width) if bidirectional else None

    def forward(self, x: Tensor, turned: Tensor) -> list[Tensor]:
        """Return the states of each direction after each step [B, T, width], in the order of the steps.

        Args:
            turned: the place of each step in the reversed sequence [B, T, 1].
        """
        states = [self.ahead(x)]
        if self.back is not None:
            states.append(_taken(self.back(_taken(x, turned)), turned))
        return states


class RecurrentNetwork(nn.Module):
    """Recurrent layers, a pooling over the steps, and a linear layer. The padding of a text changes nothing."""

    def __init__(
        self, embedding: TokenEmbedding | None, layers: list[Layer], dropout: float, pooling: Pooling, head: nn.Linear
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in layers)
        self.pooling: Pooling = pooling
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map series [B, C, T] or codes [B, L] to [B, outputs]."""
        if self.embedding is None:
            steps, series = torch.full_like(x[:, 0, 0], x.shape[2], dtype=torch.int64), x
        else:
            steps, series = tokens.lengths(x), self.embedding(x)
        values, last = series.transpose(1, 2), (steps - 1).view(-1, 1, 1)
        places = torch.arange(values.shape[1], device=x.device).view(1, -1, 1)
        is_in = places <= last  # [B, T, 1]
        turned = torch.where(is_in, last - places, places)  # each sequence backward, its padding in place
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            values = self.dropouts[index - 1](torch.cat(states, 2)) if states else values
            states = layer(values, turned)
        return self.head(self.dropouts[-1](self._pooled(states, last, is_in)))  # type: ignore[no-any-return]

    def _pooled(self, states: list[Tensor], last: Tensor, is_in: Tensor) -> Tensor:
        if self.pooling == "last":  # of each direction: the state that has seen all steps
            return torch.cat([_taken(states[0], last)[:, 0], *(back[:, 0] for back in states[1:])], 1)
        joined = torch.cat(states, 2)
        if self.pooling == "max":
            return torch.where(is_in, joined, -math.inf).amax(1)
        return torch.where(is_in, joined, 0).sum(1) / (last[:, 0] + 1)


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Return values [B, T, F] at these places [B, t, 1] of the second dimension."""
    return torch.gather(values, 1, places.expand(-1, -1, values.shape[2]))


def _family(cell: Cell) -> Callable[..., nn.Module]:
    def build(
        shape: Shape,
        outputs: int,
        *,
        width: Size = 64,
        depth: Depth = 1,
        bidirectional: bool = False,
        pooling: Pooling = "last",
        embedding_size: Size = 64,
        dropout: Rate = 0.0,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build a recurrent network for series or texts, with a linear layer on top.

        Args:
            width: features of the state, in each direction.
            depth: number of layers.
            bidirectional: whether each layer has a second one beside it that reads backward.
            pooling: `last`: the state that has seen all steps. `mean`, `max`: over the states after each step.
            embedding_size: features per word of a text.
            dropout: dropout probability after each layer.
        """
        shapes.expect(cell, shape)
        embedding, inputs = None, 0
        if isinstance(shape, TokenShape):
            embedding, inputs = TokenEmbedding(shape.vocabulary, embedding_size), embedding_size
        elif isinstance(shape, tuple):
            inputs = shape[0]
        layers = []
        for _ in range(depth):
            layers.append(Layer(cell, inputs, width, bidirectional=bidirectional))
            inputs = 2 * width if bidirectional else width
        model = RecurrentNetwork(embedding, layers, dropout, pooling, nn.Linear(inputs, outputs))
        return prepared(model, cell, options)

    build.__name__ = build.__qualname__ = cell
    return build


gru = _family("gru")
lstm = _family("lstm")
