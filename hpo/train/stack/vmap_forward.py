"""The forward pass of K models as torch.func.vmap of one: for models that are made of more than `forward.py` knows.

The model is copied without its weights; vmap runs the copy on the weights of all K models at once, and ordinary autograd
differentiates through it to the stacked parameters. What vmap cannot do, or would do otherwise than K models alone, is
told by Unstackable, from a look at the model and a trial of a few passes.

Two models in one stack must differ in nothing but parameters, buffers and dropout's p: all other settings are the first
one's. vmap takes the operations that it has no rule for one model after the other, which is right but no faster.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from hpo.models import Dropout
from hpo.models.activations import RReLU
from hpo.train.stack.architecture import OF_EVERY_MODULE
from hpo.train.stack.layers import Pass, Unstackable

COUNTER = "num_batches_tracked"  # buffers of this name are counted up by the stack itself, once a step
TRIED = 2  # models in the trial passes
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (bool, int, float, str, tuple, type(None))  # settings that are compared by value

Call = tuple[str, torch.Size]  # a Dropout layer's name and the shape of what it is called with, for one model


class VmapForward:
    """Maps images of K models to logits [K, classes, B]; the model that it is made from is left as it is."""

    name = "vmap"

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        """Copy the model and try the copy out; Unstackable says what stands against it.

        Args:
            images: a few of them, normalised, [B, C, H, W], on the model's device.
        """
        _refuse_by_looks(model)
        self._masks = _Masks()
        try:
            self._copy = _copy_without_weights(model, self._masks)
        except Exception as error:
            raise Unstackable(f"the model cannot be copied: {_told(error)}") from error
        self._has_dropout = any(isinstance(module, _GivenDropout) for module in self._copy.modules())
        self._ndim = images.ndim
        self._calls: dict[torch.Size, list[Call]] = {}  # of one training pass, by the images' shape
        self._parameters = [name for name, _ in model.named_parameters()]  # a tensor in several places has one name
        self._buffers = [name for name, _ in model.named_buffers()]
        self._places = _places(model, self._copy, [*self._parameters, *self._buffers])
        self._try_out(model, images)

    def __call__(self, at: Pass, images: Tensor) -> Tensor:
        """Return the logits [K, classes, B] of images [K, B, C, H, W], or of [B, C, H, W], which all models see."""
        state = self._state(at.parameters, at.buffers)
        calls: list[Call] = []
        factors: dict[int, Tensor] = {}
        if at.training and self._has_dropout:
            calls = self._calls_for(state, images)
            drawn = [at.noise.factors(name, shape.numel()) for name, shape in calls]  # in the order of one run alone
            factors = {index: factor for index, factor in enumerate(drawn) if factor is not None}
        logits = self._run(state, images, factors, training=at.training)
        if self._masks.calls != calls:
            raise RuntimeError(
                "the model called other Dropout layers than in the pass before, with images of one shape"
            )
        return logits.transpose(1, 2)

    # --- a pass -------------------------------------------------------------------------------------------------------

    def _state(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the copy works on [K, ...]; counters as copies, since the stack counts by itself."""
        kept = (buffers[name] for name in self._buffers)
        counted = (b.clone() if _is_counter(n) else b for n, b in zip(self._buffers, kept, strict=True))
        return [*(parameters[name] for name in self._parameters), *counted]

    def _run(self, state: list[Tensor], images: Tensor, factors: dict[int, Tensor], *, training: bool) -> Tensor:
        """Return the logits [K, B, classes].

        Args:
            factors: by number of the call [K, elements]; a call without them drops nothing.
        """
        if self._copy.training != training:
            self._copy.train(training)
        images_at = 0 if images.ndim > self._ndim else None
        with _without_warnings_of_fallbacks():
            run = vmap(self._run_one, in_dims=(0, images_at, 0), randomness="error")
            logits: Tensor = run(state, images, factors)
        return logits

    def _run_one(self, state: list[Tensor], images: Tensor, factors: dict[int, Tensor]) -> Tensor:
        """Return one model's logits [B, classes]; vmap calls this once for all.

        As torch.func.functional_call, which looks every name up each time: 330 µs for the 122 tensors of resnet18, this 14
        (one thread of an AMD EPYC, torch 2.15).
        """
        self._masks.begin(factors)
        blank = [holder[key] for holder, key, _ in self._places]
        try:
            for holder, key, index in self._places:
                holder[key] = state[index]
            logits = self._copy(images)
            for holder, key, index in self._places:
                if holder[key] is not state[index]:
                    raise Unstackable(f"the model's forward puts another tensor in place of {self._name(index)}")
        finally:
            for (holder, key, _), tensor in zip(self._places, blank, strict=True):
                holder[key] = tensor
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise Unstackable(f"the model returns {got} for {len(images)} images, not logits [B, classes]")
        return logits

    def _name(self, index: int) -> str:
        return [*self._parameters, *self._buffers][index]

    def _calls_for(self, state: list[Tensor], images: Tensor) -> list[Call]:
        """Return the calls of Dropout layers in a training pass, in order; found with one model once for a shape."""
        shape = images.shape[-self._ndim :]
        if shape not in self._calls:
            first = [tensor[:1].clone() for tensor in state]  # clones, since batch norm writes to its buffers
            self._run(first, images[:1] if images.ndim > self._ndim else images, {}, training=True)
            self._calls[shape] = self._masks.calls
        return self._calls[shape]

    # --- the trial ----------------------------------------------------------------------------------------------------

    def _try_out(self, model: nn.Module, images: Tensor) -> None:
        """Run the copy as a stack would, in training and evaluation; Unstackable if anything goes wrong or amiss."""
        drawn = random.getstate()
        try:
            for training in (True, False):  # from a known mode of every layer, whatever the model was left in
                self._copy.train(training)
                self._try_pass(model, images, training=training)
            settings = _settings(self._copy)
            self._try_pass(model, images, training=True)
            self._try_pass(model, images, training=False)
        except Unstackable:
            raise
        except Exception as error:  # whatever a user's forward does with a tensor of vmap
            raise Unstackable(_why_vmap_failed(error)) from error
        _refuse_hidden_tensors(self._copy)
        made = sorted(set(_registered(self._copy)) ^ {*self._parameters, *self._buffers})
        if made:
            raise Unstackable(f"the model's forward makes or drops {', '.join(made)}")
        changed = sorted(key for key, value in _settings(self._copy).items() if settings.get(key) != value)
        if changed:
            raise Unstackable(f"the model's forward changes {', '.join(changed)}, which K models would change together")
        if random.getstate() != drawn:
            random.setstate(drawn)
            raise Unstackable("the model draws from Python's random, once for K models")

    def _try_pass(self, model: nn.Module, images: Tensor, *, training: bool) -> None:
        parameters, buffers = (
            {name: _repeated(tensor) for name, tensor in named}
            for named in (model.named_parameters(), model.named_buffers())
        )
        state = self._state(parameters, buffers)
        with torch.set_grad_enabled(training):
            logits = self._run(state, _repeated(images) if training else images, {}, training=training)
        for name, now in zip(self._buffers, state[len(parameters) :], strict=True):
            if _is_counter(name) and not torch.equal(now, buffers[name] + int(training)):
                raise Unstackable(f"{name} is not counted up once in a training pass, as the stack counts it")
        if training:
            self._calls[images.shape] = self._masks.calls
            self._refuse_unused(logits, parameters)

    def _refuse_unused(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> None:
        leaves = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not leaves:
            raise Unstackable("the model has no parameters to train")
        gradients = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
        unused = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None]
        if unused:
            raise Unstackable(f"the logits do not depend on {', '.join(unused)}")


# --- dropout --------------------------------------------------------------------------------------------------------------


class _Masks:
    """Hands the Dropout layers of a pass their factors, in the order in which they are called, and takes note of it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # in the pass under way, or the last one
        self._factors: dict[int, Tensor] = {}

    def begin(self, factors: dict[int, Tensor]) -> None:
        """Begin a pass.

        Args:
            factors: by number of the call, flat; a call without them multiplies by nothing.
        """
        self.calls = []
        self._factors = factors

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return a layer's output."""
        factors = self._factors.get(len(self.calls))
        self.calls.append((name, x.shape))
        if factors is None:
            return x
        flat = factors.to(x.dtype)
        return x * (flat.view(x.shape[::-1]).t() if x.ndim == 2 else flat.view(x.shape))  # as models.Dropout draws


class _GivenDropout(nn.Module):
    """Stands for a Dropout layer in the copy. It has no p, so that a model that reads it there is found out."""

    def __init__(self, name: str, masks: _Masks) -> None:
        super().__init__()
        self._name = name
        self._masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return self._masks.apply(self._name, x) if self.training else x


# --- the copy -------------------------------------------------------------------------------------------------------------


def _copy_without_weights(model: nn.Module, masks: _Masks) -> nn.Module:
    """Return a copy whose parameters and buffers have no values, and whose Dropout layers are given their factors.

    What stands in several places of the model stands in the same places of the copy.
    """
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        blank = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    for name, module in model.named_modules():
        if type(module) is Dropout:
            memo[id(module)] = _GivenDropout(name, masks)
    return copy.deepcopy(model, memo)


def _places(
    model: nn.Module, other: nn.Module, names: Sequence[str]
) -> list[tuple[dict[str, Tensor | None], str, int]]:
    """Return where the copy keeps its parameters and buffers, and the number of the name that each is listed under.

    A tensor that stands in several places has one name and one number.
    """
    number = {name: index for index, name in enumerate(names)}
    known = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    pairs = zip(model.modules(), other.modules(), strict=True)
    return [
        (getattr(theirs, kind), key, number[known[id(tensor)]])
        for ours, theirs in pairs
        for kind in ("_parameters", "_buffers")
        for key, tensor in getattr(ours, kind).items()
        if tensor is not None
    ]


def _registered(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


@torch.no_grad()
def _repeated(tensor: Tensor) -> Tensor:
    """Return a tensor once for each model that is tried [TRIED, ...]."""
    return tensor.expand(TRIED, *tensor.shape).clone().requires_grad_(tensor.requires_grad)


def _is_counter(name: str) -> bool:
    return name.endswith(COUNTER)


@contextmanager
def _without_warnings_of_fallbacks() -> Iterator[None]:
    """Keep vmap from warning of each operation that it takes one model after the other: nobody here can mend it."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


# --- what stands against it -----------------------------------------------------------------------------------------------


def _refuse_by_looks(model: nn.Module) -> None:
    """Refuse what would fail with a message that helps nobody, or would pass and be wrong."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise Unstackable(f"{name} gets its shape in the first pass only")
    _refuse_hidden_tensors(model)
    for name, module in model.named_modules():
        layer = f"layer {name} ({type(module).__name__})" if name else "the model"
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise Unstackable(f"{layer} has hooks, which may hold on to the model that they were made for")
        if isinstance(module, RReLU):
            raise Unstackable(f"{layer} draws a slope for each element from one generator, which K models would share")
        if isinstance(module, _DropoutNd):
            raise Unstackable(f"{layer} draws its mask from torch's global generator, which K models would share")
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
            raise Unstackable(f"{layer} averages over all batches (momentum = None)")


def _refuse_hidden_tensors(model: nn.Module) -> None:
    """Refuse tensors and layers that the model keeps otherwise than registered: K models would share the first one's."""
    registered = set(model.modules())

    def is_hidden(value: Any) -> bool:
        return isinstance(value, Tensor) or (isinstance(value, nn.Module) and value not in registered)

    for name, module in model.named_modules():
        for key, value in _attributes(module):
            if any(is_hidden(part) for part in _parts(value)):
                where = f"{name}.{key}" if name else key
                raise Unstackable(f"{where} of {type(module).__name__} holds tensors that are not registered")


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in vars(module).items() if key not in OF_EVERY_MODULE)


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value, or what lists, tuples, sets and dicts are made of."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of all layers."""
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, module in model.named_modules()
        for key, value in _attributes(module)
        if isinstance(value, PLAIN)
    }


def _why_vmap_failed(error: Exception) -> str:
    if "randomness error mode" in str(error):
        return "the model draws random numbers otherwise than by nn.Dropout layers, which K models would share"
    return f"torch.func.vmap cannot run the model: {_told(error)}"


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
