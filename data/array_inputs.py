"""The inputs in an archive of arrays: images, features, series or tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpo.data.archive import Archive, Array
from hpo.data.channels import CHANNELS, is_sure
from hpo.data.channels import channels_last as are_last
from hpo.data.files import BadFile
from hpo.data.floats import first_beyond, lost_digits, said_of
from hpo.data.inputs import Inputs
from hpo.data.names import Part
from hpo.data.source import Fitted
from hpo.data.tokens import MOST_CODES, fit_codes

Holds = Literal["image", "features", "series", "tokens"]
LONG = 16  # an array with one side this long and one as short as CHANNELS is not a grey image
#: Number of dimensions of an array, and what they are.
SHAPES: dict[Holds, tuple[tuple[int, ...], str]] = {
    "image": ((3, 4), "[N, C, H, W] or [N, H, W]"),
    "features": ((2,), "[N, F]"),
    "series": ((2, 3), "[N, C, T] or [N, T]"),
    "tokens": ((2,), "[N, L]"),
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the arrays of inputs hold, and in which order."""

    holds: Holds
    is_real: bool  # whether values are numbers of any size; else whole numbers
    last: bool  # whether channels come last
    notes: tuple[str, ...] = ()


def form_of(archive: Archive, holds: Holds | None, channels_last: bool | None) -> Form:
    """Return what the training inputs are; BadFile if type and shape leave it open, and `holds` does not say it."""
    values = archive.arrays["train", "images"]
    is_float = values.dtype.kind == "f"
    if holds is None and is_float and values.ndim == 3:
        raise archive.bad(
            "train",
            "images",
            f"is {values.dtype} {list(values.shape)}, which may be series or grey images; "
            f'write holds = "series" for [N, C, T], or holds = "image" for [N, H, W]{_mend_of(values)}',
        )
    if holds is None:
        holds = "features" if is_float and values.ndim == 2 else "image"
    elif archive.reading == 1:
        raise ValueError("holds goes with reading = 2; remove one of both")
    if holds != "image":
        return Form(holds=holds, is_real=holds != "tokens", last=bool(channels_last))
    is_real = is_float and values.ndim in (3, 4) and archive.reading != 1
    last, notes = _order(archive, channels_last)
    if is_real:
        said = f"{archive.names['train', 'images']} is {values.dtype}, read as measured images, without augmentation"
        notes += (f"{said}; pixels are whole numbers{_mend_of(values)}",)
    return Form(holds="image", is_real=is_real, last=last, notes=notes)


def inputs_of(archive: Archive, part: Part, form: Form) -> Tensor:
    """Return a part's inputs as the form says; BadFile, which names the array and the place, for other values."""
    if form.holds == "image" and not form.is_real:
        return _pixels(archive, part, form.last)
    values = archive.arrays[part, "images"]
    dimensions, said = SHAPES[form.holds]
    kinds = "biuf" if form.is_real else "iu"
    if values.dtype.kind not in kinds or values.ndim not in dimensions or 0 in values.shape:
        wanted = "numbers" if form.is_real else "whole numbers"
        sizes = "; bring all to one shape" if values.dtype == object else ""
        raise archive.bad(part, "images", f"is {values.dtype} {list(values.shape)}; give {wanted} {said}{sizes}")
    if form.holds == "tokens":
        return _tokens(archive, part, values)
    _refuse_bad_numbers(archive, part, values)
    if form.holds != "features" and values.ndim == dimensions[0]:
        values = values[:, None]
    elif form.last:
        values = np.moveaxis(values, -1, 1)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def fit_of(form: Form) -> Callable[[Inputs], Fitted] | None:
    """Return what makes the encoding of the inputs, None if they need none."""
    return fit_codes if form.holds == "tokens" else None


def _tokens(archive: Archive, part: Part, values: Array) -> Tensor:
    outside = np.argwhere((values < 0) | (values > MOST_CODES))
    if len(outside):
        place = tuple(outside[0].tolist())
        raise archive.bad(part, "images", f"is {values[place]}; codes of tokens go from 0 to {MOST_CODES:,}", *place)
    return torch.from_numpy(values.astype(np.int64))


def _refuse_bad_numbers(archive: Archive, part: Part, values: Array) -> None:
    """Raise BadFile for numbers that are missing, infinite, or lose their digits in float32."""
    place = first_beyond(values)
    missing = np.flatnonzero(np.isnan(values))
    if place is not None or len(missing):
        flat = int(missing[0]) if place is None else place
        at = tuple(int(one) for one in np.unravel_index(flat, values.shape))
        cause = "is nan; fill it, or leave the row out" if place is None else f"{said_of(float(values[at]))}"
        raise archive.bad(part, "images", cause, *at)
    columns = np.moveaxis(values, 1, 0) if values.ndim > 1 else values[None]
    if values.dtype.itemsize <= 4 and values.dtype.kind == "f":
        return
    for number, column in enumerate(columns if values.ndim == 2 else [values]):
        if why := lost_digits(column.astype(np.float64).ravel()):
            raise archive.bad(part, "images", f"{f'column {number} ' if values.ndim == 2 else ''}{why}")


def _order(archive: Archive, channels_last: bool | None) -> tuple[bool, tuple[str, ...]]:
    """Return whether channels come last, and notes about it; BadFile if the shape is ambiguous or contradicts the option."""
    shape = list(archive.arrays["train", "images"].shape)
    name = archive.names["train", "images"]
    if archive.reading == 1 or len(shape) != 4:
        return bool(channels_last), ()
    last = are_last(shape[1:])
    if channels_last is not None:
        if last != channels_last and is_sure(shape[1:]):
            orders = ("[N, H, W, C]", "[N, C, H, W]")
            told, seen = orders if channels_last else orders[::-1]
            raise BadFile(
                f"{archive.path}: {name} is {shape}, which is {seen} by its sides and {told} by channels_last = "
                f"{str(channels_last).lower()}; remove channels_last, or move the sides by np.moveaxis if it is right"
            )
        return channels_last, ()
    if last is None:
        raise BadFile(
            f"{archive.path}: {name} is {shape}, which may be [N, C, H, W] or [N, H, W, C]; "
            "write channels_last = false or true"
        )
    told = f"{name} is {shape}, read as [N, H, W, C]; channels_last = false reads it as [N, C, H, W]"
    return last, (told,) if last else ()


def _pixels(archive: Archive, part: Part, last: bool) -> Tensor:
    """Return a part's images, uint8 [N, C, H, W]."""
    values, name = archive.arrays[part, "images"], archive.names[part, "images"]
    if values.dtype.kind not in "iu" or values.ndim not in (3, 4) or 0 in values.shape:
        raise BadFile(
            f"{archive.path}: {name} is {values.dtype} {list(values.shape)}; "
            f"give integers [N, C, H, W] or [N, H, W]{_mend_of(values)}"
        )
    if values.ndim == 3 and min(values.shape[1:]) in CHANNELS and max(values.shape[1:]) >= LONG:
        raise BadFile(
            f"{archive.path}: {name} is {list(values.shape)}, which would be grey images of "
            f"{values.shape[1]}x{values.shape[2]} pixels; reshape it to [N, H, W] or [N, C, H, W]"
        )
    outside = np.argwhere((values < 0) | (values > 255))
    if len(outside):
        place: tuple[int, ...] = tuple(outside[0].tolist())
        raise BadFile(f"{archive.path}: {name}{list(place)} is {values[place]}; pixels go from 0 to 255")
    if values.ndim == 3:
        values = values[:, None]
    elif last:
        values = values.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))


def _mend_of(values: Array) -> str:
    if values.dtype == object:
        return "; images of several sizes must be brought to one"
    if values.ndim == 2:
        return '; reshape rows of pixels by .reshape(-1, H, W), or write holds = "features" or "tokens"'
    if values.dtype.kind not in "fb" or not values.size:
        return ""
    if values.min() >= 0 and values.max() <= 1:
        return ", such as (values * 255).round().astype('uint8')"
    if values.min() >= 0 and values.max() <= 255:
        return ", such as values.round().astype('uint8')"
    return f"; they go from {values.min():g} to {values.max():g}, so bring them to whole numbers from 0 to 255"
