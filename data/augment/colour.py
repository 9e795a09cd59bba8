"""Colours of images in shares of white, 0..1, each image changed by a factor of its own; a factor of 1 changes nothing.

The formulas are torchvision's; what it takes for one factor, here is a tensor [N, 1, 1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hpo.data.augment.random import Random, spread
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

LUMA = (0.2989, 0.587, 0.114)  # of red, green, blue in grey: torchvision's
RGB = 3  # channels


def draw_jitter(strength: Strength, count: int, random: Random) -> Tensor:
    """Return the factors of brightness, contrast and saturation and the turn of the hue of each image [count, 4].

    A factor is uniform from 1 - strength, or 0, to 1 + strength; a turn uniform from -strength to strength.
    """
    drawn = torch.rand((count, 4), generator=random("augment colour"))
    strengths = (strength.brightness, strength.contrast, strength.saturation)
    factors = [_between(drawn[:, i], max(0.0, 1 - most), 1 + most) for i, most in enumerate(strengths)]
    return torch.stack([*factors, spread(drawn[:, 3], strength.hue)], 1)


def _between(drawn: Tensor, low: float, high: float) -> Tensor:
    return low + drawn * (high - low)


def jitter(images: Tensor, drawn: Tensor, names: Iterable[str], tone: Tone) -> Tensor:
    """Return normalised images [N, C, H, W] with other brightness, contrast, saturation and hue, in this order.

    (torchvision's ColorJitter takes another order each time.)

    Args:
        drawn: factors and turns [N, 4], as in JITTERS.
        names: of what is to be changed, in the order of JITTERS; that of images that nobody asked it for must be idle.
    """
    shown = tone.shares(images)
    factors = dict(zip(JITTERS, drawn.to(images.dtype)[:, :, None, None, None].unbind(1), strict=True))
    for name in names:
        shown = JITTERS[name](shown, factors[name])
    return tone.normalised(shown)


def brighten(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a factor."""
    return (images * factor).clamp_(0.0, 1.0)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the mean grey of the image, or towards it."""
    return blend(images, grey(images).flatten(1).mean(1)[:, None, None, None], factor)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the grey of each pixel, or towards it; what is not RGB has no colour, and stays."""
    return blend(images, grey(images), factor) if images.shape[1] == RGB else images


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the colour wheel (hue, saturation, value; Smith 1978) by a share of its circle; a turn of 0 changes nothing."""
    if images.shape[1] != RGB:
        return images
    red, green, blue = images.unbind(1)
    value, which = images.max(1)
    chroma = value - images.amin(1)
    width = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.stack([(green - blue) / width, (blue - red) / width + 2, (red - green) / width + 4], 1)
    hue = sixth.gather(1, which.unsqueeze(1)).squeeze(1) + 6 * turn.squeeze(1)  # in sixths of the circle, [N, H, W]
    channels = []
    for start in (5.0, 3.0, 1.0):  # where on the wheel red, green and blue have their own
        away = (hue + start) % 6
        channels.append(value - chroma * torch.minimum(away, 4 - away).clamp_(0.0, 1.0))
    return torch.where(turn == 0, images, torch.stack(channels, 1))


def grey(images: Tensor) -> Tensor:
    """Return images in grey [N, 1, H, W]: weighted as the eye does if they are RGB, else the mean of their channels."""
    if images.shape[1] != RGB:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return what lies at `factor` on the way from the other images, at 0, to these, at 1, and beyond."""
    return (images * factor + other * (1 - factor)).clamp_(0.0, 1.0)


JITTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # by field of Strength
    "brightness": brighten,
    "contrast": contrast,
    "saturation": saturate,
    "hue": turn_hue,
}
