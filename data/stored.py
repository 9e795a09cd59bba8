"""Images that stay where they lie, on disk as a memory map or in memory, until rows of them are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes that are read at a time where everything is read once
CPU = torch.device("cpu")
SHARES = {"cuda": 1 / 3, "cpu": 1 / 8}  # of a device's memory that images may take; on a CPU each worker holds its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Some images of a store, in an order of their own; nothing is read before `take`."""

    store: Tensor  # uint8 [M, C, H, W], on the CPU
    rows: Tensor  # int64 [N], which of them
    device: torch.device = CPU  # where they are used

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return torch.Size([len(self.rows), *self.store.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Of the store."""
        return self.store.dtype

    @property
    def ndim(self) -> int:
        """4 for images."""
        return self.store.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Tensor) -> Stored:
        return replace(self, rows=self.rows[which])

    def take(self, which: Tensor) -> Tensor:
        """Read images by their place among these [K] into memory: uint8 [K, C, H, W] on the CPU.

        By NumPy: torch starts a pool of threads for each thread that calls it, and these contend with training.
        """
        return torch.from_numpy(np.take(self.store.numpy(), self.rows.numpy()[which.numpy()], axis=0))


Images = Tensor | Stored


def as_stored(images: Images) -> Stored:
    """Return images as stored ones."""
    return images if isinstance(images, Stored) else Stored(store=images, rows=torch.arange(len(images)))


def chunks(images: Images) -> Iterator[Tensor]:
    """Yield all images in order, on their device or on the CPU, as many at a time as CHUNK holds."""
    size = max(1, CHUNK // max(1, images.shape[1:].numel()))
    if isinstance(images, Tensor):
        yield from torch.split(images, size)
    else:
        yield from map(images.take, torch.split(torch.arange(len(images)), size))


def brought(images: Stored, device: torch.device, resident: bool) -> Images:
    """Return images where they are used: in the device's memory, or left where they are."""
    if not resident:
        return replace(images, device=device)
    everything = torch.arange(len(images))
    return images.take(everything).to(device)


def fits(images: int, device: torch.device) -> bool:
    """Say whether so many bytes of images may take their place in a device's memory.

    Judged by all the memory that there is, so that each worker on a machine comes to the same answer.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return images <= whole * SHARES.get(device.type, SHARES["cpu"])
