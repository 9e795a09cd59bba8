"""Trivial augment, wide (Müller & Hutter 2021): each image gets one of fourteen operations with a random amount.

Operations and ranges are those of torchvision's TrivialAugmentWide. The geometric operations are composed with all
other geometric changes in `geometry.py`. The colour operations are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.data.augment.colour import blend, brighten, contrast, saturate
from hpo.data.augment.random import Random
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

STEPS = 30  # steps from amount 0 to the full amount
BLEND = 0.99  # largest distance of a factor from 1, and largest slope of a shear
SHIFT = 32  # largest shift, in pixels
TURN = 135.0  # largest rotation, in degrees
BITS = 6  # most bits of 8 that posterizing removes
SIGNED = 10  # the first 10 operations take a random sign
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
    """The operation and the amount of each image."""

    operation: Tensor  # [N], index into OPERATIONS
    amount: Tensor  # [N], share of the full amount, from -1 to 1


def choices(strength: Strength, count: int, random: Random) -> Chosen:
    """Return an operation and its amount for each image. Each call returns the same."""
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


def rows_by_tone(drawn: Tensor) -> dict[str, Tensor]:
    """Return the rows of the images of each colour operation, from operation and amount of each image [N, 2]."""
    return {name: (drawn[:, 0] == OPERATIONS.index(name)).nonzero().squeeze(1) for name in TONES}


def retone(images: Tensor, drawn: Tensor, tone: Tone, rows: Mapping[str, Tensor]) -> Tensor:
    """Return normalised images [N, C, H, W] with their colour operations applied.

    Args:
        drawn: operation and amount of each image [N, 2].
        rows: what `rows_by_tone` returns. It is found on the CPU: on a GPU the host would wait for it in every step.
    """
    result = images.clone()
    for name, change in TONES.items():
        of_it = rows[name]
        if len(of_it):
            amount = drawn[:, 1].index_select(0, of_it).to(images.dtype)[:, None, None, None]
            changed = change(tone.shares(images.index_select(0, of_it)), amount)
            result.index_copy_(0, of_it, tone.normalised(changed))
    return result


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Move images away from (factor > 1) or towards (factor < 1) a 3x3 blur of them. The outermost pixels stay."""
    height, width = images.shape[2:]
    if min(height, width) <= 2:
        return images
    # Sums of slices, since the rounding of a convolution may depend on the other images in the call.
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    inner = images[:, :, 1:-1, 1:-1]
    blurred = (rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:] + 4 * inner) / 13
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = blend(inner, blurred, factor)
    return result


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Keep 8 (amount 0) to 2 (amount 1) bits of each value."""
    levels = 2 ** (8 - BITS * amount).round()
    return (images * levels).floor().minimum(levels - 1) / levels


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Invert all values of at least 1 - amount."""
    return torch.where(images >= 1 - amount, 1 - images, images)


def stretch(images: Tensor) -> Tensor:
    """Stretch the values of each channel to 0..1. A channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / torch.where(high > low, high - low, 1.0), images).clamp_(0.0, 1.0)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel, in 256 steps."""
    from torchvision.transforms.v2.functional import equalize as equalized  # here: few runs need it; it takes a second

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
