"""Which generator the random layers of a model draw from."""

from __future__ import annotations

import torch
from torch import nn

from hpo.models.activations import RReLU
from hpo.models.dropout import Dropout

DRAWING = (Dropout, RReLU)  # layers with a generator of their own


def use_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Let every layer of ours that draws random numbers draw them from this generator."""
    for module in model.modules():
        if isinstance(module, DRAWING):
            module.generator = generator
