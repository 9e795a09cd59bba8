"""A trained model with the normalisation in front of it: what leaves the house takes images as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpo.train.precision import number_type


class Deployed(nn.Module):
    """Raw images [B, C, H, W] to logits [B, classes], float32.

    Images are pixels as the data source gives them, uint8; floats of the same range do as well. They are normalised in
    float32 by the training part's mean and std, as in training, and then brought to the model's own number type.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.dtype = number_type(model)
        self.register_buffer("mean", mean.float().view(-1, 1, 1).clone())
        self.register_buffer("scale", 1.0 / std.float().view(-1, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        """Return what the model itself is shown."""
        return images.to(torch.float32).sub(self.mean).mul(self.scale).to(self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of raw images."""
        logits: Tensor = self.model(self.normalised(images))
        return logits.to(torch.float32)
