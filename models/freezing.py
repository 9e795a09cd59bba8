"""Frozen layers, counted from the input: frozen for good, or unfrozen one by one from the top (Howard & Ruder 2018).

A layer begins at a module with weights of two or more dimensions. The modules that follow it without such weights, such
as norms, belong to it. The last layer is the head. A model keeps its `Freezing` as an attribute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

FACTOR = "lr_factor"  # attribute of a parameter: its learning-rate multiplier, read where parameter groups are made


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """Which layers of a model are frozen at first, and when they are unfrozen."""

    frozen: int  # number of layers, from the input
    every: int | None = None  # epochs between two unfreezings; None: never
    # Learning-rate multiplier of pre-trained layers. Not in the repr, since models that differ in it share a stack.
    rate: float = field(default=1.0, repr=False)
    pretrained: int = 0  # number of layers, from the input, with this multiplier

    def frozen_in(self, epoch: int) -> int:
        """Return the number of frozen layers in an epoch, counted from 0."""
        return self.frozen if self.every is None else max(0, self.frozen - epoch // self.every)


def layers(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the layers of a model from the input to the head, each as a list of (name, module)."""
    found: list[list[tuple[str, nn.Module]]] = []
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not tensors:
            continue
        if not found or any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            found.append([])
        found[-1].append((name, module))
    return found


def freezing(model: nn.Module) -> Freezing | None:
    """Return the `Freezing` of a model, or None."""
    found = vars(model).get("freezing")
    return found if isinstance(found, Freezing) else None


def freeze(model: nn.Module, how: Freezing) -> None:
    """Freeze layers of a model and set its learning-rate multipliers; ValueError if it has too few layers."""
    count = len(layers(model))
    if how.frozen >= count:
        raise ValueError(f"freeze = {how.frozen}: the model has {count} layers; freeze at most {count - 1} of them")
    vars(model)["freezing"] = how
    _hold(model, how.frozen, resting=False)
    if how.rate != 1.0:
        for _, module in chain.from_iterable(layers(model)[: how.pretrained]):
            for parameter in module.parameters(recurse=False):
                vars(parameter)[FACTOR] = how.rate


def enter_epoch(model: nn.Module, epoch: int) -> None:
    """Freeze the layers that are frozen in an epoch, counted from 0. The model must be in train mode.

    A frozen batch norm is put into eval mode: it normalises by its running statistics and keeps them.
    """
    how = freezing(model)
    if how is not None:
        _hold(model, how.frozen_in(epoch), resting=True)


def _hold(model: nn.Module, frozen: int, *, resting: bool) -> None:
    for index, layer in enumerate(layers(model)):
        for _, module in layer:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(index >= frozen)
            if resting and index < frozen and isinstance(module, _BatchNorm):
                module.eval()


def why_alone(model: nn.Module) -> str | None:
    """Return the reason why such models cannot be trained in a stack, or None if they can."""
    how = freezing(model)
    if how is None:
        return None
    if how.every is not None and how.frozen:
        return "its layers are unfrozen one by one"
    held = [module for layer in layers(model)[: how.frozen] for _, module in layer]
    if any(isinstance(module, _BatchNorm) for module in held):
        return "its frozen batch norms keep their running statistics"
    return None
