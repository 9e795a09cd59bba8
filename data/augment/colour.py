"""Colour changes of images in shares of white, 0 to 1, each image with its own factor. A factor of 1 changes nothing.

The formulas are torchvision's. Where torchvision takes one factor, these take a tensor [N, 1, 1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hpo.data.augment.random import Random, spread
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in grey
RGB = 3  # channels


def draw_jitter(strength: Strength, count: int, random: Random) -> Tensor:
    """Return factors of brightness, contrast and saturation, and turns of the hue, of each image [count, 4].

    A factor is uniform from max(0, 1 - strength) to 1 + strength. A turn is uniform from -strength to strength.
    """
    drawn = torch.rand((count, 4), generator=random("augment colour"))
    strengths = (strength.brightness, strength.contrast, strength.saturation)
    factors = [_between(drawn[:, i], max(0.0, 1 - most), 1 + most) for i, most in enumerate(strengths)]
    return torch.stack([*factors, spread(drawn[:, 3], strength.hue)], 1)


def _between(drawn: Tensor, low: float, high: float) -> Tensor:
    return low + drawn * (high - low)


def jitter(images: Tensor, drawn: Tensor, names: Iterable[str], tone: Tone) -> Tensor:
    """Return normalised images [N, C, H, W] with changed brightness, contrast, saturation and hue, in this order.

    torchvision's ColorJitter uses a random order instead.

    Args:
        drawn: factors and turns [N, 4], in the order of JITTERS.
        names: keys of JITTERS to apply, in that order. Images whose run does not use a change must have a factor of 1,
            or a turn of 0.
    """
    shown = tone.shares(images)
    factors = dict(zip(JITTERS, drawn.to(images.dtype)[:, :, None, None, None].unbind(1), strict=True))
    for name in names:
        shown = JITTERS[name](shown, factors[name])
    return tone.normalised(shown)


def brighten(images: Tensor, factor: Tensor) -> Tensor:
    """Return images [N, C, H, W] times a factor [N, 1, 1, 1]."""
    return (images * factor).clamp_(0.0, 1.0)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return images moved away from (factor > 1) or towards (factor < 1) their mean grey."""
    return blend(images, grey(images).flatten(1).mean(1)[:, None, None, None], factor)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Return images moved away from (factor > 1) or towards (factor < 1) the grey of each pixel; only RGB changes."""
    return blend(images, grey(images), factor) if images.shape[1] == RGB else images


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Return images with their hue turned by a share of the HSV colour wheel (Smith 1978); only RGB changes.

    A turn of 0 changes nothing.
    """
    if images.shape[1] != RGB:
        return images
    red, green, blue = images.unbind(1)
    value, which = images.max(1)
    chroma = value - images.amin(1)
    width = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.stack([(green - blue) / width, (blue - red) / width + 2, (red - green) / width + 4], 1)
    hue = sixth.gather(1, which.unsqueeze(1)).squeeze(1) + 6 * turn.squeeze(1)  # in sixths of the circle, [N, H, W]
    channels = []
    for start in (5.0, 3.0, 1.0):  # offsets of red, green and blue on the wheel
        away = (hue + start) % 6
        channels.append(value - chroma * torch.minimum(away, 4 - away).clamp_(0.0, 1.0))
    return torch.where(turn == 0, images, torch.stack(channels, 1))


def grey(images: Tensor) -> Tensor:
    """Return images in grey [N, 1, H, W]: the luma of RGB images, else the mean of the channels."""
    if images.shape[1] != RGB:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return factor * images + (1 - factor) * other, clamped to 0..1."""
    return (images * factor + other * (1 - factor)).clamp_(0.0, 1.0)


JITTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # by field of Strength
    "brightness": brighten,
    "contrast": contrast,
    "saturation": saturate,
    "hue": turn_hue,
}
