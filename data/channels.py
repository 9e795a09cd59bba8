"""Where an image's channels stand, as far as its shape tells."""

from __future__ import annotations

from collections.abc import Sequence

CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha


def channels_last(shape: Sequence[int]) -> bool | None:
    """Say whether three sides are [H, W, C] rather than [C, H, W]; None if they can be read in both ways, or in neither."""
    first, middle, last = shape
    if is_sure(shape):
        return last in CHANNELS
    if first in CHANNELS and (first == middle) != (middle == last):  # as small as that, an image is taken for a square
        return first == middle
    return None


def is_sure(shape: Sequence[int]) -> bool:
    """Say whether just one of the outer sides of three can count channels."""
    return (shape[0] in CHANNELS) != (shape[2] in CHANNELS)


def refuse_implausible(shape: Sequence[int]) -> None:
    """Raise ValueError if an image [C, H, W] looks as if it were [H, W, C], or were made from a square one by mistake."""
    channels, height, width = shape
    if channels > max(CHANNELS) and width in CHANNELS and height != width and (width > 1 or channels == height):
        raise ValueError(
            f"images of shape {list(shape)} as [C, H, W] have {channels} channels and are {width} pixels wide; "
            f"if they are [H, W, C], bring them to {[width, channels, height]}"
        )
    if channels > max(CHANNELS) and height in CHANNELS and channels == width:
        raise ValueError(
            f"images of shape {list(shape)} as [C, H, W] have {channels} channels and are {height} pixels high; "
            f"if they were [C, H, W] before their sides were moved, leave them as {[height, width, channels]}"
        )
