"""Trivial augment, wide (Müller & Hutter 2021): each image gets one operation of fourteen, by an amount drawn for it.

Operations and ranges are those of torchvision's TrivialAugmentWide. What moves pixels is composed with all else that does,
in `geometry.py`; what changes colours stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.data.augment.colour import blend, brighten, contrast, saturate
from hpo.data.augment.random import Random
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

STEPS = 30  # from no amount to the whole
BLEND = 0.99  # of a factor's distance from 1, and of a shear's slope
SHIFT = 32  # pixels
TURN = 135.0  # degrees
BITS = 6  # of 8 that posterizing takes away at most
SIGNED = 10  # of the operations below, the first so many go either way
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What becomes of each image."""

    operation: Tensor  # [N], index into OPERATIONS
    amount: Tensor  # [N], share of the whole; below 0 the other way


def choices(strength: Strength, count: int, random: Random) -> Chosen:
    """Return an operation and its amount for each image; the same whenever it is asked for."""
    drawn = torch.rand((count, 4), generator=random("augment trivial")).double()
    operation = (drawn[:, 0] * len(OPERATIONS)).long()
    operation = torch.where(drawn[:, 3] < strength.trivial_augment, operation, 0)
    amount = (drawn[:, 1] * (STEPS + 1)).floor() / STEPS
    turned = (drawn[:, 2] < 0.5) & (operation < SIGNED)
    return Chosen(operation=operation, amount=torch.where(turned, -amount, amount))


def draw_tones(strength: Strength, count: int, random: Random) -> Tensor:
    """Return each image's operation and amount [count, 2]."""
    chosen = choices(strength, count, random)
    return torch.stack([chosen.operation, chosen.amount], 1).float()


def retone(images: Tensor, drawn: Tensor, tone: Tone) -> Tensor:
    """Return normalised images [N, C, H, W], those changed whose operation [N, 2] is one of colour."""
    operation = drawn[:, 0]
    result = images.clone()
    for name, change in TONES.items():
        rows = (operation == OPERATIONS.index(name)).nonzero().squeeze(1)
        if len(rows):
            amount = drawn[rows, 1].to(images.dtype)[:, None, None, None]
            result.index_copy_(0, rows, tone.normalised(change(tone.shares(images[rows]), amount)))
    return result


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the image blurred by 3x3 pixels, or towards it; the outermost pixels stay."""
    height, width = images.shape[2:]
    if min(height, width) <= 2:
        return images
    # Sums of slices, since a convolution may round otherwise in other company.
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    inner = images[:, :, 1:-1, 1:-1]
    blurred = (rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:] + 4 * inner) / 13
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = blend(inner, blurred, factor)
    return result


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Keep 8 to 2 bits of each value."""
    levels = 2 ** (8 - BITS * amount).round()
    return (images * levels).floor().minimum(levels - 1) / levels


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Invert what is as bright as 1 - amount, or brighter."""
    return torch.where(images >= 1 - amount, 1 - images, images)


def stretch(images: Tensor) -> Tensor:
    """Stretch each channel from black to white; one of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / torch.where(high > low, high - low, 1.0), images).clamp_(0.0, 1.0)


def equalize(images: Tensor) -> Tensor:
    """Make all values of a channel about as frequent, in 256 steps."""
    from torchvision.transforms.v2.functional import equalize as equalized  # lazily: few need it, and it takes a second

    result: Tensor = equalized(images)
    return result


TONES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda images, amount: brighten(images, 1 + BLEND * amount),
    "color": lambda images, amount: saturate(images, 1 + BLEND * amount),
    "contrast": lambda images, amount: contrast(images, 1 + BLEND * amount),
    "sharpness": lambda images, amount: sharpen(images, 1 + BLEND * amount),
    "posterize": posterize,
    "solarize": solarize,
    "auto_contrast": lambda images, _: stretch(images),
    "equalize": lambda images, _: equalize(images),
}
