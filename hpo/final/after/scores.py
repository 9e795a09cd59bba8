"""The score of a model on the validation part, and its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo import data
from hpo.data import Stored
from hpo.final.after.raw import batches


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score and size of one model."""

    accuracy: float  # share of images, 0..1
    loss: float  # mean cross-entropy in nats
    agreement: float  # share of images with the same predicted class as the trained model
    parameters: int  # weights and biases, or their quantised values
    zeros: float  # share of the parameters that are 0
    bytes: int  # of parameters and buffers in memory


@torch.no_grad()
def logits(model: nn.Module, images: Tensor | Stored, batch: int) -> Tensor:
    """Return the logits [N, classes] of raw images [N, C, H, W], computed in batches."""
    return torch.cat([model(some) for some in batches(images, batch)])


def score(model: nn.Module, found: Tensor, reference: Tensor, part: data.Split) -> Score:
    """Return the score of a model.

    Args:
        model: the model.
        found: its logits [N, classes] on the part.
        reference: the trained model's logits [N, classes].
        part: the images and labels.
    """
    classes = found.argmax(1)
    values = [_values(tensor) for tensor in _weights(model)]
    parameters = sum(value.numel() for value in values)
    return Score(
        accuracy=(classes == part.targets).double().mean().item(),
        loss=F.cross_entropy(found.double(), part.targets).item(),
        agreement=(classes == reference.argmax(1)).double().mean().item(),
        parameters=parameters,
        zeros=sum(int((value == 0).sum()) for value in values) / max(1, parameters),
        bytes=sum(_bytes(tensor) for tensor in _tensors(model)),
    )


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
