"""torchvision's vision transformer ViT-B/16 (Dosovitskiy et al. 2021): 86 million parameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import Stem, is_small, refuse_smaller
from hpo.models.transfer import State

PATCH, SMALL_PATCH = 16, 4  # pixels on a side
POSITIONS = "encoder.pos_embedding"  # [1, 1 + patches, features]; the class token comes first


def vit_b_16(
    shape: Shape,
    outputs: int,
    *,
    stem: Stem = "auto",
    dropout: Rate = 0.0,
    **options: Unpack[Options],
) -> nn.Module:
    """Build a vision transformer.

    Images must be square, with at least 16 pixels on a side, 64 with a full stem. The side must be a multiple of the
    patch size. ValueError if not. Position embeddings of pre-trained weights are interpolated to the number of patches.

    Args:
        stem: `small`: patches of 4x4 pixels. `full`: 16x16 pixels. `auto`: small if a side has less than 64 pixels.
        dropout: dropout probability in every block, as in torchvision.
    """
    from torchvision.models.vision_transformer import VisionTransformer  # here, since it takes a second

    image = channels, height, width = shapes.image("vit_b_16", shape)
    small = is_small(stem, image)
    refuse_smaller("vit_b_16", image, small=small)
    patch = SMALL_PATCH if small else PATCH
    if height != width or height % patch:
        raise ValueError(
            f"vit_b_16 needs square images whose side is a multiple of {patch} pixels here, but these have {height}x{width}; "
            f"resize them, for instance to {max(1, round(min(height, width) / patch)) * patch}"
        )
    model = VisionTransformer(
        image_size=height,
        patch_size=patch,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        dropout=dropout,
        num_classes=outputs,
    )
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, 768, kernel_size=patch, stride=patch)
        nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))
        nn.init.zeros_(model.conv_proj.bias)
    return prepared(model, "vit_b_16", options, partial(with_positions, height, patch))


def with_positions(side: int, patch: int, state: State) -> State:
    """Fit the position embeddings of a vision transformer to images of this side, by interpolation."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    if POSITIONS not in state:
        return state
    fitted: State = interpolate_embeddings(side, patch, state)
    return fitted
