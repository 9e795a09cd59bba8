"""Layers that are not trained, from the input on: for good, or thawed one by one from the top (Howard & Ruder 2018).

A layer is a module with weights of two dimensions or more, and what follows it without such: norms, scales. The last one
is the head. What is frozen is kept on the model, as `Freezing`; a model without is not concerned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

FACTOR = (
    "lr_factor"  # a parameter's attribute: its share of the learning rate, for whoever makes the optimizer's groups
)


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """What of a model is frozen when training begins, and what becomes of it."""

    frozen: int  # layers, from the input on
    every: int | None = None  # epochs, after each of which the last frozen layer is thawed
    # Learning rate of layers that were pre-trained, as a factor; not shown, since models that differ in it share a stack.
    rate: float = field(default=1.0, repr=False)
    pretrained: int = 0  # layers, from the input on, that this rate is for

    def frozen_in(self, epoch: int) -> int:
        """Return how many layers are frozen in an epoch, counted from 0."""
        return self.frozen if self.every is None else max(0, self.frozen - epoch // self.every)


def layers(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the layers of a model from the input on, each as modules with their names."""
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
    """Return what of a model is frozen, None if nothing was said."""
    found = vars(model).get("freezing")
    return found if isinstance(found, Freezing) else None


def freeze(model: nn.Module, how: Freezing) -> None:
    """Freeze a model so; ValueError if it has not so many layers."""
    count = len(layers(model))
    if how.frozen >= count:
        raise ValueError(f"freeze = {how.frozen}: the model has {count} layers, the last of which must be trained")
    vars(model)["freezing"] = how
    _hold(model, how.frozen, resting=False)
    if how.rate != 1.0:
        for _, module in chain.from_iterable(layers(model)[: how.pretrained]):
            for parameter in module.parameters(recurse=False):
                vars(parameter)[FACTOR] = how.rate


def enter_epoch(model: nn.Module, epoch: int) -> None:
    """Freeze what is frozen in an epoch, counted from 0, of a model that is in train mode.

    A frozen batch norm keeps its running statistics, and normalises by them.
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
    """Return why a model of this kind cannot be trained with others as one, None if it can."""
    how = freezing(model)
    if how is None:
        return None
    if how.every is not None and how.frozen:
        return "its layers are thawed one by one"
    held = [module for layer in layers(model)[: how.frozen] for _, module in layer]
    if any(isinstance(module, _BatchNorm) for module in held):
        return "its frozen batch norms keep their running statistics"
    return None
