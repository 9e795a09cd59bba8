"""Quantisation of weights and activations to 8 bits with torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from hpo.data import each
from hpo.errors import StudyError
from hpo.final.after.extras import module, quietly
from hpo.final.after.raw import batches, rows
from hpo.train.inputs import Batch

CALIBRATION_BATCH = 64  # rows


def int8(model: nn.Module, inputs: Batch) -> nn.Module:  # noqa: ARG001  (a step's signature)
    """Quantise linear layers to int8: weights per output, activations dynamically per row (torchao)."""
    return _linear(model, "int8", "Int8DynamicActivationInt8WeightConfig")


def int8_weights(model: nn.Module, inputs: Batch) -> nn.Module:  # noqa: ARG001
    """Quantise only the weights of linear layers to int8, with one scale per output (torchao)."""
    return _linear(model, "int8_weights", "Int8WeightOnlyConfig")


@torch.no_grad()
def int8_static(model: nn.Module, inputs: Batch) -> nn.Module:
    """Quantise weights and activations of convolutions and linear layers to int8, calibrated on 256 training rows.

    Uses PT2E of torchao with the quantiser for x86, for CPUs. Batch norms are folded (Jacob et al. 2018).
    """
    flow = module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    try:
        with quietly():
            batch = {0: torch.export.Dim("batch")}
            shapes = (each(inputs, lambda _: batch),)
            # strict: only then torch before 2.15 records the layer of each operation, which the quantiser needs.
            graph = torch.export.export(model, (rows(inputs, slice(2)),), dynamic_shapes=shapes, strict=True).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            observed = flow.prepare_pt2e(graph, quantizer)
            for some in batches(inputs, CALIBRATION_BATCH):
                observed(some)
            quantised: fx.GraphModule = flow.convert_pt2e(observed)
    except Exception as error:  # torch.export and torchao raise many types
        raise StudyError(f"int8_static: does not support this model: {type(error).__name__}: {error}") from error
    if not any(buffer.dtype == torch.int8 for buffer in quantised.buffers()):
        raise StudyError(
            "int8_static: torchao found no convolution and no linear layer to quantise; remove int8_static"
        )
    return _without_floats(quantised)


def _without_floats(graph: fx.GraphModule) -> nn.Module:
    """Remove the parameters that the graph no longer reads: the float weights."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_parameters()):
        if name not in read:
            owner, _, last = name.rpartition(".")
            delattr(graph.get_submodule(owner), last)
    return graph


def _linear(model: nn.Module, step: str, config: str) -> nn.Module:
    torchao: Any = module("torchao.quantization")
    if not any(type(layer) is nn.Linear for layer in model.modules()):
        raise StudyError(f"{step}: the model has no linear layer; int8_static quantises convolutions too")
    try:
        with quietly():
            torchao.quantize_(model, getattr(torchao, config)())
    except Exception as error:
        raise StudyError(f"{step}: does not support this model: {type(error).__name__}: {error}") from error
    return model
