"""The memory of a device: what operations take, counted tensor by tensor, and what is free."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIBIBYTE = 2**30


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's storage."""
    return int(tensor.untyped_storage().nbytes())


def address_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the peak of the bytes of living tensors that operations make, on one type of device or on all.

    Workspaces of kernels and the rounding of an allocator are not counted. So the result is the same on every device.
    """

    def __init__(self, known: Iterable[int] = (), device: str | None = None) -> None:
        """Start at 0 bytes.

        Args:
            known: addresses of storages that are not counted here.
            device: type of the device whose tensors are counted; None: of all devices.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._alive = set(known)
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {address_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and address_of(tensor) not in given:  # neither a view nor written in place
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), int(storage.nbytes())
        is_ours = self._device is None or tensor.device.type == self._device
        if address and is_ours and address not in self._alive:
            self._alive.add(address)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


def _free_of_cuda(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # in blocks that this process holds
    return free + unused


#: Bytes that a process can still take, by type of device.
FREE: dict[str, Callable[[torch.device], int]] = {"cuda": _free_of_cuda}


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of a device that this process can still take; None if they are not known, as on a CPU."""
    free = FREE.get(device.type)
    return None if free is None else free(device)


def is_known(device: torch.device) -> bool:
    """Return whether a device's free memory is known."""
    return device.type in FREE


def begin_peak(device: torch.device) -> None:
    """Forget the peak of a device's memory, so that `measured_peak` tells of what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measured_peak(device: torch.device) -> int | None:
    """Return the most bytes of a device that this process held at once, by its allocator; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def in_gibibytes(size: int) -> str:
    """Return a number of bytes for a message."""
    return f"{size / GIBIBYTE:.2f} GiB"
