"""Magnitude pruning: sets weights to zero. Shapes stay the same. Zeros save space in compressed files and time on hardware for
sparse weights.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import prune as pruning

from hpo.errors import StudyError
from hpo.final.after.raw import rows
from hpo.train.inputs import Batch

Layer = nn.Linear | _ConvNd
Share = Annotated[float, Gt(0), Lt(1)]


def prune(model: nn.Module, inputs: Batch, *, share: Share) -> nn.Module:  # noqa: ARG001  (a step's signature)
    """Set the smallest weights of linear layers, convolutions and attention to zero (Han et al. 2015).

    Weights are ranked over the whole model. Biases and norms are left out.

    Args:
        share: the share of the weights.
    """
    weights = [(module, name) for module in model.modules() for name in _weights(module)]
    if not weights:
        raise StudyError("prune: the model has no linear layer, convolution or attention; remove prune")
    pruning.global_unstructured(weights, pruning_method=pruning.L1Unstructured, amount=share)
    for module, name in weights:
        pruning.remove(module, name)  # type: ignore[no-untyped-call]
    return model


def _weights(module: nn.Module) -> list[str]:
    """Return the names of a module's weights, without biases."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if getattr(module, name) is not None]
    return ["weight"] if isinstance(module, Layer) else []


@torch.no_grad()
def channels(model: nn.Module, inputs: Batch, *, share: Share) -> nn.Module:
    """Set whole channels and neurons with the smallest 2-norm to zero, in each layer but the last (Li et al. 2017).

    Each layer keeps at least one output. The bias of an output is set to zero too, so the output is 0. A batch norm after the
    layer would turn the 0 into a constant, so fold first.

    Args:
        share: the share of each layer's outputs.
    """
    layers = _called(model, inputs)[:-1]
    if not layers:
        raise StudyError("channels: the model has no layer before its last one; remove channels")
    for layer in layers:
        dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        outputs = layer.weight.shape[dim]
        count = min(round(share * outputs), outputs - 1)
        pruning.ln_structured(layer, "weight", amount=count, n=2, dim=dim)  # type: ignore[no-untyped-call]
        mask: Tensor = layer.get_buffer("weight_mask")
        dead = mask.transpose(0, dim).flatten(1).sum(1) == 0
        pruning.remove(layer, "weight")  # type: ignore[no-untyped-call]
        # Grouped transposed convolutions order their outputs otherwise.
        if layer.bias is not None and len(dead) == len(layer.bias):
            layer.bias[dead] = 0.0
    return model


def _called(model: nn.Module, inputs: Batch) -> list[Layer]:
    """Return the linear layers and convolutions in the order of a forward pass."""
    called: dict[Layer, None] = {}

    def note(layer: nn.Module, _given: object, _out: object) -> None:
        assert isinstance(layer, Layer)
        called.setdefault(layer)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Layer)]
    try:
        model(rows(inputs, slice(2)))
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
