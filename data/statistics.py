"""Mean and standard deviation of the training part, by which inputs and targets are standardised."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo.data.inputs import Inputs
from hpo.data.stored import Rows, chunks

NOTHING = torch.empty(0)  # mean and std of inputs that are not standardised
Moments = tuple[Tensor, Tensor]  # mean and std, float32; std is 1 where values are constant


def of_inputs(inputs: Inputs) -> tuple[Tensor | dict[str, Tensor], Tensor | dict[str, Tensor], int]:
    """Return mean and std of inputs, and the highest value of uint8 images (255 for all others).

    Images and series have one for each channel, features and columns one for each. Other whole numbers have none.
    """
    if isinstance(inputs, dict):
        found = {name: _of_tensor(one) for name, one in inputs.items()}
        return (
            {name: mean for name, (mean, _, _) in found.items()},
            {name: std for name, (_, std, _) in found.items()},
            255,
        )
    return _of_tensor(inputs)


def of_targets(targets: Tensor) -> Moments:
    """Return mean and std [T] of a regression's targets [N, T]."""
    return _finished(targets.double().mean(0), targets.double().var(0, correction=0))


def _of_tensor(rows: Rows) -> tuple[Tensor, Tensor, int]:
    is_image = rows.dtype == torch.uint8 and rows.ndim == 4
    return _of_pixels(rows) if is_image else (*_of_floats(rows), 255)


def _of_floats(rows: Rows) -> Moments:
    """Return mean and std over rows and all dimensions behind the second, in two passes. NaN counts as missing."""
    if not rows.dtype.is_floating_point:
        return NOTHING, NOTHING
    channels = rows.shape[1] if rows.ndim > 1 else 1
    sums, counts = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for part in chunks(rows):
        values = _by_channel(part)
        sums += values.nansum(1)
        counts += values.isfinite().sum(1)
    mean = sums / counts.clamp(min=1)
    squares = torch.zeros_like(sums)
    for part in chunks(rows):
        squares += (_by_channel(part) - mean[:, None]).square().nansum(1)
    return _finished(mean, squares / counts.clamp(min=1))


def _by_channel(rows: Tensor) -> Tensor:
    """Return rows [N, C, ...] as float64 [C, all other values], rows [N] as [1, N]."""
    return rows.double().transpose(0, 1).flatten(1) if rows.ndim > 1 else rows.double()[None]


def _finished(mean: Tensor, variance: Tensor) -> Moments:
    # Rounding of float64 leaves a tiny variance to equal values. It must not be taken for a spread.
    std = torch.where(variance > 1e-24 * mean.square(), variance.sqrt(), 1.0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _of_pixels(images: Rows) -> tuple[Tensor, Tensor, int]:
    """Return mean and std [C] of uint8 images, and their highest value.

    They are computed from counts of each pixel value. This is exact and needs no float copy of the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.zeros((images.shape[1], 256), dtype=torch.int64)
    for chunk in chunks(images):
        channels = chunk.transpose(0, 1).flatten(1)  # [C, N*H*W]
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    shares = counts.double() / (images.shape.numel() // images.shape[1])
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    white = int(counts.sum(0).nonzero().max())
    return mean.float(), torch.where(std > 0, std, 1.0).float(), white
