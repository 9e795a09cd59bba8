"""The score of a model on the validation part, and its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo import data
from hpo.final.after.raw import batches
from hpo.train import eval_metrics
from hpo.train.inputs import in_units
from hpo.train.validation import right


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score and size of one model."""

    accuracy: float | None  # share of right targets, 0..1; None for a regression
    rmse: float | None  # of a regression in original units, the mean over the targets; None for other tasks
    loss: float  # mean cross-entropy in nats, or mean squared error of standardised targets
    agreement: float | None  # share of targets predicted as by the trained model; None for a regression
    parameters: int  # weights and biases, or their quantised values
    zeros: float  # share of the parameters that are 0
    bytes: int  # of parameters and buffers in memory


@torch.no_grad()
def outputs(model: nn.Module, inputs: data.Inputs, batch: int) -> Tensor:
    """Return a deployed model's outputs [N, O] for raw inputs, computed in batches."""
    return torch.cat([model(some) for some in batches(inputs, batch)])


def score(model: nn.Module, found: Tensor, reference: Tensor, part: data.Split, splits: data.Splits) -> Score:
    """Return the score of a model.

    Args:
        model: the deployed model.
        found: its outputs [N, O] on the part.
        reference: the trained model's outputs [N, O].
        part: the inputs and targets.
        splits: the splits that the part belongs to.
    """
    values = [_values(tensor) for tensor in _weights(model)]
    parameters = sum(value.numel() for value in values)
    return Score(
        **_quality(found.double(), reference, part.targets, splits),
        parameters=parameters,
        zeros=sum(int((value == 0).sum()) for value in values) / max(1, parameters),
        bytes=sum(_bytes(tensor) for tensor in _tensors(model)),
    )


def _quality(found: Tensor, reference: Tensor, targets: Tensor, splits: data.Splits) -> dict[str, Any]:
    """Return accuracy, root mean squared error, loss and agreement."""
    if splits.target_std is not None:
        wanted = in_units(targets, splits)
        loss = ((found - wanted) / splits.target_std.double()).square().mean().item()
        rmse = eval_metrics.compute(["rmse"], found, wanted, splits.task)["rmse"]
        return {"accuracy": None, "rmse": rmse, "loss": loss, "agreement": None}
    loss_of = F.cross_entropy if targets.dtype == torch.int64 else _binary_cross_entropy
    same = reference.argmax(1) if targets.dtype == torch.int64 else reference > 0
    return {
        "accuracy": right(found, targets).mean().item(),
        "rmse": None,
        "loss": loss_of(found, targets).item(),
        "agreement": right(found, same).mean().item(),
    }


def _binary_cross_entropy(found: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(found, targets.double())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and int8 buffers. A model quantised as a graph keeps its weights in int8 buffers."""
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.dtype == torch.int8)


def _values(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor.detach()


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor. A tensor of torchao consists of several: integers, scales and zero points."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
