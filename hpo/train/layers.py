"""Layers of K models as one layer: by type of module, what it does to K models' values at once.

Two layouts. *Images* [B, K*C, H, W]: a convolution of K models is one of K times as many groups. *Dense* [K, F, B], the
batch last: a linear layer of K models is one batched product with the bias added, and batch norm and cross-entropy read
what it gives without a copy (HFTA, Wang et al., MLSys 2021, stacks with the batch in front).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.train.noise import Noise
from models import Dropout

Layout = Literal["input", "images", "dense"]


class Unstackable(Exception):
    """Says why K models of this architecture cannot be trained as one."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass of K models works with."""

    count: int  # K
    parameters: Mapping[str, Tensor]  # [K, ...]
    buffers: Mapping[str, Tensor]  # [K, ...]
    training: bool
    noise: Noise

    def flat(self, name: str) -> Tensor:
        """Return a parameter with the models along its first dimension [K * n, ...]."""
        return self.parameters[name].flatten(0, 1)


Operation = Callable[[Pass, Tensor], Tensor]
Rule = Callable[[Any, str, Layout], tuple[Operation, Layout]]  # a layer, its name, how its input lies


def laid_out(at: Pass, images: Tensor) -> Tensor:
    """Return the input as images [B, K*C, H, W]."""
    if images.ndim == 4:
        images = images.expand(at.count, *images.shape)
    return images.transpose(0, 1).flatten(1, 2)


def flatten(module: nn.Flatten | None, _name: str, layout: Layout) -> tuple[Operation, Layout]:
    """Flatten all behind the first dimension; module is None where a function does it."""
    if module is not None and (module.start_dim, module.end_dim) != (1, -1):
        raise Unstackable(f"{module} flattens other dimensions than all behind the first")

    def from_input(at: Pass, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.expand(at.count, *x.shape)
        return x.flatten(2).transpose(1, 2)

    def from_images(at: Pass, x: Tensor) -> Tensor:
        return x.reshape(len(x), at.count, -1).permute(1, 2, 0)

    operations: dict[Layout, Operation] = {
        "input": from_input,
        "images": from_images,
        "dense": lambda _at, x: x,
    }
    return operations[layout], "dense"


def _linear(module: nn.Linear, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "dense")
    has_bias = module.bias is not None

    def linear(at: Pass, x: Tensor) -> Tensor:
        weight = at.parameters[f"{name}.weight"]
        return torch.baddbmm(at.parameters[f"{name}.bias"].unsqueeze(2), weight, x) if has_bias else weight.bmm(x)

    return linear, "dense"


def _conv2d(module: nn.Conv2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images")
    if module.padding_mode != "zeros":
        raise Unstackable(f"{module} pads by {module.padding_mode}")
    has_bias = module.bias is not None

    def conv2d(at: Pass, x: Tensor) -> Tensor:
        bias = at.flat(f"{name}.bias") if has_bias else None
        return F.conv2d(
            x,
            at.flat(f"{name}.weight"),
            bias,
            module.stride,
            module.padding,
            module.dilation,
            at.count * module.groups,
        )

    return conv2d, "images"


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images" if isinstance(module, nn.BatchNorm2d) else "dense")
    tracks = module.running_mean is not None
    if tracks and module.momentum is None:
        raise Unstackable(f"{module} averages over all batches (momentum = None)")
    momentum, eps, affine = module.momentum or 0.0, module.eps, module.affine

    def batch_norm(at: Pass, x: Tensor) -> Tensor:
        shape = x.shape
        mean, variance = (
            at.buffers[f"{name}.{key}"].view(-1) if tracks else None for key in ("running_mean", "running_var")
        )
        weight, bias = (at.flat(f"{name}.{key}") if affine else None for key in ("weight", "bias"))
        flat = x.reshape(1, -1, shape[2]) if x.ndim == 3 else x
        uses_batch = at.training or not tracks
        return F.batch_norm(flat, mean, variance, weight, bias, uses_batch, momentum, eps).view(shape)

    return batch_norm, layout


def _group_norm(module: nn.GroupNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    _expect(module, layout, "images")

    def group_norm(at: Pass, x: Tensor) -> Tensor:
        weight, bias = (at.flat(f"{name}.{key}") if module.affine else None for key in ("weight", "bias"))
        return F.group_norm(x, at.count * module.num_groups, weight, bias, module.eps)

    return group_norm, "images"


def _layer_norm(module: nn.LayerNorm, name: str, layout: Layout) -> tuple[Operation, Layout]:
    shape, has_bias = module.normalized_shape, module.bias is not None
    _expect(module, layout, "dense" if len(shape) == 1 else "images" if len(shape) == 3 else "input")

    def layer_norm(at: Pass, x: Tensor) -> Tensor:
        # Either way the models come first or second, and what is normalised last.
        split = x.transpose(1, 2) if layout == "dense" else x.reshape(len(x), at.count, -1, *x.shape[2:])
        y = F.layer_norm(split, shape, None, None, module.eps)
        if module.elementwise_affine:
            weight = at.parameters[f"{name}.weight"]
            bias = at.parameters[f"{name}.bias"] if has_bias else torch.zeros_like(weight)
            if layout == "dense":
                weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)
            y = torch.addcmul(bias, y, weight)
        return y.transpose(1, 2) if layout == "dense" else y.flatten(1, 2)

    return layer_norm, layout


def _dropout(_module: Dropout, name: str, layout: Layout) -> tuple[Operation, Layout]:
    def dropout(at: Pass, x: Tensor) -> Tensor:
        factors = at.noise.factors(name, x.numel() // at.count) if at.training else None
        if factors is None:
            return x
        if layout == "dense":
            return x * factors.view(x.shape)
        split = x.reshape(len(x), at.count, -1, *x.shape[2:])  # [B, K, C, H, W]
        return (split * factors.view(at.count, len(x), *split.shape[2:]).transpose(0, 1)).flatten(1, 2)

    return dropout, layout


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
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(POOLS, _pool),
}
