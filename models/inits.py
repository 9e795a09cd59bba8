"""Initial weights of linear and convolution layers, by name.

They are drawn from torch's global CPU generator, which `hpo.train.randomness.initial_model` seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict

import torch
from annotated_types import Gt
from torch import Tensor, nn

Init = Literal[
    "torch",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "lecun_uniform",
    "lecun_normal",
    "orthogonal",
    "uniform",
    "normal",
    "lsuv",
]
Layer = nn.Linear | nn.Conv1d | nn.Conv2d

TOLERANCE = 0.1  # lsuv: allowed difference between a layer's output variance and 1
ROUNDS = 10  # lsuv: most rounds for one layer


class InitOptions(TypedDict, total=False):
    """Options of the initial weights."""

    init: Init
    """How initial weights are drawn (default torch: kaiming_uniform with a = sqrt(5))."""
    init_std: Annotated[float, Gt(0)]
    """uniform and normal: standard deviation (default 0.05)."""
    zero_biases: bool
    """Whether biases start at 0 instead of torch's random values."""


def _lecun_uniform(weight: Tensor) -> None:
    bound = math.sqrt(3 / _fan_in(weight))
    nn.init.uniform_(weight, -bound, bound)


def _lecun_normal(weight: Tensor) -> None:
    nn.init.normal_(weight, 0.0, math.sqrt(1 / _fan_in(weight)))


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()


#: xavier: Glorot & Bengio 2010. kaiming: He et al. 2015, with the gain of ReLU. lecun: LeCun et al. 1998, meant for selu.
#: orthogonal: Saxe et al. 2014. lsuv starts from orthogonal weights.
INITS: dict[Init, Callable[[Tensor], object]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "lecun_uniform": _lecun_uniform,
    "lecun_normal": _lecun_normal,
    "orthogonal": nn.init.orthogonal_,
    "lsuv": nn.init.orthogonal_,
}


@torch.no_grad()
def initialise(model: nn.Module, options: InitOptions) -> None:
    """Draw the weights of a model's linear and convolution layers anew, in order.

    For lsuv, call `fit_to` with inputs afterwards.
    """
    name, std = options.get("init", "torch"), options.get("init_std", 0.05)
    for layer in layers(model):
        if name == "uniform":
            nn.init.uniform_(layer.weight, -math.sqrt(3) * std, math.sqrt(3) * std)
        elif name == "normal":
            nn.init.normal_(layer.weight, 0.0, std)
        elif name != "torch":
            INITS[name](layer.weight)
        if options.get("zero_biases", False) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def layers(model: nn.Module) -> list[Layer]:
    """Return the linear and convolution layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Layer)]


@torch.no_grad()
def fit_to(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> None:
    """Scale each layer's weights, first to last, until its output has variance 1 over a batch.

    This is layer-sequential unit-variance (Mishkin & Matas 2016), with its tolerance of 0.1 and at most 10 rounds. The
    model runs in eval mode, so nothing is dropped, and fresh batch norms change almost nothing. A layer whose output
    does not vary is left as it is.

    Args:
        inputs: a batch of normalised inputs on the model's device.
    """
    training = model.training
    model.eval()
    for layer in layers(model):
        for _ in range(ROUNDS):
            variance = _output(model, layer, inputs).var().item()
            if abs(variance - 1) < TOLERANCE or not 0 < variance < math.inf:
                break
            layer.weight /= math.sqrt(variance)
    model.train(training)


def _output(model: nn.Module, layer: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _input, output: found.append(output))
    try:
        model(inputs)
    finally:
        handle.remove()
    return found[0]
