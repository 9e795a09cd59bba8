"""The number types of a training: of parameters and images, and of the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16"]


def autocasting(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context for the forward pass of a model in this precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def number_type(model: nn.Module) -> torch.dtype:
    """Return the number type of a model's images: that of its parameters, so that a float64 model gets float64 images."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
