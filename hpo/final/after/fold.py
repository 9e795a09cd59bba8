"""Folding of batch norms into the layers before them. The function is the same up to rounding."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from hpo.errors import StudyError
from hpo.final.after.extras import quietly
from hpo.train.inputs import Batch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = 1e-3  # of the largest logit; float32 rounding stays far below


@torch.no_grad()
def fold(model: nn.Module, inputs: Batch) -> nn.Module:
    """Fold each batch norm into the linear layer or convolution right before it (Jacob et al. 2018, section 3.2).

    In eval mode a batch norm is x * g + b with constant g and b. So it can be merged into the weight and bias of the layer, if
    nothing else uses the layer's output. Raises StudyError if the model cannot be traced, has no such pair, or computes another
    function afterwards.
    """
    try:
        with quietly():
            traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:  # a forward may do anything that a trace cannot follow
        raise StudyError(f"fold: the model cannot be traced: {type(error).__name__}: {error}") from error
    folded = sum(_fold_into_layer(traced, node) for node in list(traced.graph.nodes))
    if not folded:
        raise StudyError("fold: no batch norm directly follows a linear layer or convolution; remove fold")
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    _check(model, traced, inputs)
    return traced


def _fold_into_layer(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Fold this node if it is a batch norm after a layer that nothing else uses. Return whether it was folded."""
    norm = _called(traced, node)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return False
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) > 1 or _calls(traced, before) > 1:
        return False
    layer = _called(traced, before)
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        return False
    # torch's function for linear layers fails without affine parameters.
    gain = norm.weight if norm.weight is not None else torch.ones_like(norm.running_mean)
    shift = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_mean)
    statistics = (norm.running_mean, norm.running_var, norm.eps, gain, shift)
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            return False  # torch's function does not support a weight with outputs by group
        transposed = isinstance(layer, TRANSPOSED)
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=transposed)
    node.replace_all_uses_with(before)
    traced.graph.erase_node(node)
    return True


def _called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _calls(traced: fx.GraphModule, node: fx.Node) -> int:
    """Return how often the node's module is called under any name, since folding changes its weights for all calls."""
    module = _called(traced, node)
    return sum(_called(traced, other) is module for other in traced.graph.nodes if other.op == "call_module")


def _check(model: nn.Module, folded: nn.Module, inputs: Batch) -> None:
    before, after = model(inputs), folded(inputs)
    difference, largest = (before - after).abs().max().item(), before.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise StudyError(
            f"fold: the folded model's logits differ from the trained model's by {difference:.3g}, at logits of at most "
            f"{largest:.3g}; remove fold"
        )
