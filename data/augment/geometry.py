"""Geometric augmentation: moves and flips by whole pixels, or one sampling through a composed affine map.

A map is six numbers (a, b, c, d, e, f). The pixel shown at (x, y) comes from (a x + b y + c, d x + e y + f). Coordinates
are in pixels from the image's centre, x to the right and y down. Maps are made for a whole epoch of a run at once, so
that a step only applies them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.data.augment import trivial
from hpo.data.augment.random import Random, Size, spread
from hpo.data.augment.strength import Fill, Strength

PADDING = {"mean": "zeros", "edge": "border", "reflect": "reflection"}  # torch's names; 0 is the mean after normalising
MOVES = 3  # uniform numbers per image: down, across, flips
AFFINE = 10  # uniform numbers per image: resized crop (4), rotation, translation (2), scale, shear (2)


# --- whole pixels -----------------------------------------------------------------------------------------------------


def draw_moves(strength: Strength, count: int, random: Random) -> Tensor:
    """Return each image's moves [count, 4]: pixels down and across, whether to flip horizontally and vertically."""
    return moves(strength, torch.rand((count, MOVES), generator=random("augment")))


def moves(strength: Strength, drawn: Tensor) -> Tensor:
    """Return moves [N, 4] from uniform numbers [N, MOVES]."""
    most = 2.0 * strength.crop
    moved = (drawn[:, :2] * (most + 1)).floor().clamp(max=most) - strength.crop  # the product may round up to its bound
    chance, flip = drawn[:, 2], strength.horizontal_flip
    mirrored = chance < flip
    # A uniform number that was compared with one threshold is rescaled. It is uniform again and decides the next flip.
    left = torch.where(mirrored, chance / max(flip, 1e-9), (chance - flip) / max(1 - flip, 1e-9))
    return torch.cat([moved, torch.stack([mirrored, left < strength.vertical_flip], 1).float()], 1)


def move(images: Tensor, drawn: Tensor, fill: Fill) -> Tensor:
    """Return images [N, C, H, W] moved and flipped by whole pixels. No value is interpolated.

    Args:
        drawn: moves [N, 4], as `draw_moves` returns them.
        fill: what fills the border.
    """
    height, width = images.shape[2:]
    down, across, mirrored, upturned = drawn.long().unbind(1)
    rows, rows_inside = _sources(height, down, upturned, fill)
    columns, columns_inside = _sources(width, across, mirrored, fill)
    source = rows[:, :, None] * width + columns[:, None, :]  # [N, H, W]
    taken = images.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1))
    if fill != "mean":
        return taken.view_as(images)
    inside = (rows_inside[:, :, None] & columns_inside[:, None, :]).unsqueeze(1)
    return torch.where(inside, taken.view_as(images), 0.0)


def _sources(size: int, moved: Tensor, mirrored: Tensor, fill: Fill) -> tuple[Tensor, Tensor]:
    """Return the source of each row or column [N, size], and whether it is inside the image."""
    shown = torch.arange(size, device=moved.device).expand(len(moved), -1)
    source = torch.where(mirrored[:, None] > 0, size - 1 - shown, shown) + moved[:, None]
    inside = (source >= 0) & (source < size)
    if fill == "reflect" and size > 1:
        folded = source.abs() % (2 * size - 2)
        source = torch.minimum(folded, 2 * size - 2 - folded)
    return source.clamp(0, size - 1), inside


# --- maps -------------------------------------------------------------------------------------------------------------


def draw_warps(strength: Strength, count: int, size: Size, random: Random) -> Tensor:
    """Return each image's map [count, 6].

    It composes moves and flips, resized crop, affine map and trivial augment, in this order.
    """
    drawn = torch.rand((count, MOVES + AFFINE), generator=random("augment")).double()
    maps = compose(of_moves(moves(strength, drawn[:, :MOVES])), of_resized_crops(strength, drawn[:, MOVES:], size))
    maps = compose(maps, of_affine(strength, drawn[:, MOVES + 4 :], size))
    if strength.trivial_augment:
        maps = compose(maps, of_trivial(trivial.choices(strength, count, random), size))
    return maps.float()


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the composed maps [N, 6], outer(inner(x, y)). The inner map is the later change of the image."""
    a, b, c, d, e, f = outer.unbind(1)
    u, v, w, x, y, z = inner.unbind(1)
    linear = (a * u + b * x, a * v + b * y, a * w + b * z + c, d * u + e * x, d * v + e * y, d * w + e * z + f)
    return torch.stack(linear, 1)


def of_moves(drawn: Tensor) -> Tensor:
    """Return the maps [N, 6] of moves [N, 4]."""
    down, across, mirrored, upturned = drawn.double().unbind(1)
    none = torch.zeros_like(down)
    return torch.stack([1 - 2 * mirrored, none, across, none, 1 - 2 * upturned, down], 1)


def of_resized_crops(strength: Strength, drawn: Tensor, size: Size) -> Tensor:
    """Return the maps [N, 6] that enlarge a part of the image to full size (Szegedy et al. 2015, Inception).

    The part's share of the area is uniform from 1 - `resized_crop` to 1. The ratio of its sides is log-uniform from 1 /
    `resized_crop_ratio` to `resized_crop_ratio`. A side longer than the image is cut, where torchvision draws again, up
    to ten times.

    Args:
        drawn: uniform numbers [N, 4 or more].
    """
    height, width = size
    if not strength.resized_crop:
        return torch.tensor([[1.0, 0, 0, 0, 1, 0]], dtype=torch.float64).expand(len(drawn), -1)
    area = (1 - strength.resized_crop * drawn[:, 0]) * height * width
    root = torch.exp(spread(drawn[:, 1], math.log(strength.resized_crop_ratio)) / 2)
    tall, wide = (area.sqrt() / root).clamp(max=height), (area.sqrt() * root).clamp(max=width)
    down = drawn[:, 2] * (height - tall) + (tall - height) / 2
    across = drawn[:, 3] * (width - wide) + (wide - width) / 2
    none = torch.zeros_like(area)
    return torch.stack([wide / width, none, across, none, tall / height, down], 1)


def of_affine(strength: Strength, drawn: Tensor, size: Size) -> Tensor:
    """Return the maps [N, 6] that rotate, translate, scale and shear, each uniform from -strength to strength.

    Translations are rounded to whole pixels, as in torchvision's RandomAffine.

    Args:
        drawn: uniform numbers [N, 6].
    """
    height, width = size
    return affine(
        angle=spread(drawn[:, 0], strength.rotation),
        across=spread(drawn[:, 1], strength.translation * width).round(),
        down=spread(drawn[:, 2], strength.translation * height).round(),
        scale=1 + spread(drawn[:, 3], strength.scale),
        shear_x=spread(drawn[:, 4], strength.shear),
        shear_y=spread(drawn[:, 5], strength.shear),
    )


def affine(*, angle: Tensor, across: Tensor, down: Tensor, scale: Tensor, shear_x: Tensor, shear_y: Tensor) -> Tensor:
    """Return the maps [N, 6] of torchvision's `affine`. All arguments are [N].

    Args:
        angle: rotation in degrees, clockwise.
        across: translation to the right in pixels.
        down: translation downwards in pixels.
        scale: factor.
        shear_x: degrees.
        shear_y: degrees.
    """
    turn, x, y = torch.deg2rad(angle), torch.deg2rad(shear_x), torch.deg2rad(shear_y)
    cos, sin = torch.cos(turn - y) / torch.cos(y), torch.sin(turn - y) / torch.cos(y)
    a = (torch.cos(turn) - sin * torch.tan(x)) / scale
    b = (torch.sin(turn) + cos * torch.tan(x)) / scale
    d, e = -sin / scale, cos / scale
    return torch.stack([a, b, -a * across - b * down, d, e, -d * across - e * down], 1)


def of_trivial(chosen: trivial.Chosen, size: Size) -> Tensor:
    """Return the maps [N, 6] of trivial augment's choices. An image with a colour operation gets the identity map.

    Shears keep the upper left corner in place. Shifts are at most as long as the image's side.
    """
    height, width = size
    none, one = torch.zeros_like(chosen.amount), torch.ones_like(chosen.amount)

    def amount(operation: str) -> Tensor:
        return torch.where(chosen.operation == trivial.OPERATIONS.index(operation), chosen.amount, none)

    across, down = (
        amount(f"translate_{axis}").mul(min(trivial.SHIFT, side)).trunc()
        for axis, side in (("x", width), ("y", height))
    )
    turned = affine(
        angle=-amount("rotate") * trivial.TURN, across=across, down=down, scale=one, shear_x=none, shear_y=none
    )
    x, y = amount("shear_x") * trivial.BLEND, amount("shear_y") * trivial.BLEND
    sheared = torch.stack([one, x, x * height / 2, y, one, y * width / 2], 1)
    return compose(turned, sheared)  # at most one of the two changes anything


def warp(images: Tensor, maps: Tensor, fill: Fill) -> Tensor:
    """Return images [N, C, H, W] sampled bilinearly through their maps [N, 6]. The identity map changes no bit.

    Args:
        fill: what fills the border.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = maps.to(images.dtype)[:, :, None, None].unbind(1)
    x = torch.arange(width, device=images.device, dtype=images.dtype) - (width - 1) / 2
    y = (torch.arange(height, device=images.device, dtype=images.dtype) - (height - 1) / 2)[:, None]
    # With align_corners torch's -1 and 1 are the centres of the outermost pixels, and it reflects there.
    corners = fill == "reflect"
    across = (a * x + b * y + c) * (2 / (max(width - 1, 1) if corners else width))
    down = (d * x + e * y + f) * (2 / (max(height - 1, 1) if corners else height))
    grid = torch.stack([across, down], 3)
    sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode=PADDING[fill], align_corners=corners)
    same = (maps == torch.eye(2, 3, dtype=maps.dtype, device=maps.device).flatten()).all(
        1
    )  # made there: sent, it waits
    return torch.where(same[:, None, None, None], images, sampled)
