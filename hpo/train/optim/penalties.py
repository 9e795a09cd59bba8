"""What keeps weights small: penalties on the loss, and a bound on the norm of what comes into each unit.

Weights are parameters of two dimensions or more: biases, and the scales and shifts of norms, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How weights are kept small.

    The penalties are `l1 * sum |w| + l2 / 2 * sum w**2` over all weights w: what l2 adds to the gradient is what coupled weight
    decay of the same number adds. Losses are told without them; the gradient has them before it is clipped.

    `max_norm` is the most that the 2-norm of a unit's incoming weights may be; after each step longer ones are scaled
    down to it (Srivastava et al. 2014). Units are outputs of linear layers and channels of convolutions.
    """

    l1: float = 0.0
    l2: float = 0.0
    max_norm: float | None = None

    def targets(self, model: nn.Module, trained: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, int]]]:
        """Return which of a model's trained parameters `add_to_gradients` and `bound` are given; none where they do nothing."""
        weights = weights_of(model, trained) if self != NONE else {}  # told by walking over all modules
        units = units_of(model, trained) if self.max_norm is not None else {}
        return list(weights.values()), [(weights[name], dimension) for name, dimension in units.items()]

    @torch.no_grad()
    def add_to_gradients(self, weights: Iterable[Tensor]) -> None:
        """Add the penalties' gradient to that of weights; those without one are left alone."""
        if not (self.l1 or self.l2):
            return
        pairs = [(weight, weight.grad) for weight in weights if weight.grad is not None]
        if not pairs:
            return
        found, gradients = (list(tensors) for tensors in zip(*pairs, strict=True))
        if self.l2:
            torch._foreach_add_(gradients, found, alpha=self.l2)
        if self.l1:
            torch._foreach_add_(gradients, torch._foreach_sign(found), alpha=self.l1)

    @torch.no_grad()
    def bound(self, units: Iterable[tuple[Tensor, int]]) -> None:
        """Scale long units of weights down, each weight with the dimension of its units."""
        if self.max_norm is not None:
            for weight, dimension in units:
                weight.renorm_(2, dimension, self.max_norm)


NONE = Penalties()


def weights_of(model: nn.Module, trained: Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Return by name those of a model's trained parameters that are weights."""
    owned = set(trained)
    of_norms = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    known = model.named_parameters()
    return {name: p for name, p in known if p.ndim >= 2 and p.requires_grad and p in owned and p not in of_norms}


def units_of(model: nn.Module, trained: Iterable[Tensor]) -> dict[str, int]:
    """Return by name of those weights that have units the dimension along which these lie: embeddings and tokens have none."""
    found = {}
    for name in weights_of(model, trained):
        owner, _, own = name.rpartition(".")
        if "weight" in own:
            found[name] = int(isinstance(model.get_submodule(owner), _ConvTransposeNd))
    return found
