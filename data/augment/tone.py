"""Conversion between normalised values, which a model gets, and shares of white, which colour changes need."""

from __future__ import annotations

from torch import Tensor


class Tone:
    """Converts normalised floats to shares of white and back. White is the highest value in the training split.

    It is not always 255: the embedded digits end at 16, and a factor that makes photographs white would leave them
    dark.
    """

    def __init__(self, mean: Tensor, std: Tensor, white: int) -> None:
        """Take mean and std [C] of the training split and its highest value, all in raw pixel values."""
        self._mean = mean
        self._std = std
        self._white = max(white, 1)

    def shares(self, images: Tensor) -> Tensor:
        """Convert normalised images [N, C, H, W] to shares of white, 0 to 1."""
        scale, shift = self._std / self._white, self._mean / self._white
        return images.mul(_by_channel(scale, images)).add_(_by_channel(shift, images)).clamp_(0.0, 1.0)

    def normalised(self, shares: Tensor) -> Tensor:
        """Convert images in shares of white [N, C, H, W] to normalised images."""
        scale, shift = self._white / self._std, self._mean / self._std
        return shares.mul(_by_channel(scale, shares)).sub_(_by_channel(shift, shares))


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype).view(-1, 1, 1)
