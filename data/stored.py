"""Images in a store, a memory map of a file or a tensor, from which rows are read on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes per read where all images are read once
CPU = torch.device("cpu")
SHARE, SHARE_OF_CPU = 1 / 3, 1 / 8  # largest share of a device's memory for images; on a CPU each worker has a copy


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A selection of the images of a store, in any order. Only `take` reads them."""

    store: Tensor  # uint8 [M, C, H, W], on the CPU
    rows: Tensor  # int64 [N], rows of the store
    device: torch.device = CPU  # where the images are used

    @property
    def shape(self) -> torch.Size:
        """Shape of the images, [N, C, H, W]."""
        return torch.Size([len(self.rows), *self.store.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixels."""
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
        """Read images into memory: uint8 [K, C, H, W] on the CPU.

        NumPy reads them, since torch starts a pool of threads for each calling thread, and these pools compete with
        training.

        Args:
            which: int64 [K], places among these N images.
        """
        return torch.from_numpy(np.take(self.store.numpy(), self.rows.numpy()[which.numpy()], axis=0))


Images = Tensor | Stored


def as_stored(images: Images) -> Stored:
    """Return images as `Stored`."""
    return images if isinstance(images, Stored) else Stored(store=images, rows=torch.arange(len(images)))


def chunks(images: Images) -> Iterator[Tensor]:
    """Yield all images in order, CHUNK bytes at a time: tensors on their device, stored images on the CPU."""
    size = max(1, CHUNK // max(1, images.shape[1:].numel()))
    if isinstance(images, Tensor):
        yield from torch.split(images, size)
    else:
        yield from map(images.take, torch.split(torch.arange(len(images)), size))


def brought(images: Stored, device: torch.device, resident: bool) -> Images:
    """Return images for use on a device: copied into its memory if `resident`, else left in their store."""
    if not resident:
        return replace(images, device=device)
    everything = torch.arange(len(images))
    return images.take(everything).to(device)


def fits(images: int, device: torch.device) -> bool:
    """Return whether images of this size in bytes may be kept in a device's memory.

    The limit is a share of the total memory, not of the free memory, so that all workers on a machine decide alike.
    """
    if device.type != "cpu":
        whole = torch.get_device_module(device).get_device_properties(device).total_memory
    else:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bool(images <= whole * (SHARE_OF_CPU if device.type == "cpu" else SHARE))
