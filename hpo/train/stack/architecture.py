"""The digest of an architecture: models of one stack must be equal in all that a forward pass depends on, except weights.

Dropout's p is left out, since a stack keeps one for each model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import nn

from hpo.models import Dropout
from hpo.models.drawing import DRAWING

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # torch's own attributes of a module


def digest(model: nn.Module, *more: object) -> str:
    """Return a digest of a model's architecture and of further values.

    Two models of equal digest have the same modules, with the same names and attributes, and parameters and buffers of
    the same shapes and types. Attributes are compared by their repr. If a repr contains an address, each model has a
    different digest.

    Args:
        more: values that must be equal too, compared by their repr.
    """
    lines = [*_described(model), *map(repr, more)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _described(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"{name}: {_kind(module)} {sorted(_attributes(module))}"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"{name}: {list(parameter.shape)} {parameter.dtype} {parameter.requires_grad}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"{name}: {list(buffer.shape)} {buffer.dtype}"


def _kind(module: nn.Module) -> str:
    """Return the name of a module's type. Ours has no `hpo.` in front, as in parked trials of older versions."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith("models."):
        return f"user:{name}"  # a user's own `models.py`, kept apart from our `hpo.models`
    return name.removeprefix("hpo.") if name.startswith("hpo.models.") else name


def _attributes(module: nn.Module) -> Iterator[str]:
    left_out = (
        {"p", "generator", "masks"}
        if isinstance(module, Dropout)
        else {"generator"}
        if isinstance(module, DRAWING)
        else set()
    )
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and name not in left_out:
            yield f"{name}={value!r}"
