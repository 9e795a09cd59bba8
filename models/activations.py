"""Activations by name, most of them torch's own modules, and the options that shape them.

A shape (slope, alpha or beta) that an option gives is a buffer of the module, or a parameter where it is learned. So
runs that differ in it only have the same architecture, and are trained in one stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypedDict

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

Activation = Literal[
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "softplus",
    "leaky_relu",
    "rrelu",
    "prelu",
    "elu",
    "selu",
    "swish",
    "swiglu",
    "mish",
    "relu2",
    "hardsigmoid",
    "hardtanh",
    "hardswish",
]


class ActivationOptions(TypedDict, total=False):
    """Options of the activations. An activation ignores the options that it has no use for."""

    negative_slope: Annotated[float, Ge(0)]
    """leaky_relu: slope below 0 (default 0.01). prelu: its initial value (default 0.25)."""
    lower: Annotated[float, Ge(0)]
    """rrelu: smallest slope that is drawn (default 1/8)."""
    upper: Annotated[float, Ge(0)]
    """rrelu: largest slope that is drawn (default 1/3)."""
    alpha: Annotated[float, Gt(0)]
    """elu: the output tends to -alpha for large negative inputs (default 1)."""
    beta: Annotated[float, Gt(0)]
    """swish: x sigmoid(beta x). softplus: log(1 + exp(beta x)) / beta. Default 1."""
    learn_beta: bool
    """swish: whether beta is trained, one value per layer."""


def _leaky(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _softplus(x: Tensor, beta: Tensor) -> Tensor:
    return F.softplus(beta * x) / beta


def _swish(x: Tensor, beta: Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


#: By name: functions of the values and of a shape that broadcasts to them.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "leaky": _leaky,
    "elu": _elu,
    "softplus": _softplus,
    "swish": _swish,
}


class Shaped(nn.Module):
    """One of FORMULAS with its shape: a buffer outside the state dict, or a learned parameter."""

    shape: Tensor

    def __init__(self, formula: str, shape: float, *, learned: bool = False) -> None:
        super().__init__()
        self.formula = formula
        value = torch.tensor(float(shape))
        if learned:
            self.shape = nn.Parameter(value)
        else:
            self.register_buffer("shape", value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x. x may have any shape."""
        return FORMULAS[self.formula](x, self.shape.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.formula}, learned={isinstance(self.shape, nn.Parameter)}"


class ReLU2(nn.Module):
    """The square of ReLU (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, 0)**2."""
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """SiLU of the first half of the features times the second half (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 2 C, ...] to [B, C, ...]."""
        gate, value = x.chunk(2, dim=1)
        return F.silu(gate) * value


class RReLU(nn.Module):
    """Randomised leaky ReLU (Xu et al. 2015).

    In train mode each negative element gets its own slope, uniform in [lower, upper). In eval mode the slope is their
    mean. Unlike `nn.RReLU` it draws from `generator` (None: torch's global generator); see `models.drawing`.
    """

    def __init__(self, lower: float = 1 / 8, upper: float = 1 / 3, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if lower > upper:
            raise ValueError(f"rrelu: lower = {lower} is greater than upper = {upper}; swap them")
        self.lower = lower
        self.upper = upper
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Return x where it is positive, else x times its slope."""
        if not self.training:
            return F.leaky_relu(x, (self.lower + self.upper) / 2)
        slopes = torch.empty_like(x).uniform_(self.lower, self.upper, generator=self.generator)
        return torch.where(x > 0, x, slopes * x)

    def extra_repr(self) -> str:
        return f"lower={self.lower}, upper={self.upper}"


def _leaky_relu(options: ActivationOptions) -> nn.Module:
    return Shaped("leaky", options["negative_slope"]) if "negative_slope" in options else nn.LeakyReLU()


def _softplus_or_shaped(options: ActivationOptions) -> nn.Module:
    return Shaped("softplus", options["beta"]) if "beta" in options else nn.Softplus()


#: torch's own modules serve where the defaults are wanted: their kernels are faster than our formulas.
ACTIVATIONS: dict[Activation, Callable[[ActivationOptions], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "gelu": lambda _: nn.GELU(),
    "silu": lambda _: nn.SiLU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "softplus": _softplus_or_shaped,
    "leaky_relu": _leaky_relu,
    "rrelu": lambda options: RReLU(options.get("lower", 1 / 8), options.get("upper", 1 / 3)),
    "prelu": lambda options: Shaped("leaky", options.get("negative_slope", 0.25), learned=True),
    "elu": lambda options: Shaped("elu", options["alpha"]) if "alpha" in options else nn.ELU(),
    "selu": lambda _: nn.SELU(),
    "swish": lambda options: Shaped("swish", options.get("beta", 1.0), learned=options.get("learn_beta", False)),
    "swiglu": lambda _: SwiGLU(),
    "mish": lambda _: nn.Mish(),
    "relu2": lambda _: ReLU2(),
    "hardsigmoid": lambda _: nn.Hardsigmoid(),
    "hardtanh": lambda _: nn.Hardtanh(),
    "hardswish": lambda _: nn.Hardswish(),
}


def widening(activation: Activation) -> int:
    """Return the number of input features per output feature of an activation."""
    return 2 if activation == "swiglu" else 1
