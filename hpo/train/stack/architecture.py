"""What must be equal of models for one stack to hold them: all that their forward pass may depend on, but the weights.

Dropout's p is left out, since a stack keeps it per model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import nn

from hpo.models import Dropout
from hpo.models.drawing import DRAWING

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that torch keeps itself


def digest(model: nn.Module, *more: object) -> str:
    """Return a digest of a model's architecture and of whatever else must be equal.

    Two models of equal digest have the same modules under the same names, with the same attributes, and parameters and buffers
    of the same shapes and types. Attributes count by their repr, so where that names an address each model has a digest of
    its own.
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
    """Return a module's type by its name; ours without `hpo.`, since parked trials of older versions have stored it so."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith("models."):
        return f"user:{name}"  # a file `models.py` of the user's own, which is no longer taken for ours
    return name.removeprefix("hpo.") if name.startswith("hpo.models.") else name


def _attributes(module: nn.Module) -> Iterator[str]:
    left_out = (
        {"p", "generator"} if isinstance(module, Dropout) else {"generator"} if isinstance(module, DRAWING) else set()
    )
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and name not in left_out:
            yield f"{name}={value!r}"
