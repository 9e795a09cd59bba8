"""Sets the generator of a model's random layers."""

from __future__ import annotations

import torch
from torch import nn

from hpo.models.activations import RReLU
from hpo.models.dropout import Dropout, Masks

DRAWING = (Dropout, RReLU)  # layers with their own generator


def use_generator(model: nn.Module, generator: torch.Generator | None, masks: Masks | None = None) -> None:
    """Make each of our random layers draw from this generator (None: torch's global generator).

    Args:
        masks: what draws the masks of dropout in place of the generator.
    """
    for module in model.modules():
        if isinstance(module, DRAWING):
            module.generator = generator
        if isinstance(module, Dropout):
            module.masks = masks
