"""Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): images and labels mixed with a partner from the same batch.

Both follow one formula: each pixel of the image has a weight w, and its partner's pixel 1 - w. If a run uses both, each
mixed image gets one of them, each with probability 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpo.data.augment.erasing import within
from hpo.data.augment.random import Random, Size
from hpo.data.augment.strength import Strength


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """The partner of each image, and how the two are mixed."""

    partner: Tensor  # int64 [N]: the partner's place in the batch
    weight: Tensor  # [N]: weight of the own label, 1 - weight is the partner's; 1 where nothing is mixed
    share: Tensor  # [N]: weight of the own pixels outside the box
    box: Tensor  # [N, 4]: top, bottom, left, right of the box with the partner's pixels alone


def draw_mixing(strength: Strength, count: int, batch: int, size: Size, random: Random) -> Mixing:
    """Return the mixing of the `count` images of an epoch with batches of `batch` images.

    Mixup's share and cutmix's share of the area outside the box are drawn from Beta(alpha, alpha). The centre of the
    box is uniform. The box is cut at the border, and the weight follows from the area that is left, as in torchvision.
    """
    height, width = size
    generator = random("augment mixing")
    drawn = torch.rand((count, 5), generator=generator).double()
    betas = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    partner = (drawn[:, 0] * batch).long().clamp(max=batch - 1)
    mixes = drawn[:, 1] < strength.mix_probability
    cuts = mixes & (drawn[:, 2] < (0.5 if strength.mixup and strength.cutmix else float(strength.cutmix > 0)))
    mixed, cut = (
        torch.from_numpy(betas.beta(alpha, alpha, count)) if alpha else torch.ones(count, dtype=torch.float64)
        for alpha in (strength.mixup, strength.cutmix)
    )
    half = torch.where(cuts, 0.5 * (1 - cut).sqrt(), 0.0)
    sides = []
    for place, side in ((drawn[:, 3], height), (drawn[:, 4], width)):
        middle, reach = (place * side).floor(), (half * side).floor()
        sides += [(middle - reach).clamp(min=0), (middle + reach).clamp(max=side)]
    top, bottom, left, right = sides
    share = torch.where(mixes & ~cuts, mixed, 1.0)
    weight = share * (1 - (bottom - top) * (right - left) / (height * width))
    return Mixing(partner=partner, weight=weight.float(), share=share.float(), box=torch.stack(sides, 1).float())


def mix(images: Tensor, partners: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Return images [N, C, H, W] mixed with their partners [N, C, H, W].

    Args:
        share: weight of the own pixels outside the box [N].
        box: top, bottom, left, right of the box with the partner's pixels alone [N, 4].
    """
    inside = within(box, images.shape[2], images.shape[3])
    own = torch.where(inside, 0.0, share.to(images.dtype)[:, None, None]).unsqueeze(1)
    return images * own + partners * (1 - own)
