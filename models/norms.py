"""Norms by name, for features [B, C], series [B, C, T] or images [B, C, H, W]."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Gt, Le
from torch import nn

Norm = Literal["none", "batch", "layer", "group"]
Values = Literal["features", "series", "images"]

GROUPS = 8  # default; fewer where 8 does not divide the number of features


class NormOptions(TypedDict, total=False):
    """Options of the norms. A norm ignores the options that it has no use for."""

    norm_momentum: Annotated[float, Gt(0), Le(1)]
    """batch: weight of the newest batch in the running statistics (default 0.1)."""
    norm_eps: Annotated[float, Ge(0)]
    """Added to each variance (default 1e-5)."""
    groups: Annotated[int, Gt(0)]
    """group: number of groups (default: greatest common divisor of 8 and the number of features)."""


def norm(kind: Norm, features: int, values: Values, options: NormOptions) -> list[nn.Module]:
    """Return a list with the norm, empty for "none".

    batch: Ioffe & Szegedy 2015. layer: Ba et al. 2016. group: Wu & He 2018. For series and images,
    layer is a group norm of one group. It normalises over channels and steps or pixels and has one scale per channel,
    whatever the size. ValueError if `groups` does not divide the features.

    Args:
        features: number of features or channels.
        values: what is normalised.
    """
    more: dict[str, Any] = {"eps": options["norm_eps"]} if "norm_eps" in options else {}
    if kind == "none":
        return []
    if kind == "batch":
        if "norm_momentum" in options:
            more["momentum"] = options["norm_momentum"]
        return [(nn.BatchNorm2d if values == "images" else nn.BatchNorm1d)(features, **more)]
    if kind == "layer":
        return [nn.LayerNorm(features, **more) if values == "features" else nn.GroupNorm(1, features, **more)]
    groups = options.get("groups", math.gcd(GROUPS, features))
    if features % groups:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        raise ValueError(f"groups = {groups} does not divide {features} features; give one of {fitting}")
    return [nn.GroupNorm(groups, features, **more)]
