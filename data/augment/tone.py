"""Between the values that a model is fed and those that colours are made of: the one place where that is converted."""

from __future__ import annotations

from torch import Tensor


class Tone:
    """What normalised floats stand for: shares of white, which is the highest value in the training part.

    (Not 255: the embedded digits end at 16, and a factor that whitens photographs would leave them half as bright.)
    """

    def __init__(self, mean: Tensor, std: Tensor, white: int) -> None:
        """Take the training part's mean and std [C] and its highest value, all in raw pixel values."""
        self._mean = mean
        self._std = std
        self._white = max(white, 1)

    def shares(self, images: Tensor) -> Tensor:
        """Return normalised images [N, C, H, W] in shares of white, 0..1."""
        scale, shift = self._std / self._white, self._mean / self._white
        return images.mul(_by_channel(scale, images)).add_(_by_channel(shift, images)).clamp_(0.0, 1.0)

    def normalised(self, shares: Tensor) -> Tensor:
        """Return images in shares of white [N, C, H, W] normalised again."""
        scale, shift = self._white / self._std, self._mean / self._std
        return shares.mul(_by_channel(scale, shares)).sub_(_by_channel(shift, shares))


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype).view(-1, 1, 1)
