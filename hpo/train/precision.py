"""The number types that a model is trained in: of its parameters and images, and of its forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16"]


def autocasting(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a model of this precision runs forward."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def number_type(model: nn.Module) -> torch.dtype:
    """Return the type that images are fed in: the parameters' own, so that a model in float64 is trained in
    float64.
    """
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
