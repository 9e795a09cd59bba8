"""A trained model together with its normalisation. Exported models take raw images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpo.train.precision import number_type


class Deployed(nn.Module):
    """Maps raw images [B, C, H, W] to logits [B, classes], float32.

    Images are uint8 pixels as the data source gives them, or floats of the same range. They are normalised in float32 with mean
    and std of the training part, then cast to the model's number type.
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
        """Return the normalised images in the model's number type."""
        return images.to(torch.float32).sub(self.mean).mul(self.scale).to(self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of raw images [B, C, H, W]."""
        logits: Tensor = self.model(self.normalised(images))
        return logits.to(torch.float32)
