"""Model families by name, one file each; every keyword-only parameter of a function is an option of the
model.

A model function takes the shape of one image and the number of classes and returns an `nn.Module` that maps
normalised images [B, C, H, W] to logits [B, num_classes]. This package knows torch and nothing of studies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.cnn import cnn
from models.drawing import use_generator
from models.dropout import Dropout, adopt_dropout
from models.efficientnet import efficientnet_b0
from models.mlp import mlp
from models.mobilenet import mobilenet_v3
from models.preparing import prepare
from models.resnet import resnet18, resnet34, resnet50
from models.stem import SMALLEST
from models.vgg import vgg11, vgg13, vgg16, vgg19
from models.vit import vit_b_16
from models.wide_resnet import wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "wide_resnet": wide_resnet,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet_b0": efficientnet_b0,
    "vit_b_16": vit_b_16,
}

__all__ = ["MODELS", "SMALLEST", "Dropout", "adopt_dropout", "cnn", "mlp", "prepare", "use_generator"]
