"""Model families by name, one file each; every keyword-only parameter of a function is an option of the
model.

A model function takes the shape of one image and the number of classes and returns an `nn.Module` that maps
normalised images [B, C, H, W] to logits [B, num_classes]. This package knows torch and nothing of studies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.cnn import cnn
from models.dropout import Dropout, adopt_dropout, use_generator
from models.mlp import mlp

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn}

__all__ = ["MODELS", "Dropout", "adopt_dropout", "cnn", "mlp", "use_generator"]
