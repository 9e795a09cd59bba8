"""What training asks of the device that it runs on. Only this module tells a GPU from the CPU.

A GPU is asked by the functions of `torch.cuda`. Every other accelerator of torch has a module with the same functions.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

ACCELERATORS = ("cuda",)  # types of devices that are used where there is one
MEBIBYTE = 2**20


def pick() -> torch.device:
    """Return the GPU that this process may use, else the CPU."""
    found = (name for name in ACCELERATORS if torch.get_device_module(name).is_available())
    return torch.device(next(found, "cpu"))


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device works beside the host, with memory and a random generator of its own."""
    return device.type in ACCELERATORS


def name(device: torch.device) -> str:
    """Return the device's name, for a receipt."""
    return str(_module(device).get_device_name(device)) if is_accelerator(device) else "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given. The CPU has."""
    if is_accelerator(device):
        _module(device).synchronize(device)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor in memory that can be copied to the device without waiting."""
    return tensor.pin_memory() if is_accelerator(device) else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, without waiting for the device."""
    return pinned(tensor, device).to(device, non_blocking=True)


# --- memory ---------------------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device, sharers: int = 1) -> int | None:
    """Return the bytes of a device that this process can still take; None if they are not known, as on a CPU.

    Args:
        device: the device.
        sharers: how many processes share it, this one included. Each takes an equal part of all its memory at most, since the
            others may not have taken theirs yet.
    """
    if not is_accelerator(device):
        return None
    module = _module(device)
    free, total = module.mem_get_info(device)
    held = module.memory_allocated(device)
    unused = module.memory_reserved(device) - held  # in blocks that this process holds
    return max(0, min(int(free + unused), int(total) // sharers - int(held)))


def release_unused(device: torch.device) -> None:
    """Give back the memory that this process holds and does not use, so that another process can take it."""
    if is_accelerator(device):
        gc.collect()
        _module(device).empty_cache()


def begin_peak(device: torch.device) -> None:
    """Forget the peak of a device's memory, so that `peak_bytes` tells of what follows."""
    if is_accelerator(device):
        _module(device).reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes of a device that this process held at once, by its allocator; None on a CPU."""
    return int(_module(device).max_memory_allocated(device)) if is_accelerator(device) else None


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MiB, of the GPU or else of this process."""
    peak = peak_bytes(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 if peak is None else peak / MEBIBYTE


# --- random numbers -------------------------------------------------------------------------------------------------------


def default_generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's global generators, from which operations on the CPU and on this device draw."""
    if not is_accelerator(device):
        return [torch.default_generator]
    module = _module(device)
    index = module.current_device() if device.index is None else device.index
    return [torch.default_generator, module.default_generators[index]]


def seed_all(device: torch.device, seed: int) -> None:
    """Seed torch's global generators of the CPU and of this device."""
    torch.default_generator.manual_seed(seed)
    if is_accelerator(device):
        with _module(device).device(device):
            _module(device).manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators of the CPU, as `global`, and of this device under its type."""
    states = {"global": torch.get_rng_state()}
    if is_accelerator(device):
        states[device.type] = _module(device).get_rng_state(device)
    return states


def can_restore(device: torch.device, states: Mapping[str, Tensor]) -> bool:
    """Return whether states are of a device of this type. Generators of different types have states that do not fit."""
    theirs = [name for name in ACCELERATORS if name in states]
    return theirs == ([device.type] if is_accelerator(device) else [])


def restore_random(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Set the states that `random_states` returned for a device of this type."""
    torch.set_rng_state(states["global"])
    if is_accelerator(device):
        _module(device).set_rng_state(states[device.type], device)


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Return a context at whose end torch's global generators of the CPU and of this device are as before."""
    if is_accelerator(device):
        return torch.random.fork_rng(devices=[device], device_type=device.type)
    return torch.random.fork_rng(devices=[])


def states_of_all() -> dict[str, list[Tensor]]:
    """Return the states of the global generators of all accelerators in use, by their type."""
    used = (name for name in ACCELERATORS if torch.get_device_module(name).is_initialized())
    return {name: torch.get_device_module(name).get_rng_state_all() for name in used}


def restore_all(states: Mapping[str, Sequence[Tensor]]) -> None:
    """Set what `states_of_all` returned. There may be fewer devices than when it was called."""
    for name in ACCELERATORS:
        module = torch.get_device_module(name)
        for index, state in zip(range(module.device_count()), states.get(name, []), strict=False):
            module.set_rng_state(state, index)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
