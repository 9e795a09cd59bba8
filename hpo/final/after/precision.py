"""Weights and arithmetic in 16 bits."""

from __future__ import annotations

import torch
from torch import nn

from hpo.train.inputs import Batch


def bf16(model: nn.Module, inputs: Batch) -> nn.Module:  # noqa: ARG001  (a step's signature)
    """Convert weights, norms and arithmetic to bfloat16: the range of float32, 8 bits of precision (Kalamkar et al. 2019)."""
    return model.to(torch.bfloat16)


def fp16(model: nn.Module, inputs: Batch) -> nn.Module:  # noqa: ARG001
    """Convert weights, norms and arithmetic to float16: 11 bits of precision, largest number 65,504 (IEEE 754)."""
    return model.to(torch.float16)
