"""A pretended accelerator: tensors say `twin:0`, and their numbers lie in CPU tensors beside.

It finds on any machine what goes wrong on a GPU. Operations on tensors of two devices raise, as on CUDA. Launches of
kernels, waits of the host and copies in each direction are counted, and so are the bytes of living tensors. Numbers stay
right, so a training on it can be held against the same training on the CPU.

What it cannot do: CUDA's own kernels, streams, and time. One operation counts as one launch. A foreach or fused operation
counts as CUDA's multi-tensor kernel launches it.

It rests on torch's PrivateUse1 backend for Python, which is experimental. A process has it from the first import of this
module on, but the device is only available inside `plugged_in`.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._mode_utils import no_dispatch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hpo.train import devices
from tests.support.twin_cells import CELLS

NAME = "twin"
TOTAL_MEMORY = 2**30  # bytes that the device says it has
WITHOUT_KERNEL = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "_unsafe_view")
READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # the host needs a result to go on
RESIZING = ("resize_", "resize_as_", "set_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
# CUDA's multi_tensor_apply: tensors per launch by the number of lists, blocks per launch, elements per block.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
TENSORS_PER_LAUNCH_WITH_SCALARS = {1: 96, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_PER_LAUNCH, ELEMENTS_PER_BLOCK = 320, 65536


# --- counting -------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the device did during a block of `counting`."""

    launches: int = 0
    waits: int = 0  #: of the host for a result: `.item()`, `.tolist()`, `.cpu()`, `nonzero`, `synchronize`
    to_device: int = 0  #: copies from the host
    blocking: int = 0  #: those of them that hold the host, since they are not pinned or not asked to be non-blocking
    to_host: int = 0  #: copies to the host
    peak_bytes: int = 0  #: most bytes of living tensors at once
    operations: Counter[str] = field(default_factory=Counter)  #: launches by operation, to see what they are


_counting: list[Counts] = []  # also read by autograd's thread of the device


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the device does until the end of the block."""
    counts = Counts(peak_bytes=_memory.held)
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting[:] = [one for one in _counting if one is not counts]


def _count(what: str, number: int = 1) -> None:
    for counts in _counting:
        setattr(counts, what, getattr(counts, what) + number)


def _count_launches(op: Any, number: int) -> None:
    _count("launches", number)
    for counts in _counting:
        counts.operations[str(op).removeprefix("aten.")] += number


class _Memory:
    """The bytes of the storages that living tensors of the device lie in."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._users: Counter[int] = Counter()  # by the address of a storage

    def hold(self, tensor: Twin, numbers: torch.Tensor) -> None:
        storage = numbers.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self._users[address] += 1
        if self._users[address] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
            for counts in _counting:
                counts.peak_bytes = max(counts.peak_bytes, self.held)
        # The storage lives as long as the entry, else another one could get its address.
        weakref.finalize(tensor, self._release, address, size, storage).atexit = False

    def _release(self, address: int, size: int, _storage: torch.UntypedStorage) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.held -= size


_memory = _Memory()


# --- tensors --------------------------------------------------------------------------------------------------------------


class Twin(torch.Tensor):
    """A tensor on the pretended device."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Twin:
        """Return a tensor of the device that shares the memory of a CPU tensor."""
        made: Twin = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            layout=numbers.layout, device=f"{NAME}:0",
        )  # fmt: skip
        made.numbers = numbers
        _memory.hold(made, numbers)
        return made

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, Twin):
            raise TypeError(f"the data of a tensor on {self.device} cannot be a tensor on {other.device}")
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.numbers = other.numbers
        _memory.hold(self, other.numbers)

    def tolist(self) -> Any:
        _count("waits")
        _count("to_host")
        return self.numbers.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        _count("waits")
        _count("to_host")
        return f"{repr(self.numbers)[:-1]}, device='{NAME}:0')"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        if id(self) in memo:
            return memo[id(self)]
        _count_launches("clone", 1)
        made = memo[id(self)] = Twin(copy.deepcopy(self.numbers, memo))
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name != "numbers"})
        made.requires_grad_(self.requires_grad)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the tensor as one of the CPU, as if it were always loaded with `map_location="cpu"`."""
        _count("waits")
        _count("to_host")
        return self.numbers.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _dispatch(op, args, dict(kwargs or {}))


def _numbers(value: Any) -> Any:
    """Return the CPU's tensor, or list of tensors, for one argument of an operation."""
    if isinstance(value, list | tuple):
        return [_numbers(one) for one in value]
    return value.numbers if isinstance(value, Twin) else value


def _tensors(values: Iterable[Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield the tensors among arguments, and whether each lies in a list."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value, False
        elif isinstance(value, list | tuple):
            yield from ((one, True) for one in value if isinstance(one, torch.Tensor))


def _dispatch(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers, count it, and return tensors of the device."""
    if _is_composite(op):  # below autograd it comes as a whole, as in inference mode
        return op.decompose(*args, **kwargs)
    name = op._schema.name.removeprefix("aten::")
    if name == "_to_copy":
        return _copied(op, args, kwargs)
    if name == "copy_" and isinstance(args[0], Twin) != isinstance(args[1], Twin):
        return _copied_into(*args, **kwargs)
    _refuse_mixed(op, name, args, kwargs)
    _refuse_generator(op, kwargs.get("generator"))
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    _count_operation(op, name, args, kwargs)
    drawing = torch.Tag.nondeterministic_seeded in op.tags and kwargs.get("generator") is None
    with _own_generator() if drawing else nullcontext():
        run = CELLS.get(name, op)
        result = run(*_numbers(args), **{key: _numbers(value) for key, value in kwargs.items()})
    if torch.Tag.inplace_view in op.tags and name not in RESIZING:
        with no_dispatch():  # the shape of the tensor itself, which has no memory
            op(*args, **kwargs)
    given = _tensors((*args, *kwargs.values()))
    known = {id(one.numbers): one for one, _ in given if isinstance(one, Twin)}
    return _wrapped(op, result, known)


@cache
def _is_composite(op: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def _wrapped(op: Any, value: Any, known: dict[int, Twin]) -> Any:
    """Return a result as a tensor of the device. The result of an operation in place is the tensor itself."""
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(op, one, known) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in known:
        return Twin(value)
    found = known[id(value)]
    if found.shape != value.shape or found.stride() != value.stride():
        raise NotImplementedError(f"{op} changes the shape of a tensor in place, which the twin device cannot do")
    return found


def _copied(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Copy a tensor to another device, to another type, or both."""
    device = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    was = isinstance(args[0], Twin)
    will_be = was if device is None else torch.device(device).type == NAME
    if was and will_be:
        _count_launches(op, 1)
    else:
        _count_copy(args[0], to_device=will_be, non_blocking=kwargs.pop("non_blocking", False))
    result: torch.Tensor = op(_numbers(args[0]), **kwargs)
    return Twin(result) if will_be else result


def _copied_into(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _count_copy(source, to_device=isinstance(into, Twin), non_blocking=non_blocking)
    _numbers(into).copy_(_numbers(source))
    return into


def _count_copy(source: torch.Tensor, *, to_device: bool, non_blocking: bool) -> None:
    if to_device:
        _count("to_device")
        if not (non_blocking and source.is_pinned()):
            _count("blocking")
    else:
        _count("to_host")
        if not non_blocking:
            _count("waits")


def _refuse_mixed(op: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise as CUDA does if tensors are on two devices. A scalar of the CPU may go along, but not in a list."""
    plain = [*args, *kwargs.values()]
    if name in INDEXING and isinstance(args[0], Twin):  # CUDA copies indices of the CPU
        plain = [args[0], *args[2:]]
    strangers = any(not isinstance(one, Twin) and (is_listed or one.dim()) for one, is_listed in _tensors(plain))
    if strangers and any(isinstance(one, Twin) for one, _ in _tensors((*args, *kwargs.values()))):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found {NAME}:0 and cpu")


def _count_operation(op: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if name in INDEXING:
        indices = [one for one in args[1] if one is not None]
        for index in indices:
            if not isinstance(index, Twin):
                _count_copy(index, to_device=True, non_blocking=False)
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _count("waits")  # for the number of true elements
    elif any(tag in op.tags for tag in READS):
        _count("waits")
        if name == "_local_scalar_dense":
            _count("to_host")
            return
    if name.startswith(("_foreach_", "_fused_")):
        _count_launches(op, _launches_of_lists(op, args, kwargs))
    elif not op.is_view and name not in WITHOUT_KERNEL:
        _count_launches(op, 1)


def _launches_of_lists(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return how many kernels CUDA launches for lists of tensors."""
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, list | tuple) and len(one)]
    lists = [one for one in given if isinstance(one[0], torch.Tensor)]
    if str(op).startswith("aten._fused_"):
        lists = [one for one in lists if one[0].dim() or lists[0][0].dim() == 0][:5]  # without the counts of steps
    elif not _fits_multi_tensor(lists):
        return len(lists[0])
    scalars = len(given) > len(lists) or str(op).startswith("aten._fused_")
    depth = min(5, len(lists) + bool(op._schema.returns))
    per_launch = (TENSORS_PER_LAUNCH_WITH_SCALARS if scalars else TENSORS_PER_LAUNCH)[depth]
    blocks = sum(-(-tensor.numel() // ELEMENTS_PER_BLOCK) for tensor in lists[0])
    return max(-(-len(lists[0]) // per_launch), -(-blocks // BLOCKS_PER_LAUNCH), 1)


def _fits_multi_tensor(lists: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Return whether CUDA takes the fast route: one type, and the same sizes and strides across the lists."""
    dtype = lists[0][0].dtype
    return all(
        other.dtype == dtype and other.shape == first.shape and other.stride() == first.stride()
        for first, *others in zip(*lists, strict=True)
        for other in (first, *others)
    )


# --- random numbers -------------------------------------------------------------------------------------------------------

_CpuGenerator = torch.Generator
MARK = torch.tensor(list(b"twin"), dtype=torch.uint8)  # stands before a state, so that no other device takes it


class TwinGenerator(_CpuGenerator):
    """A generator of the device. It draws the numbers of a CPU generator with the same seed."""

    _made: ClassVar[weakref.WeakValueDictionary[int, TwinGenerator]] = weakref.WeakValueDictionary()
    _cdata: int

    def __new__(cls) -> TwinGenerator:
        made = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        cls._made[made._cdata] = made
        return made

    def __init__(self) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(f"{NAME}:0")

    def get_state(self) -> torch.Tensor:
        return torch.cat([MARK, super().get_state()])

    def set_state(self, state: torch.Tensor) -> TwinGenerator:
        if not torch.equal(state[: len(MARK)], MARK):
            raise RuntimeError("RNG state is wrong size")  # as CUDA says
        super().set_state(state[len(MARK) :].clone())
        return self

    def swap_with_default(self) -> None:
        """Exchange the state with that of the CPU's default generator."""
        own = super().get_state()
        super().set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(own)


def _refuse_generator(op: Any, generator: torch.Generator | None) -> None:
    if generator is not None and generator._cdata not in TwinGenerator._made:  # type: ignore[attr-defined]
        raise RuntimeError(f"{op}: expected a '{NAME}' device type for generator but found 'cpu'")


def _new_generator(device: Any = "cpu") -> torch.Generator:
    return TwinGenerator() if torch.device(device).type == NAME else _CpuGenerator(device)


class _GeneratorType(type):
    def __instancecheck__(cls, one: Any) -> bool:
        return isinstance(one, _CpuGenerator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _new_generator(device)


class _AnyGenerator(metaclass=_GeneratorType):
    """Stands for `torch.Generator`, which cannot make generators of a device in Python."""


@contextmanager
def _own_generator() -> Iterator[None]:
    """Let operations without a generator draw from the device's own default generator."""
    [generator] = backend.default_generators
    generator.swap_with_default()
    try:
        yield
    finally:
        generator.swap_with_default()


# --- the device -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Properties:
    name: str = "Twin"
    total_memory: int = TOTAL_MEMORY


class Backend:
    """What `torch.twin` offers, under the names of `torch.cuda`."""

    plugged_in = False
    default_generators: tuple[TwinGenerator, ...] = ()

    def is_available(self) -> bool:
        return self.plugged_in

    def is_initialized(self) -> bool:
        return self.plugged_in

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(self.plugged_in)

    def current_device(self) -> int:
        return 0

    @contextmanager
    def device(self, _device: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, _device: Any = None) -> str:
        return _Properties().name

    def get_device_properties(self, _device: Any = None) -> _Properties:
        return _Properties()

    def synchronize(self, _device: Any = None) -> None:
        _count("waits")

    def empty_cache(self) -> None: ...

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        return TOTAL_MEMORY - _memory.held, TOTAL_MEMORY

    def memory_allocated(self, _device: Any = None) -> int:
        return _memory.held

    def memory_reserved(self, _device: Any = None) -> int:
        return _memory.held  # it keeps no blocks that no tensor uses

    def max_memory_allocated(self, _device: Any = None) -> int:
        return _memory.peak

    def reset_peak_memory_stats(self, _device: Any = None) -> None:
        _memory.peak = _memory.held

    def manual_seed(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return self.default_generators[0].get_state()

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state()]

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        self.default_generators[0].set_state(state)


def _pinned(tensor: torch.Tensor, _device: Any = None) -> torch.Tensor:
    made = tensor.clone()
    made.untyped_storage().is_pinned_for_twin = True  # type: ignore[attr-defined]
    return made


def _is_pinned(tensor: torch.Tensor, _device: Any = None) -> bool:
    return not isinstance(tensor, Twin) and getattr(tensor.untyped_storage(), "is_pinned_for_twin", False)


@contextmanager
def plugged_in() -> Iterator[None]:
    """Make the device available until the end of the block. Training then picks it, as it picks a GPU."""
    with (
        mock.patch.object(torch, "Generator", _AnyGenerator),
        mock.patch.object(torch.Tensor, "pin_memory", _pinned),
        mock.patch.object(torch.Tensor, "is_pinned", _is_pinned),
        mock.patch.object(
            torch_optimizer, "_foreach_supported_types", [*torch_optimizer._foreach_supported_types, Twin]
        ),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, Twin]),
        mock.patch.object(devices, "ACCELERATORS", (NAME,)),
        mock.patch.multiple(Backend, plugged_in=True, default_generators=(TwinGenerator(),)),
    ):
        yield


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return Backend.plugged_in

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, _device: int) -> bool:
        return True


def _factory(name: str) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    _library.impl(name, lambda *args, **kwargs: _dispatch(op, args, kwargs), "PrivateUse1")


backend = Backend()
_setup_privateuseone_for_python_backend(NAME, backend_module=backend, hook=_Hooks())
DEVICE = torch.device(f"{NAME}:0")
_library = torch.library.Library("aten", "IMPL")
for _name in (
    "empty.memory_format", "empty_strided", "_to_copy", "copy_", "arange", "arange.start", "arange.start_step", "full",
    "scalar_tensor", "zeros", "ones", "eye", "eye.m", "linspace", "rand", "randn", "randperm", "rand.generator",
    "randn.generator", "randperm.generator", "tril_indices", "triu_indices",
):  # fmt: skip
    _factory(_name)
