"""The vision transformer ViT-B/16 (Dosovitskiy et al. 2021), torchvision's: 86 million parameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Unpack

from torch import nn

from hpo.models.blocks import Rate
from hpo.models.preparing import Options, prepared
from hpo.models.stem import Stem, is_small, refuse_smaller
from hpo.models.transfer import State

PATCH, SMALL_PATCH = 16, 4  # pixels on a side
POSITIONS = "encoder.pos_embedding"  # [1, 1 + patches, features], the class token's first


def vit_b_16(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stem: Stem = "auto",
    dropout: Rate = 0.0,
    **options: Unpack[Options],
) -> nn.Module:
    """Build the transformer; `dropout` is in every block, as torchvision has it.

    stem: small cuts the image into patches of 4x4 pixels, full into 16x16; auto is small where a side has less than 64
    pixels. Images are square, of at least 16 pixels on a side, 64 with full patches, and a whole number of patches;
    ValueError if they are not. Positions of pre-trained weights are interpolated to the number of patches.
    """
    from torchvision.models.vision_transformer import VisionTransformer  # here: it takes a second

    channels, height, width = input_shape
    small = is_small(stem, input_shape)
    refuse_smaller("vit_b_16", input_shape, small=small)
    patch = SMALL_PATCH if small else PATCH
    if height != width or height % patch:
        raise ValueError(
            f"vit_b_16 needs square images whose side is a multiple of {patch} pixels here, these have {height}x{width}; "
            f"resize them, to {max(1, round(min(height, width) / patch)) * patch} for instance"
        )
    model = VisionTransformer(
        image_size=height,
        patch_size=patch,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        dropout=dropout,
        num_classes=num_classes,
    )
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, 768, kernel_size=patch, stride=patch)
        nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))
        nn.init.zeros_(model.conv_proj.bias)
    return prepared(model, "vit_b_16", options, partial(_with_positions, height, patch))


def _with_positions(side: int, patch: int, state: State) -> State:
    from torchvision.models.vision_transformer import interpolate_embeddings

    if POSITIONS not in state:
        return state
    fitted: State = interpolate_embeddings(side, patch, state)
    return fitted
