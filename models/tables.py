"""The columns of a table as features: embeddings of categories and of numbers.

Embeddings of numbers are those of Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep Learning".
Each is a formula of the numbers [..., F, B], with the batch last. A stack of models calls it with the models in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, TypedDict

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from hpo.models.shapes import TableShape

Embedding = Literal["none", "linear", "periodic", "quantile"]
Inputs = Tensor | dict[str, Tensor]
Size = Annotated[int, Ge(1), Le(4096)]

NUMBERS, CATEGORIES = "numbers", "categories"  # the tensors of a table
SEEN = 10_000  # rows of which quantiles are computed
REACH = 10.0  # how far the outer bins go on, in widths of the bin


class TableOptions(TypedDict, total=False):
    """Options of the columns of a table, and of features."""

    embedding: Embedding
    """Embedding of each number: none (default), linear, periodic, or quantile (piecewise linear between quantiles of the
    training part). ReLU follows (Gorishniy et al. 2022: LR, PLR and Q-LR)."""
    embedding_size: Size
    """Features per number of an embedding (default 8)."""
    frequencies: Size
    """periodic: frequencies per number (default 16)."""
    frequency_scale: Annotated[float, Gt(0)]
    """periodic: standard deviation of the initial frequencies (default 0.1)."""
    bins: Size
    """quantile: bins per number (default 16)."""
    category_size: Size
    """Features per category (default 8)."""


# --- numbers --------------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    embedded = torch.addcmul(bias.view_as(weight).unsqueeze(-1), weight.unsqueeze(-1), x.unsqueeze(-2))
    return F.relu(embedded).flatten(-3, -2)


def _periodic(x: Tensor, weight: Tensor, bias: Tensor, frequency: Tensor) -> Tensor:
    angle = 2 * math.pi * frequency.unsqueeze(-1) * x.unsqueeze(-2)
    return _mixed(torch.cat([angle.cos(), angle.sin()], -2), weight, bias)


def _quantile(x: Tensor, weight: Tensor, bias: Tensor, edge: Tensor, scale: Tensor, reach: Tensor) -> Tensor:
    part = (x.unsqueeze(-2) - edge.unsqueeze(-1)) * scale.unsqueeze(-1)
    below, above = reach.unbind(-1)
    return _mixed(torch.clamp(part, below.unsqueeze(-1), above.unsqueeze(-1)), weight, bias)


def _mixed(code: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU of a linear layer for each number: [..., F, n, B] to [..., F * size, B]."""
    return F.relu(weight.matmul(code).flatten(-3, -2) + bias.unsqueeze(-1))


class NumberEmbedding(nn.Module):
    """Embeds each of F numbers: [B, F] to [B, F * size].

    `formula` maps numbers [..., F, B] and the tensors of the names in `tensors` to features [..., F * size, B].
    """

    formula: Callable[..., Tensor]
    tensors: tuple[str, ...] = ("weight", "bias")

    def __init__(self, count: int, size: int, codes: int) -> None:
        """Make the linear layers.

        Args:
            count: numbers.
            size: features per number.
            codes: values from which each number's linear layer is computed; 0: from the number itself.
        """
        super().__init__()
        bound = 1 / math.sqrt(max(1, codes))
        shape = (count, size, codes) if codes else (count, size)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count * size).uniform_(-bound, bound))  # one dimension: no weight decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of numbers [B, F]."""
        return type(self).formula(x.t(), *(getattr(self, name) for name in self.tensors)).t()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.weight.shape[1]}"


class LinearEmbedding(NumberEmbedding):
    """ReLU of a multiple of the number and a bias."""

    formula = staticmethod(_linear)

    def __init__(self, count: int, size: int) -> None:
        super().__init__(count, size, 0)


class PeriodicEmbedding(NumberEmbedding):
    """ReLU of a linear layer of sines and cosines, whose frequencies are learned."""

    formula = staticmethod(_periodic)
    tensors = ("weight", "bias", "frequency")

    def __init__(self, count: int, size: int, frequencies: int, scale: float) -> None:
        super().__init__(count, size, 2 * frequencies)
        self.frequency = nn.Parameter(torch.randn(count, frequencies) * scale)


class QuantileEmbedding(NumberEmbedding):
    """ReLU of a linear layer of a piecewise linear encoding.

    Bin t of a number is 0 below the bin, 1 above it, and grows linearly within. The outermost bins go on growing, up to
    REACH widths. Edges are quantiles of the training part (`fit`), until then those of the normal distribution.
    """

    formula = staticmethod(_quantile)
    tensors = ("weight", "bias", "edge", "scale", "reach")
    edge: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self, count: int, size: int, bins: int) -> None:
        super().__init__(count, size, bins)
        for name in ("edge", "scale"):
            self.register_buffer(name, torch.zeros(count, bins))
        self.register_buffer("reach", torch.zeros(count, bins, 2))
        shares = torch.linspace(0.5 / (bins + 1), 1 - 0.5 / (bins + 1), bins + 1, dtype=torch.float64)
        self._place(torch.special.ndtri(shares).expand(count, -1))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Place the edges at the quantiles of these numbers [N, F]."""
        shares = torch.linspace(0, 1, self.edge.shape[1] + 1, dtype=torch.float64)
        self._place(torch.quantile(x.double(), shares, dim=0).t())

    @torch.no_grad()
    def _place(self, edges: Tensor) -> None:
        """Take over edges [F, bins + 1]. A bin without width is 0 for every number."""
        widths = edges.diff(dim=1)
        is_bin = widths > 0
        self.edge.copy_(edges[:, :-1])
        self.scale.copy_(torch.where(is_bin, 1 / widths, 0))
        is_first = is_bin & (is_bin.cumsum(1) == 1)
        is_last = is_bin & (is_bin.flip(1).cumsum(1).flip(1) == 1)
        self.reach[..., 0].copy_(torch.where(is_first, -REACH, 0.0))
        self.reach[..., 1].copy_(torch.where(is_last, 1 + REACH, 1.0))


def number_embedding(count: int, options: TableOptions) -> NumberEmbedding | None:
    """Return the embedding of numbers that the options ask for, None if they ask for none."""
    kind, size = options.get("embedding", "none"), options.get("embedding_size", 8)
    if kind == "linear":
        return LinearEmbedding(count, size)
    if kind == "periodic":
        return PeriodicEmbedding(count, size, options.get("frequencies", 16), options.get("frequency_scale", 0.1))
    return QuantileEmbedding(count, size, options.get("bins", 16)) if kind == "quantile" else None


# --- categories -----------------------------------------------------------------------------------------------------------


class CategoryEmbedding(nn.Module):
    """Embeds the codes of columns with categories: [B, C] to [B, C * size]. A code that a column lacks counts as code 0.

    Code 0 starts as zeros.
    """

    sizes: Tensor
    offsets: Tensor

    def __init__(self, sizes: tuple[int, ...], size: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(size)
        self.weight = nn.Parameter(torch.empty(sum(sizes), size).uniform_(-bound, bound))
        counts = torch.tensor(sizes, dtype=torch.int64)
        self.register_buffer("sizes", counts, persistent=False)
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)
        with torch.no_grad():  # code 0 may never be trained, so it must not stand for a random value
            self.weight[self.offsets] = 0.0

    def forward(self, codes: Tensor) -> Tensor:
        """Return the features of codes [B, C]."""
        return F.embedding(rows_of(codes, self.sizes, self.offsets), self.weight).flatten(1)

    def extra_repr(self) -> str:
        return f"{len(self.sizes)}, size={self.weight.shape[1]}"


def rows_of(codes: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    """Return the rows of codes [..., C] in the one table of all columns."""
    return torch.where((codes >= 0) & (codes < sizes), codes, 0) + offsets


# --- a table --------------------------------------------------------------------------------------------------------------


class TableFeatures(nn.Module):
    """All columns of a table as features [B, F]: those of numbers, then those of categories."""

    def __init__(self, shape: TableShape, options: TableOptions) -> None:
        super().__init__()
        self.numbers: nn.Module | None = None
        self.categories: nn.Module | None = None
        if shape.numbers:
            self.numbers = number_embedding(shape.numbers, options) or nn.Identity()
        if shape.categories:
            self.categories = CategoryEmbedding(shape.categories, options.get("category_size", 8))

    def forward(self, table: dict[str, Tensor]) -> Tensor:
        """Return the features of a batch."""
        if self.categories is None:
            return self.numbers(table[NUMBERS])  # type: ignore[misc, no-any-return]
        categories: Tensor = self.categories(table[CATEGORIES])
        return categories if self.numbers is None else torch.cat([self.numbers(table[NUMBERS]), categories], 1)


def width_of(shape: TableShape, options: TableOptions) -> int:
    """Return the number of features of a table."""
    size = options.get("embedding_size", 8) if options.get("embedding", "none") != "none" else 1
    return shape.numbers * size + len(shape.categories) * options.get("category_size", 8)


def fit_quantiles(model: nn.Module, batches: Iterator[Inputs]) -> None:
    """Place the edges of a model's quantile embedding at quantiles of SEEN training rows, if it has such an embedding."""
    embeddings = [module for module in model.modules() if isinstance(module, QuantileEmbedding)]
    if not embeddings:
        return
    rows: list[Tensor] = []
    while sum(map(len, rows)) < SEEN:
        batch = next(batches)
        rows.append(batch[NUMBERS] if isinstance(batch, dict) else batch)
    for embedding in embeddings:
        embedding.fit(torch.cat(rows))
