"""Preparation of a model before training: pre-trained weights, quantiles, LSUV, pre-training as an autoencoder.

A model function ends with a call of `prepared`. Steps that need inputs are kept on the model as `Preparation`.
`prepare` runs them when the run is built, and places the edges of quantile embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from hpo.models import inits
from hpo.models.tables import NUMBERS, Inputs, fit_quantiles
from hpo.models.transfer import Published, State, TransferOptions, transfer


class PretrainOptions(TypedDict, total=False):
    """Options of unsupervised pre-training."""

    pretrain: Literal["none", "autoencoder"]
    """autoencoder: all layers but the head are trained until a linear decoder restores the inputs (default none)."""
    pretrain_steps: Annotated[int, Ge(1)]
    """Batches of pre-training (default 200)."""
    pretrain_lr: Annotated[float, Gt(0)]
    """Learning rate of pre-training, by Adam (default 1e-3)."""


class Options(PretrainOptions, TransferOptions, total=False):
    """The options that all models share."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The steps that need inputs."""

    lsuv: bool
    autoencoder_steps: int
    autoencoder_lr: float


def prepared(
    model: nn.Module,
    name: str,
    options: Options,
    adapt: Callable[[State], State] = lambda state: state,
    *,
    lsuv: bool = False,
    published: Published | None = None,
) -> nn.Module:
    """Load weights, freeze layers and note the steps that need inputs, as the options say.

    ValueError if options contradict each other.

    Args:
        name: torchvision's name of the model, if torchvision has weights for it.
        adapt: fits loaded weights to the model where their shapes differ.
        lsuv: whether `fit_to` scales the weights later.
        published: returns the weights of a name; None: torchvision's.
    """
    if lsuv and options.get("weights", "none") != "none":
        raise ValueError('init = "lsuv" would scale the loaded weights too; leave out `init` or `weights`')
    steps = options.get("pretrain_steps", 200) if options.get("pretrain", "none") != "none" else 0
    transfer(model, name, options, adapt, fitted=bool(steps), published=published)
    if steps or lsuv:
        left = Preparation(lsuv=lsuv, autoencoder_steps=steps, autoencoder_lr=options.get("pretrain_lr", 1e-3))
        vars(model)["preparation"] = left
    return model


def prepare(model: nn.Module, batches: Iterator[Inputs]) -> nn.Module:
    """Run the steps that need inputs and return the model. `batches` is not read if there is no such step.

    Args:
        batches: endless batches of normalised training inputs on the model's device.
    """
    fit_quantiles(model, batches)
    left = vars(model).pop("preparation", None)
    if isinstance(left, Preparation) and left.lsuv:
        inits.fit_to(model, next(batches))
    if isinstance(left, Preparation) and left.autoencoder_steps:
        train_autoencoder(model, batches, left.autoencoder_steps, left.autoencoder_lr)
    return model


def train_autoencoder(model: nn.Module, batches: Iterator[Inputs], steps: int, lr: float) -> list[float]:
    """Train all layers but the head as the encoder of an autoencoder (Hinton & Salakhutdinov 2006).

    A linear decoder restores the inputs from the head's input. With dropout of the model's input this is a denoising
    autoencoder (Vincent et al. 2008). Of a table it restores the numbers. ValueError if the last layer is not linear, or
    if the inputs have no numbers.

    Returns:
        The mean squared error of each step.
    """
    head = inits.layers(model)[-1]
    if not isinstance(head, nn.Linear):
        raise ValueError(f'pretrain = "autoencoder" needs a model whose last layer is linear, not {head}')
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(True)
    codes: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, given: codes.append(given[0]))
    decoder = nn.Linear(head.in_features, _numbers(next(batches)).shape[1])
    of_head = set(head.parameters())
    encoder = [parameter for parameter in wanted if parameter not in of_head]
    optimizer = torch.optim.Adam([*encoder, *decoder.parameters()], lr=lr)
    model.train()
    losses = []
    try:
        for _ in range(steps):
            inputs = next(batches)
            codes.clear()
            model(inputs)
            loss = F.mse_loss(decoder(codes[0]), _numbers(inputs))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    finally:
        handle.remove()
        for parameter, wants in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(wants)
    return losses


def _numbers(inputs: Inputs) -> Tensor:
    """Return the numbers of inputs that an autoencoder can restore [B, count]."""
    found = inputs.get(NUMBERS) if isinstance(inputs, dict) else inputs
    if found is None or not found.is_floating_point():
        raise ValueError(
            'pretrain = "autoencoder" restores numbers, but the inputs have categories or words; leave it out'
        )
    return found.flatten(1)
