"""Layers of K models as one layer, by type of module.

There are three layouts. *Images* are [B, K*C, H, W] and *series* [B, K*C, T]: a convolution of K models is one
convolution with K times as many groups. *Dense* values are [K, F, B], with the batch last: a linear layer of K models is
one batched product with the bias added, and batch norm and cross-entropy read its output without a copy. HFTA (Wang et
al., MLSys 2021) stacks with the batch in front. A model's own input is [K, B, ...] until a layer lays it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.models import Dropout
from hpo.models.activations import FORMULAS, ReLU2, Shaped, SwiGLU
from hpo.models.depth import StochasticDepth
from hpo.models.tables import (
    CategoryEmbedding,
    LinearEmbedding,
    NumberEmbedding,
    PeriodicEmbedding,
    QuantileEmbedding,
    rows_of,
)
from hpo.models.tokens import TokenEmbedding, is_word
from hpo.train.graphs import Draws
from hpo.train.stack.flat_parameters import ALIGNMENT

Layout = Literal["input", "images", "series", "dense"]

FEW_CHANNELS = 7  # most input channels of a convolution for which the CPU uses its kernel for first layers


class Unstackable(Exception):
    """Raised if K models of this architecture cannot be trained as one, with the reason."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of a forward pass of K models, except the batch."""

    count: int  # K
    parameters: Mapping[str, Tensor]  # [K, ...]
    buffers: Mapping[str, Tensor]  # [K, ...]
    training: bool
    noise: Draws
    filling: int = 0  # filler rows at the end of each batch; no result may depend on them

    def flat(self, name: str) -> Tensor:
        """Return a parameter of all models, concatenated along the first dimension [K * n, ...]."""
        return self.parameters[name].flatten(0, 1)


class Forward(Protocol):
    """The forward pass of K models: inputs [K, B, ...], or [B, ...] for all models, to outputs [K, O, B]."""

    name: str
    # Optional: lanes: int. On a CPU batches are filled up to a multiple of it, see `Pass.filling`.

    def __call__(self, at: Pass, inputs: Any, /) -> Tensor: ...


Operation = Callable[[Pass, Tensor], Tensor]
Rule = Callable[[Any, str, Layout], tuple[Operation, Layout]]  # layer, its name, layout of its input


def laid_out(dims: int) -> tuple[Operation, Layout]:
    """Return how an input [K, B, ...] is laid out for a layer, and the layout, by the dimensions of one model's batch."""

    def with_channels(_at: Pass, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    def dense(_at: Pass, x: Tensor) -> Tensor:
        return _dense(x.transpose(1, 2))

    operations: dict[int, tuple[Operation, Layout]] = {
        2: (dense, "dense"),
        3: (with_channels, "series"),
        4: (with_channels, "images"),
    }
    if dims not in operations:
        raise Unstackable(f"an input of {dims} dimensions has no stacked form")
    return operations[dims]


def flatten(module: nn.Flatten | None, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    """Flatten all dimensions after the first. `module` is None if the model calls a function."""
    if module is not None and (module.start_dim, module.end_dim) != (1, -1):
        raise Unstackable(f"{module} flattens other dimensions than all after the first")

    def from_input(_at: Pass, x: Tensor) -> Tensor:
        return _dense(x.flatten(2).transpose(1, 2))

    def from_channels(at: Pass, x: Tensor) -> Tensor:
        return _dense(x.reshape(len(x), at.count, -1).permute(1, 2, 0))

    operations: dict[Layout, Operation] = {
        "input": from_input,
        "images": from_channels,
        "series": from_channels,
        "dense": lambda _at, x: x,
    }
    return operations[layout], "dense"


def _dense(x: Tensor) -> Tensor:
    """Return dense values [K, F, B] that are contiguous unless F is a multiple of ALIGNMENT.

    Without it the rounding of the CPU's product for a gradient depends on the place in a cache line where its result
    begins. That place differs between rows unless each model's values fill whole cache lines.
    """
    return x if x.shape[1] % ALIGNMENT == 0 else x.contiguous()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return dense values of several sources as one."""
    return _dense(torch.cat(list(parts), 1))


def _linear(module: nn.Linear, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "dense")
    has_bias = module.bias is not None

    def linear(at: Pass, x: Tensor) -> Tensor:
        weight = at.parameters[f"{name}.weight"]
        return torch.baddbmm(at.parameters[f"{name}.bias"].unsqueeze(2), weight, x) if has_bias else weight.bmm(x)

    return linear, "dense"


def filled(x: Tensor, dim: int, more: int, value: float = 0.0) -> Tensor:
    """Return x with `more` entries of this value added at the end of a dimension."""
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, more), value=value) if more else x


def _convolution(module: nn.Conv1d | nn.Conv2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images" if isinstance(module, nn.Conv2d) else "series")
    function: Callable[..., Tensor] = F.conv2d if isinstance(module, nn.Conv2d) else F.conv1d
    if module.padding_mode != "zeros":
        raise Unstackable(f"{module} pads by {module.padding_mode}")
    has_bias = module.bias is not None
    # The CPU's kernel for less than 8 input channels rounds differently from the one for more. Such layers use the
    # first for any K, with two or more models at a time. It exists for 8 * n output channels; others have one kernel.
    together = FEW_CHANNELS // module.in_channels // 2 * 2 if module.out_channels // module.groups % 8 == 0 else 0

    def convolution(at: Pass, x: Tensor) -> Tensor:
        weight, bias = at.flat(f"{name}.weight"), at.flat(f"{name}.bias") if has_bias else None
        if x.device.type != "cpu" or not 0 < together < at.count:
            return convolve(x, weight, bias)
        xs = torch.split(x, together * module.in_channels, 1)
        weights = torch.split(weight, together * module.out_channels)
        biases = [None] * len(xs) if bias is None else torch.split(bias, together * module.out_channels)
        return torch.cat([convolve(*part) for part in zip(xs, weights, biases, strict=True)], 1)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = x.shape[1] // module.in_channels * module.groups
        return function(x, weight, bias, module.stride, module.padding, module.dilation, groups)

    return convolution, layout


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(
        module, layout, "images" if isinstance(module, nn.BatchNorm2d) else "series" if layout == "series" else "dense"
    )
    tracks = module.running_mean is not None
    if tracks and module.momentum is None:
        raise Unstackable(f"{module} averages over all batches (momentum = None)")
    momentum, eps, affine = module.momentum or 0.0, module.eps, module.affine

    def batch_norm(at: Pass, x: Tensor) -> Tensor:
        uses_batch = at.training or not tracks
        filling = at.filling if uses_batch else 0
        dim = 2 if layout == "dense" else 0
        x = x.narrow(dim, 0, x.shape[dim] - filling) if filling else x
        shape = x.shape
        mean, variance = (
            at.buffers[f"{name}.{key}"].view(-1) if tracks else None for key in ("running_mean", "running_var")
        )
        weight, bias = (at.flat(f"{name}.{key}") if affine else None for key in ("weight", "bias"))
        flat = x.reshape(1, -1, shape[2]) if layout == "dense" else x
        y = F.batch_norm(flat, mean, variance, weight, bias, uses_batch, momentum, eps).view(shape)
        return filled(y, dim, filling)

    return batch_norm, layout


def _group_norm(module: nn.GroupNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images" if layout == "input" else layout)

    def of_channels(at: Pass, x: Tensor) -> Tensor:
        weight, bias = (at.flat(f"{name}.{key}") if module.affine else None for key in ("weight", "bias"))
        return F.group_norm(x, at.count * module.num_groups, weight, bias, module.eps)

    def of_features(at: Pass, x: Tensor) -> Tensor:
        y = F.group_norm(x.transpose(1, 2).flatten(0, 1), module.num_groups, None, None, module.eps)
        y = y.view(at.count, -1, module.num_channels)  # [K, B, F]
        if module.affine:
            weight, bias = (at.parameters[f"{name}.{key}"].unsqueeze(1) for key in ("weight", "bias"))
            y = torch.addcmul(bias, y, weight)
        return _dense(y.transpose(1, 2))

    return of_features if layout == "dense" else of_channels, layout


def _layer_norm(module: nn.LayerNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    shape, has_bias = module.normalized_shape, module.bias is not None
    wanted: dict[int, Layout] = {1: "dense", 2: "series", 3: "images"}
    _expect(module, layout, wanted.get(len(shape), "input"))

    def layer_norm(at: Pass, x: Tensor) -> Tensor:
        # In both layouts the models are the first or second dimension, and the normalised dimensions are the last.
        split = x.transpose(1, 2) if layout == "dense" else x.reshape(len(x), at.count, -1, *x.shape[2:])
        y = F.layer_norm(split, shape, None, None, module.eps)
        if module.elementwise_affine:
            weight = at.parameters[f"{name}.weight"]
            bias = at.parameters[f"{name}.bias"] if has_bias else torch.zeros_like(weight)
            if layout == "dense":
                weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)
            y = torch.addcmul(bias, y, weight)
        return _dense(y.transpose(1, 2)) if layout == "dense" else y.flatten(1, 2)

    return layer_norm, layout


def _dropout(_module: Dropout, name: str, layout: Layout) -> tuple[Operation, Layout]:
    def dropout(at: Pass, x: Tensor) -> Tensor:
        if not at.training:
            return x
        batch = x.shape[2 if layout == "dense" else 0]
        drawn = batch - at.filling
        factors = at.noise.factors(name, x.numel() // batch * drawn // at.count)
        if factors is None:
            return x
        factors = factors.to(x.dtype)
        if layout == "dense":
            return x * filled(factors.view(at.count, -1, drawn), 2, at.filling)
        split = x.reshape(batch, at.count, -1, *x.shape[2:])  # [B, K, C, H, W]
        factors = factors.view(at.count, drawn, *split.shape[2:]).transpose(0, 1)
        return (split * filled(factors, 0, at.filling)).flatten(1, 2)

    return dropout, layout


def _stochastic_depth(_module: StochasticDepth, name: str, layout: Layout) -> tuple[Operation, Layout]:
    def stochastic_depth(at: Pass, x: Tensor) -> Tensor:
        if not at.training:
            return x
        drawn = x.shape[2 if layout == "dense" else 0] - at.filling
        factors = at.noise.factors(f"{name}.mask", drawn)  # [K, B]
        if factors is None:
            return x
        factors = filled(factors.to(x.dtype), 1, at.filling)
        if layout == "dense":
            return x * factors.unsqueeze(1)
        return (_by_model(at, x) * factors.t().view(*factors.t().shape, *[1] * (x.ndim - 1))).flatten(1, 2)

    return stochastic_depth, layout


def _by_model(at: Pass, values: Tensor) -> Tensor:
    """Return images [B, K*C, H, W] or series [B, K*C, T] as [B, K, C, ...]."""
    return values.reshape(len(values), at.count, -1, *values.shape[2:])


def _shaped(module: Shaped, name: str, layout: Layout) -> tuple[Operation, Layout]:
    formula, kept = FORMULAS[module.formula], isinstance(module.shape, nn.Parameter)

    def shaped(at: Pass, x: Tensor) -> Tensor:
        shape = (at.parameters if kept else at.buffers)[f"{name}.shape"].to(x.dtype)  # [K]
        if layout == "dense":
            return formula(x, shape.view(-1, 1, 1))
        return formula(_by_model(at, x), shape.view(-1, *[1] * (x.ndim - 1))).flatten(1, 2)

    return shaped, layout


def _swiglu(_module: SwiGLU, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    def swiglu(at: Pass, x: Tensor) -> Tensor:
        if layout == "dense":
            gate, value = x.chunk(2, 1)
            return _dense(F.silu(gate) * value)
        gate, value = _by_model(at, x).chunk(2, 2)
        return (F.silu(gate) * value).flatten(1, 2)

    return swiglu, layout


def _elementwise(module: nn.Module, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    return lambda _at, x: module(x), layout


def _pool(module: nn.Module, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images" if isinstance(module, POOLS) else "series")
    if getattr(module, "return_indices", False):
        raise Unstackable(f"{module} returns indices too")
    return lambda _at, x: module(x), layout


# --- columns of a table, and words ------------------------------------------------------------------------------------------


def _numbers(module: NumberEmbedding, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "dense")
    formula = type(module).formula

    def numbers(at: Pass, x: Tensor) -> Tensor:
        keys = [f"{name}.{key}" for key in module.tensors]
        return formula(x, *(at.parameters[key] if key in at.parameters else at.buffers[key] for key in keys))

    return numbers, "dense"


def _categories(_module: CategoryEmbedding, name: str, layout: Layout) -> tuple[Operation, Layout]:
    if layout != "input":
        raise Unstackable(f"{name} embeds computed values")

    def categories(at: Pass, codes: Tensor) -> Tensor:  # [K, B, C]
        sizes, offsets = (at.buffers[f"{name}.{key}"].unsqueeze(1) for key in ("sizes", "offsets"))
        found = _embedded(at.parameters[f"{name}.weight"], rows_of(codes, sizes, offsets))
        return _dense(found.flatten(2).transpose(1, 2))

    return categories, "dense"


def _tokens(_module: TokenEmbedding, name: str, layout: Layout) -> tuple[Operation, Layout]:
    if layout != "input":
        raise Unstackable(f"{name} embeds computed values")

    def tokens(at: Pass, codes: Tensor) -> Tensor:  # [K, B, L]
        weight = at.parameters[f"{name}.weight"]
        found = _embedded(weight, codes) * is_word(codes, weight.dtype)
        return found.permute(1, 0, 3, 2).flatten(1, 2)

    return tokens, "series"


def _embedded(weight: Tensor, codes: Tensor) -> Tensor:
    """Return each model's rows [K, ..., size] of its table; codes [K, ...]."""
    count, rows, _ = weight.shape
    first = torch.arange(count, device=codes.device) * rows
    return F.embedding(codes + first.view(-1, *[1] * (codes.ndim - 1)), weight.flatten(0, 1))


def _expect(module: nn.Module, layout: Layout, wanted: Layout) -> None:
    if layout != wanted:
        got = layout if layout in ("images", "series") else "flat features"
        raise Unstackable(f"{module} is applied to {got}")


ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    ReLU2,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
POOLS_1D = (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d)

NUMBERS = (LinearEmbedding, PeriodicEmbedding, QuantileEmbedding)
#: Layers that get a model's own input as it is [K, B, ...].
OF_INPUT = (nn.Flatten, CategoryEmbedding, TokenEmbedding)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: flatten,
    Dropout: _dropout,
    StochasticDepth: _stochastic_depth,
    Shaped: _shaped,
    SwiGLU: _swiglu,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys((*POOLS, *POOLS_1D), _pool),
    **dict.fromkeys(NUMBERS, _numbers),
    CategoryEmbedding: _categories,
    TokenEmbedding: _tokens,
}
