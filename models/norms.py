"""Norms by name, of features [B, C] or images [B, C, H, W]."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Gt, Le
from torch import nn

Norm = Literal["none", "batch", "layer", "group"]

GROUPS = 8  # if nothing is said; fewer where they do not divide the features


class NormOptions(TypedDict, total=False):
    """What shapes a norm; those that have no use for an option leave it alone."""

    norm_momentum: Annotated[float, Gt(0), Le(1)]
    """Of batch: share of the newest batch in the running statistics, 0.1 if not given."""
    norm_eps: Annotated[float, Ge(0)]
    """Added to each variance, 1e-5 if not given."""
    groups: Annotated[int, Gt(0)]
    """Of group: how many the features are divided into; if not given, the greatest common divisor of them and 8."""


def norm(kind: Norm, features: int, dims: Literal[1, 2], options: NormOptions) -> list[nn.Module]:
    """Return the norm of so many features or channels; none for "none".

    batch (Ioffe & Szegedy 2015), layer (Ba et al. 2016), group (Wu & He 2018). Of images, layer is a group norm of one group:
    it normalises over channels and places and has a scale for each channel, whatever the image's size. ValueError if groups
    do not divide the features.
    """
    more: dict[str, Any] = {"eps": options["norm_eps"]} if "norm_eps" in options else {}
    if kind == "none":
        return []
    if kind == "batch":
        if "norm_momentum" in options:
            more["momentum"] = options["norm_momentum"]
        return [(nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(features, **more)]
    if kind == "layer":
        return [nn.LayerNorm(features, **more) if dims == 1 else nn.GroupNorm(1, features, **more)]
    groups = options.get("groups", math.gcd(GROUPS, features))
    if features % groups:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        raise ValueError(f"groups = {groups} does not divide {features} features; give one of {fitting}")
    return [nn.GroupNorm(groups, features, **more)]
