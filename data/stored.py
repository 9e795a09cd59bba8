"""Rows in a store, a memory map of a file or a tensor, from which they are read on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes per read where all images are read once
CPU = torch.device("cpu")
SHARE, SHARE_OF_CPU = 1 / 3, 1 / 8  # largest share of a device's memory for inputs; on a CPU each worker has a copy


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A selection of the rows of a store, in any order. Only `take` reads them."""

    store: Tensor  # [M, ...], on the CPU
    rows: Tensor  # int64 [N], rows of the store
    device: torch.device = CPU  # where the rows are used

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows, [N, ...]."""
        return torch.Size([len(self.rows), *self.store.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.store.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions, 4 for images."""
        return self.store.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Tensor) -> Stored:
        return replace(self, rows=self.rows[which])

    def take(self, which: Tensor) -> Tensor:
        """Read rows into memory: [K, ...] on the CPU.

        NumPy reads them, since torch starts a pool of threads for each calling thread, and these pools compete with
        training.

        Args:
            which: int64 [K], places among these N rows.
        """
        return torch.from_numpy(np.take(self.store.numpy(), self.rows.numpy()[which.numpy()], axis=0))


Rows = Tensor | Stored


def as_stored(rows: Rows) -> Stored:
    """Return rows as `Stored`."""
    return rows if isinstance(rows, Stored) else Stored(store=rows, rows=torch.arange(len(rows)))


def chunks(rows: Rows) -> Iterator[Tensor]:
    """Yield all rows in order, CHUNK bytes at a time: tensors on their device, stored rows on the CPU."""
    size = max(1, CHUNK // max(1, rows.shape[1:].numel() * rows.dtype.itemsize))
    if isinstance(rows, Tensor):
        yield from torch.split(rows, size)
    else:
        yield from map(rows.take, torch.split(torch.arange(len(rows)), size))


def brought(rows: Stored, device: torch.device, resident: bool) -> Rows:
    """Return rows for use on a device: copied into its memory if `resident`, else left in their store."""
    if not resident:
        return replace(rows, device=device)
    everything = torch.arange(len(rows))
    return rows.take(everything).to(device)


def fits(size: int, device: torch.device) -> bool:
    """Return whether inputs of this size in bytes may be kept in a device's memory.

    The limit is a share of the total memory, not of the free memory, so that all workers on a machine decide alike.
    """
    if device.type != "cpu":
        whole = torch.get_device_module(device).get_device_properties(device).total_memory
    else:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bool(size <= whole * (SHARE_OF_CPU if device.type == "cpu" else SHARE))
