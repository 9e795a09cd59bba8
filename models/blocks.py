"""Blocks of the mlp, the cnn and the cnn1d: a layer, its norm, activation and dropout, and optionally a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from torch import Tensor, nn

from hpo.models.activations import ACTIVATIONS, Activation, ActivationOptions, widening
from hpo.models.depth import StochasticDepth, rates
from hpo.models.dropout import Dropout
from hpo.models.inits import InitOptions, initialise
from hpo.models.norms import Norm, NormOptions, norm
from hpo.models.preparing import Options, prepared

Rate = Annotated[float, Ge(0), Lt(1)]
Widths = Annotated[Sequence[Annotated[int, Gt(0), Le(2**24)]], MaxLen(1000)]
Depth = Annotated[int, Gt(0), Le(1000)]
MAX_BLOCKS = 5000  # keeps the time to build a model at seconds, not hours


class TooLarge(ValueError):
    """Raised for a model that is too large for any machine."""


class Layers(ActivationOptions, NormOptions, InitOptions, Options, total=False):
    """The options that the mlp, the cnn and the cnn1d share."""

    residual: bool
    """Whether a block's input is added to its output (He et al. 2016). A linear map adapts it where the sizes differ."""
    stochastic_depth: Rate
    """Probability of skipping the last residual block for an image. It grows linearly from the first block on."""
    input_dropout: Rate
    """Dropout probability of the input values."""


class Residual(nn.Module):
    """A body beside a shortcut: their outputs are added."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, rate: float | None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.depth: nn.Module = nn.Identity() if rate is None else StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut(x) + body(x), the body dropped for some images by stochastic depth."""
        summed: Tensor = self.shortcut(x) + self.depth(self.body(x))
        return summed


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Builds the blocks of one model."""

    norm: Norm
    activation: Activation
    dropout: float | None  # after each activation; None: no such layer
    options: Layers
    depth: int  # number of blocks in the model

    def __post_init__(self) -> None:
        if self.depth > MAX_BLOCKS:
            raise TooLarge(f"has {self.depth:,} blocks, but at most {MAX_BLOCKS:,} are possible; make it shallower")

    def dense(self, index: int, inputs: int, features: int) -> list[nn.Module]:
        """Return the layers of block `index` (from 0), which maps [B, inputs] to [B, features]."""
        wide = features * widening(self.activation)
        layer = nn.Linear(inputs, wide, bias=self._has_bias)
        body = self._body([layer, *norm(self.norm, wide, "features", self.options)])
        if not self._is_residual:
            return body
        shortcut = nn.Identity() if inputs == features else nn.Linear(inputs, features, bias=False)
        return [Residual(nn.Sequential(*body), shortcut, self._rate(index))]

    def convolution(self, index: int, inputs: int, channels: int) -> list[nn.Module]:
        """Return the layers of block `index` (from 0): a 3x3 convolution, [B, inputs, H, W] to [B, channels, H, W]."""
        wide = channels * widening(self.activation)
        layer = nn.Conv2d(inputs, wide, kernel_size=3, padding=1, bias=self._has_bias)
        body = self._body([layer, *norm(self.norm, wide, "images", self.options)])
        if not self._is_residual:
            return body
        shortcut = nn.Identity() if inputs == channels else nn.Conv2d(inputs, channels, kernel_size=1, bias=False)
        return [Residual(nn.Sequential(*body), shortcut, self._rate(index))]

    def convolution1d(self, index: int, inputs: int, channels: int, kernel: int) -> list[nn.Module]:
        """Return the layers of block `index` (from 0): a convolution over time, [B, inputs, T] to [B, channels, T].

        Args:
            kernel: steps of the kernel, odd.
        """
        wide = channels * widening(self.activation)
        layer = nn.Conv1d(inputs, wide, kernel, padding=kernel // 2, bias=self._has_bias)
        body = self._body([layer, *norm(self.norm, wide, "series", self.options)])
        if not self._is_residual:
            return body
        shortcut = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, kernel_size=1, bias=False)
        return [Residual(nn.Sequential(*body), shortcut, self._rate(index))]

    def finished(self, layers: Sequence[nn.Module], name: str) -> nn.Module:
        """Return the model made of these layers, its weights initialised.

        Args:
            name: the model's name.
        """
        model = nn.Sequential(*layers)
        initialise(model, self.options)
        return prepared(model, name, self.options, lsuv=self.options.get("init") == "lsuv")

    @property
    def at_input(self) -> list[nn.Module]:
        """The dropout layer of the input, or no layer."""
        return [Dropout(self.options["input_dropout"])] if "input_dropout" in self.options else []

    @property
    def _has_bias(self) -> bool:
        # A batch norm subtracts the bias again (Ioffe & Szegedy 2015, section 3.2). Its gradient is only rounding noise,
        # which Adam would amplify to steps as large as the learning rate.
        return self.norm != "batch"

    @property
    def _is_residual(self) -> bool:
        return self.options.get("residual", False)

    def _rate(self, index: int) -> float | None:
        """Return the probability of skipping a block; None if the option is not given.

        A rate of 0 is kept apart from None, since runs of rate 0 share a stack with runs of other rates.
        """
        return (
            rates(self.options["stochastic_depth"], self.depth)[index] if "stochastic_depth" in self.options else None
        )

    def _body(self, layers: Sequence[nn.Module]) -> list[nn.Module]:
        dropout = [] if self.dropout is None else [Dropout(self.dropout)]
        return [*layers, ACTIVATIONS[self.activation](self.options), *dropout]
