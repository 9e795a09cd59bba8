"""Several tensors in one copy to a device, and in one back. On a GPU a copy costs a call, and one back a wait as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 8  # bytes; where a tensor begins in the copy, so that it can be read as any number type


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return CPU tensors on a device, as views of one copy. The host does not wait."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    packed = torch.empty(sum(room), dtype=torch.uint8).pin_memory()
    for place, size, tensor in zip(torch.split(packed, room), sizes, tensors, strict=True):
        place[:size].view(tensor.dtype).copy_(tensor.flatten())
    there = torch.split(packed.to(device, non_blocking=True), room)
    return [
        place[:size].view(tensor.dtype).view(tensor.shape)
        for place, size, tensor in zip(there, sizes, tensors, strict=True)
    ]


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of at most 53 bits as CPU tensors, after one wait for their device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    here = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    parts = torch.split(here, [tensor.numel() for tensor in tensors])
    return [part.to(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
