"""The place of the channels in an image, as far as its shape shows it."""

from __future__ import annotations

from collections.abc import Sequence

CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha


def channels_last(shape: Sequence[int]) -> bool | None:
    """Return whether a shape is [H, W, C] and not [C, H, W]; None if it may be both, or neither."""
    first, middle, last = shape
    if is_sure(shape):
        return last in CHANNELS
    if first in CHANNELS and (first == middle) != (middle == last):  # an image as small as that is taken for a square
        return first == middle
    return None


def is_sure(shape: Sequence[int]) -> bool:
    """Return whether exactly one of the first and the last side can be the number of channels."""
    return (shape[0] in CHANNELS) != (shape[2] in CHANNELS)


def refuse_implausible(shape: Sequence[int]) -> None:
    """Raise ValueError if a shape given as [C, H, W] looks like [H, W, C], or like a [C, H, W] whose sides were moved."""
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
