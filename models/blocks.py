"""What the mlp and the cnn are made of: a layer with its norm, activation and dropout, with a shortcut beside it or not.

`Layers` are the options that the two share.
"""

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
MAX_BLOCKS = 5000  # that building them takes seconds, not hours


class TooLarge(ValueError):
    """Raised for a model that is too large for any machine."""


class Layers(ActivationOptions, NormOptions, InitOptions, Options, total=False):
    """The options that the mlp and the cnn share."""

    residual: bool
    """Whether a block's input is added to its output (He et al. 2016), through a linear map where their sizes differ."""
    stochastic_depth: Rate
    """Probability with which the last residual block is skipped, for each image; of earlier ones evenly less."""
    input_dropout: Rate
    """Share of the input's values that are dropped."""


class Residual(nn.Module):
    """A body with a shortcut around it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, rate: float | None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.depth: nn.Module = nn.Identity() if rate is None else StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut(x) + body(x)."""
        summed: Tensor = self.shortcut(x) + self.depth(self.body(x))
        return summed


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the blocks of one model look."""

    norm: Norm
    activation: Activation
    dropout: float | None  # behind each activation; None for no such layer
    options: Layers
    depth: int  # blocks in all

    def __post_init__(self) -> None:
        if self.depth > MAX_BLOCKS:
            raise TooLarge(f"has {self.depth:,} blocks, at most {MAX_BLOCKS:,} are possible; make it shallower")

    def dense(self, index: int, inputs: int, features: int) -> list[nn.Module]:
        """Return block number `index`, from inputs [B, inputs] to [B, features]."""
        wide = features * widening(self.activation)
        layer = nn.Linear(inputs, wide, bias=self._has_bias)
        body = self._body([layer, *norm(self.norm, wide, 1, self.options)])
        if not self._is_residual:
            return body
        shortcut = nn.Identity() if inputs == features else nn.Linear(inputs, features, bias=False)
        return [Residual(nn.Sequential(*body), shortcut, self._rate(index))]

    def convolution(self, index: int, inputs: int, channels: int) -> list[nn.Module]:
        """Return block number `index`, a 3x3 convolution, from [B, inputs, H, W] to [B, channels, H, W]."""
        wide = channels * widening(self.activation)
        layer = nn.Conv2d(inputs, wide, kernel_size=3, padding=1, bias=self._has_bias)
        body = self._body([layer, *norm(self.norm, wide, 2, self.options)])
        if not self._is_residual:
            return body
        shortcut = nn.Identity() if inputs == channels else nn.Conv2d(inputs, channels, kernel_size=1, bias=False)
        return [Residual(nn.Sequential(*body), shortcut, self._rate(index))]

    def finished(self, layers: Sequence[nn.Module], name: str) -> nn.Module:
        """Return the model that these layers make, with its first weights."""
        model = nn.Sequential(*layers)
        initialise(model, self.options)
        return prepared(model, name, self.options, lsuv=self.options.get("init") == "lsuv")

    @property
    def at_input(self) -> list[nn.Module]:
        """The dropout of the input, if there is any."""
        return [Dropout(self.options["input_dropout"])] if "input_dropout" in self.options else []

    @property
    def _has_bias(self) -> bool:
        # A batch norm subtracts it again, its gradient is rounding noise, and Adam would blow that noise up to steps of
        # the size of the learning rate (Ioffe & Szegedy 2015, section 3.2).
        return self.norm != "batch"

    @property
    def _is_residual(self) -> bool:
        return self.options.get("residual", False)

    def _rate(self, index: int) -> float | None:
        """Return how often a block is skipped; None if the option was not given, as runs of rate 0 share stacks with others."""
        return (
            rates(self.options["stochastic_depth"], self.depth)[index] if "stochastic_depth" in self.options else None
        )

    def _body(self, layers: Sequence[nn.Module]) -> list[nn.Module]:
        dropout = [] if self.dropout is None else [Dropout(self.dropout)]
        return [*layers, ACTIVATIONS[self.activation](self.options), *dropout]
