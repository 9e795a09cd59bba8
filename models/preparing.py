"""What is done to a model before it is trained: weights taken over, or fitted to images.

A model function ends in `prepared`. What needs images is left on the model as `Preparation`, and done by `prepare` when
whoever builds the run has them.
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
from hpo.models.transfer import State, TransferOptions, transfer


class PretrainOptions(TypedDict, total=False):
    """Training before the training, without labels."""

    pretrain: Literal["none", "autoencoder"]
    """autoencoder: all but the head is trained to give what a linear layer can restore the images from; none if not given."""
    pretrain_steps: Annotated[int, Ge(1)]
    """Batches of that, 200 if not given."""
    pretrain_lr: Annotated[float, Gt(0)]
    """Its learning rate, of Adam, 1e-3 if not given."""


class Options(PretrainOptions, TransferOptions, total=False):
    """The options that all models share."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is left to do with images."""

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
) -> nn.Module:
    """Take weights over, freeze layers, note what needs images, all as the options say; ValueError if they disagree.

    Args:
        name: of the model at torchvision, if it has weights there.
        adapt: fits weights of torchvision's or of a file to the model where shapes differ.
        lsuv: whether the weights are to be fitted to images.
    """
    if lsuv and options.get("weights", "none") != "none":
        raise ValueError('init = "lsuv" scales weights that are taken over, too; leave it or `weights` out')
    steps = options.get("pretrain_steps", 200) if options.get("pretrain", "none") != "none" else 0
    transfer(model, name, options, adapt, fitted=bool(steps))
    if steps or lsuv:
        left = Preparation(lsuv=lsuv, autoencoder_steps=steps, autoencoder_lr=options.get("pretrain_lr", 1e-3))
        vars(model)["preparation"] = left
    return model


def prepare(model: nn.Module, batches: Iterator[Tensor]) -> nn.Module:
    """Do what is left to do with images and return the model; nothing is taken from `batches` where there is nothing.

    Args:
        batches: of normalised training images [B, C, H, W], without end, on the model's device.
    """
    left = vars(model).pop("preparation", None)
    if isinstance(left, Preparation) and left.lsuv:
        inits.fit_to(model, next(batches))
    if isinstance(left, Preparation) and left.autoencoder_steps:
        train_autoencoder(model, batches, left.autoencoder_steps, left.autoencoder_lr)
    return model


def train_autoencoder(model: nn.Module, batches: Iterator[Tensor], steps: int, lr: float) -> list[float]:
    """Train all of a model but its head so that a linear layer restores the images from what the head is given (Hinton &
    Salakhutdinov 2006; with dropout of the input it denoises, Vincent et al. 2008); return the mean square errors.

    ValueError if the last layer is not linear.
    """
    head = inits.layers(model)[-1]
    if not isinstance(head, nn.Linear):
        raise ValueError(f'pretrain = "autoencoder" needs a model whose last layer is linear, not {head}')
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(True)
    codes: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, given: codes.append(given[0]))
    first = next(batches)
    decoder = nn.Linear(head.in_features, first[0].numel())
    of_head = set(head.parameters())
    encoder = [parameter for parameter in wanted if parameter not in of_head]
    optimizer = torch.optim.Adam([*encoder, *decoder.parameters()], lr=lr)
    model.train()
    losses = []
    try:
        for _ in range(steps):
            images = next(batches)
            codes.clear()
            model(images)
            loss = F.mse_loss(decoder(codes[0]), images.flatten(1))
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
