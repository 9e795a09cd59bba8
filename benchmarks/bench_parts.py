"""The data sources and the model that the benchmarks' study files name as a user's own code."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import nn

from benchmarks import bench_data
from hpo.data import Source


def grey28(*, images: int) -> Source:
    """Return grey images of 28x28 pixels in ten classes."""
    return _source("grey28", images)


def colour32(*, images: int) -> Source:
    """Return colour images of 32x32 pixels in ten classes."""
    return _source("colour32", images)


def table(*, rows: int) -> Source:
    """Return rows of 30 numbers, and a number to predict for each."""
    columns, numbers = bench_data.read("table", rows)
    return Source(inputs={"numbers": torch.from_numpy(columns)}, targets=torch.from_numpy(numbers), task="regression")


def keypoints(*, images: int) -> Source:
    """Return grey images of 96x96 pixels, and the places of 15 points in each."""
    pixels, places = bench_data.read("keypoints", images)
    inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return Source(inputs=inputs, targets=torch.from_numpy(places), task="regression")


def _source(name: str, images: int) -> Source:
    pixels, labels = bench_data.read(name, images)
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return Source(
        inputs=torch.from_numpy(channels_first), targets=torch.from_numpy(labels), num_classes=bench_data.CLASSES
    )


def resnet18(
    input_shape: tuple[int, int, int], num_classes: int, *, dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
) -> nn.Module:
    """Build torchvision's ResNet-18 for small images: a 3x3 stem without pooling, the width unchanged."""
    from torchvision.models import resnet  # here: it takes a second, which the other tasks need not pay

    model = resnet.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(input_shape[0], 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(model.fc.in_features, num_classes))
    assert isinstance(model, nn.Module)
    return model
