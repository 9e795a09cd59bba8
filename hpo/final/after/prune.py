"""Weights set to zero by magnitude. Shapes stay: what zeros save shows in a compressed file or on hardware for them."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import prune as pruning

from hpo.errors import StudyError

Layer = nn.Linear | _ConvNd
Share = Annotated[float, Gt(0), Lt(1)]


def prune(model: nn.Module, images: Tensor, *, share: Share) -> nn.Module:  # noqa: ARG001  (a step's signature)
    """Zero this share of the weights of linear layers, convolutions and attention, the smallest of all of them together.

    Biases and norms stay (Han et al. 2015).
    """
    weights = [(module, name) for module in model.modules() for name in _weights(module)]
    if not weights:
        raise StudyError("prune: the model has no linear layer, convolution or attention; leave it out")
    pruning.global_unstructured(weights, pruning_method=pruning.L1Unstructured, amount=share)
    for module, name in weights:
        pruning.remove(module, name)  # type: ignore[no-untyped-call]
    return model


def _weights(module: nn.Module) -> list[str]:
    """Return the names of the weights that a module multiplies by, biases aside."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if getattr(module, name) is not None]
    return ["weight"] if isinstance(module, Layer) else []


@torch.no_grad()
def channels(model: nn.Module, images: Tensor, *, share: Share) -> nn.Module:
    """Zero whole channels and neurons: in each layer but the last this share of its outputs, those of smallest 2-norm.

    A layer keeps at least one output. The bias goes along, so that the output is 0 (Li et al. 2017); a batch norm behind
    the layer would make a constant of it, so fold first.
    """
    layers = _called(model, images)[:-1]
    if not layers:
        raise StudyError("channels: the model has no layer before its last one; leave it out")
    for layer in layers:
        dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        outputs = layer.weight.shape[dim]
        count = min(round(share * outputs), outputs - 1)
        pruning.ln_structured(layer, "weight", amount=count, n=2, dim=dim)  # type: ignore[no-untyped-call]
        mask: Tensor = layer.get_buffer("weight_mask")
        dead = mask.transpose(0, dim).flatten(1).sum(1) == 0
        pruning.remove(layer, "weight")  # type: ignore[no-untyped-call]
        if layer.bias is not None and len(dead) == len(layer.bias):  # grouped and transposed: another order
            layer.bias[dead] = 0.0
    return model


def _called(model: nn.Module, images: Tensor) -> list[Layer]:
    """Return the linear layers and convolutions in the order in which a forward pass calls them."""
    called: dict[Layer, None] = {}

    def note(layer: nn.Module, _given: object, _out: object) -> None:
        assert isinstance(layer, Layer)
        called.setdefault(layer)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Layer)]
    try:
        model(images[:2])
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
