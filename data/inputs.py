"""What a model gets of each row: one tensor, or several by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from hpo.data.stored import Rows, as_stored, brought, fits

#: Rows of one tensor [N, ...], in memory or in a store, or of several tensors by name.
Inputs = Rows | dict[str, Tensor]
Kind = Literal["image", "features", "series", "tokens", "table", "named"]

NUMBERS, CATEGORIES = "numbers", "categories"  # the tensors of a table: float32 [N, F] and int64 [N, C]
#: Kind by type and number of dimensions of one tensor.
KINDS: dict[tuple[torch.dtype, int], Kind] = {
    (torch.uint8, 4): "image",
    (torch.float32, 4): "image",
    (torch.float32, 2): "features",
    (torch.float32, 3): "series",
    (torch.int64, 2): "tokens",
}
Got = TypeVar("Got")


def kind_of(inputs: Inputs) -> Kind:
    """Return what inputs are, by type and shape; ValueError if no model of ours could take them."""
    if isinstance(inputs, dict):
        return "table" if inputs and inputs.keys() <= {NUMBERS, CATEGORIES} else "named"
    found = KINDS.get((inputs.dtype, inputs.ndim))
    if found is None:
        raise ValueError(
            f"inputs are {inputs.dtype} of shape {list(inputs.shape)}; give images as uint8 or float32 [N, C, H, W], "
            "features as float32 [N, F], series as float32 [N, C, T], or tokens as int64 [N, L]"
        )
    return found


def each(inputs: Tensor | dict[str, Tensor], function: Callable[[Tensor], Got]) -> Got | dict[str, Got]:
    """Return the function's result for one tensor, or its results for several tensors under their names."""
    return {name: function(one) for name, one in inputs.items()} if isinstance(inputs, dict) else function(inputs)


def some(inputs: Inputs) -> Rows:
    """Return one of the tensors, for what all of them share: number of rows and device."""
    return next(iter(inputs.values())) if isinstance(inputs, dict) else inputs


def selected(inputs: Inputs, rows: Tensor) -> Inputs:
    """Return these rows. Of one tensor only the choice is made; it is read when it is needed."""
    if isinstance(inputs, dict):
        return {name: one[rows] for name, one in inputs.items()}
    return as_stored(inputs)[rows]


def head(inputs: Inputs, count: int) -> Inputs:
    """Return the first `count` rows, or all if there are fewer."""
    return {name: one[:count] for name, one in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def sample_bytes(inputs: Inputs) -> int:
    """Return the bytes of one row."""
    tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    return sum(one.shape[1:].numel() * one.dtype.itemsize for one in tensors)


def placed(inputs: Inputs, device: torch.device, resident: bool) -> Inputs:
    """Return inputs for use on a device. Stored rows are copied there if `resident`, else left in their store."""
    if isinstance(inputs, dict):
        return {name: one.to(device) for name, one in inputs.items()}
    return inputs.to(device) if isinstance(inputs, Tensor) else brought(inputs, device, resident)


def are_resident(inputs: Inputs, count: int, device: torch.device, wanted: bool | None) -> bool:
    """Return whether `count` such rows go into the device's memory: as wanted, else by their size."""
    return fits(count * sample_bytes(inputs), device) if wanted is None else wanted
