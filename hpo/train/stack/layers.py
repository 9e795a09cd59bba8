"""Layers of K models as one layer, by type of module.

There are two layouts. *Images* are [B, K*C, H, W]: a convolution of K models is one convolution with K times as many
groups. *Dense* values are [K, F, B], with the batch last: a linear layer of K models is one batched product with the
bias added, and batch norm and cross-entropy read its output without a copy. HFTA (Wang et al., MLSys 2021) stacks with
the batch in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.models import Dropout
from hpo.models.activations import FORMULAS, ReLU2, Shaped, SwiGLU
from hpo.models.depth import StochasticDepth
from hpo.train.graphs import Draws
from hpo.train.stack.flat_parameters import ALIGNMENT

Layout = Literal["input", "images", "dense"]

FEW_CHANNELS = 7  # most input channels of a convolution for which the CPU uses its kernel for first layers


class Unstackable(Exception):
    """Raised if K models of this architecture cannot be trained as one, with the reason."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of a forward pass of K models, except the images."""

    count: int  # K
    parameters: Mapping[str, Tensor]  # [K, ...]
    buffers: Mapping[str, Tensor]  # [K, ...]
    training: bool
    noise: Draws
    filling: int = 0  # filler images at the end of each batch; no result may depend on them

    def flat(self, name: str) -> Tensor:
        """Return a parameter of all models, concatenated along the first dimension [K * n, ...]."""
        return self.parameters[name].flatten(0, 1)


Operation = Callable[[Pass, Tensor], Tensor]
Rule = Callable[[Any, str, Layout], tuple[Operation, Layout]]  # layer, its name, layout of its input


def laid_out(at: Pass, images: Tensor) -> Tensor:
    """Return the input as images [B, K*C, H, W]."""
    if images.ndim == 4:
        images = images.expand(at.count, *images.shape)
    return images.transpose(0, 1).flatten(1, 2)


def flatten(module: nn.Flatten | None, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    """Flatten all dimensions after the first. `module` is None if the model calls a function."""
    if module is not None and (module.start_dim, module.end_dim) != (1, -1):
        raise Unstackable(f"{module} flattens other dimensions than all after the first")

    def from_input(at: Pass, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.expand(at.count, *x.shape)
        return _dense(x.flatten(2).transpose(1, 2))

    def from_images(at: Pass, x: Tensor) -> Tensor:
        return _dense(x.reshape(len(x), at.count, -1).permute(1, 2, 0))

    operations: dict[Layout, Operation] = {
        "input": from_input,
        "images": from_images,
        "dense": lambda _at, x: x,
    }
    return operations[layout], "dense"


def _dense(x: Tensor) -> Tensor:
    """Return dense values [K, F, B] that are contiguous unless F is a multiple of ALIGNMENT.

    Without it the rounding of the CPU's product for a gradient depends on the place in a cache line where its result
    begins. That place differs between rows unless each model's values fill whole cache lines.
    """
    return x if x.shape[1] % ALIGNMENT == 0 else x.contiguous()


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


def _conv2d(module: nn.Conv2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images")
    if module.padding_mode != "zeros":
        raise Unstackable(f"{module} pads by {module.padding_mode}")
    has_bias = module.bias is not None
    # The CPU's kernel for less than 8 input channels rounds differently from the one for more. Such layers use the
    # first for any K, with two or more models at a time. It exists for 8 * n output channels; others have one kernel.
    together = FEW_CHANNELS // module.in_channels // 2 * 2 if module.out_channels // module.groups % 8 == 0 else 0

    def conv2d(at: Pass, x: Tensor) -> Tensor:
        weight, bias = at.flat(f"{name}.weight"), at.flat(f"{name}.bias") if has_bias else None
        if x.device.type != "cpu" or not 0 < together < at.count:
            return convolve(x, weight, bias)
        xs = torch.split(x, together * module.in_channels, 1)
        weights = torch.split(weight, together * module.out_channels)
        biases = [None] * len(xs) if bias is None else torch.split(bias, together * module.out_channels)
        return torch.cat([convolve(*part) for part in zip(xs, weights, biases, strict=True)], 1)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = x.shape[1] // module.in_channels * module.groups
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, groups)

    return conv2d, "images"


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images" if isinstance(module, nn.BatchNorm2d) else "dense")
    tracks = module.running_mean is not None
    if tracks and module.momentum is None:
        raise Unstackable(f"{module} averages over all batches (momentum = None)")
    momentum, eps, affine = module.momentum or 0.0, module.eps, module.affine

    def batch_norm(at: Pass, x: Tensor) -> Tensor:
        uses_batch = at.training or not tracks
        filling = at.filling if uses_batch else 0
        dim = 0 if x.ndim == 4 else 2
        x = x.narrow(dim, 0, x.shape[dim] - filling) if filling else x
        shape = x.shape
        mean, variance = (
            at.buffers[f"{name}.{key}"].view(-1) if tracks else None for key in ("running_mean", "running_var")
        )
        weight, bias = (at.flat(f"{name}.{key}") if affine else None for key in ("weight", "bias"))
        flat = x.reshape(1, -1, shape[2]) if x.ndim == 3 else x
        y = F.batch_norm(flat, mean, variance, weight, bias, uses_batch, momentum, eps).view(shape)
        return filled(y, dim, filling)

    return batch_norm, layout


def _group_norm(module: nn.GroupNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "dense" if layout == "dense" else "images")

    def of_images(at: Pass, x: Tensor) -> Tensor:
        weight, bias = (at.flat(f"{name}.{key}") if module.affine else None for key in ("weight", "bias"))
        return F.group_norm(x, at.count * module.num_groups, weight, bias, module.eps)

    def of_features(at: Pass, x: Tensor) -> Tensor:
        y = F.group_norm(x.transpose(1, 2).flatten(0, 1), module.num_groups, None, None, module.eps)
        y = y.view(at.count, -1, module.num_channels)  # [K, B, F]
        if module.affine:
            weight, bias = (at.parameters[f"{name}.{key}"].unsqueeze(1) for key in ("weight", "bias"))
            y = torch.addcmul(bias, y, weight)
        return _dense(y.transpose(1, 2))

    return of_features if layout == "dense" else of_images, layout


def _layer_norm(module: nn.LayerNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    shape, has_bias = module.normalized_shape, module.bias is not None
    _expect(module, layout, "dense" if len(shape) == 1 else "images" if len(shape) == 3 else "input")

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
        return (_by_model(at, x) * factors.t()[:, :, None, None, None]).flatten(1, 2)

    return stochastic_depth, layout


def _by_model(at: Pass, images: Tensor) -> Tensor:
    """Return images [B, K*C, H, W] as [B, K, C, H, W]."""
    return images.reshape(len(images), at.count, -1, *images.shape[2:])


def _shaped(module: Shaped, name: str, layout: Layout) -> tuple[Operation, Layout]:
    formula, kept = FORMULAS[module.formula], isinstance(module.shape, nn.Parameter)

    def shaped(at: Pass, x: Tensor) -> Tensor:
        shape = (at.parameters if kept else at.buffers)[f"{name}.shape"].to(x.dtype)  # [K]
        if layout == "dense":
            return formula(x, shape.view(-1, 1, 1))
        return formula(_by_model(at, x), shape.view(-1, 1, 1, 1)).flatten(1, 2)

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
    _expect(module, layout, "images")
    if getattr(module, "return_indices", False):
        raise Unstackable(f"{module} returns indices too")
    return lambda _at, x: module(x), layout


def _expect(module: nn.Module, layout: Layout, wanted: Layout) -> None:
    if layout != wanted:
        got = "images" if layout == "images" else "flat features"
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

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
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
    **dict.fromkeys(POOLS, _pool),
}
