"""The memory that operations take, counted tensor by tensor. What a device has and has left is asked of `devices.py`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

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


def in_gibibytes(size: int) -> str:
    """Return a number of bytes for a message."""
    return f"{size / GIBIBYTE:.2f} GiB"
