"""Model families by name, one file each.

A model function takes the shape of one input (`shapes`) and the number of outputs. It returns an `nn.Module` that maps a
batch of inputs, a tensor [B, ...] or a dict of tensors, to [B, outputs]. Its keyword-only parameters are the model's options.
This package knows torch and nothing of studies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hpo.models.cnn import cnn
from hpo.models.cnn1d import cnn1d
from hpo.models.drawing import use_generator
from hpo.models.dropout import Dropout, adopt_dropout
from hpo.models.efficientnet import efficientnet_b0
from hpo.models.mlp import mlp
from hpo.models.mobilenet import mobilenet_v3
from hpo.models.preparing import prepare
from hpo.models.recurrent import gru, lstm
from hpo.models.resnet import resnet18, resnet34, resnet50
from hpo.models.stem import SMALLEST
from hpo.models.transformer import transformer
from hpo.models.vgg import vgg11, vgg13, vgg16, vgg19
from hpo.models.vit import vit_b_16
from hpo.models.wide_resnet import wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn1d": cnn1d,
    "gru": gru,
    "lstm": lstm,
    "transformer": transformer,
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
