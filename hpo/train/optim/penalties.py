"""L1 and L2 penalties on the loss, and a bound on the norm of each unit's incoming weights.

They act on weights, the parameters of two or more dimensions, but not on biases nor on scales and shifts of norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from hpo.models.tables import CategoryEmbedding, NumberEmbedding
from hpo.models.tokens import TokenEmbedding

EMBEDDINGS = (CategoryEmbedding, NumberEmbedding, TokenEmbedding)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """The strengths of the penalties and the bound.

    The penalties are `l1 * sum |w| + l2 / 2 * sum w**2` over all weights w. So l2 adds the same to the gradient as
    coupled weight decay of this value. They are added to the gradient before it is clipped. Reported losses do not
    include them.

    `max_norm` bounds the 2-norm of a unit's incoming weights. After each step longer ones are scaled down to it
    (Srivastava et al. 2014). Units are the outputs of linear layers and the output channels of convolutions.
    """

    l1: float = 0.0
    l2: float = 0.0
    max_norm: float | None = None

    def targets(self, model: nn.Module, trained: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, int]]]:
        """Return the arguments of `add_to_gradients` and of `bound` for a model, empty where they would do nothing.

        Args:
            model: the model.
            trained: the parameters that the optimizer trains.
        """
        weights = weights_of(model, trained) if self != NONE else {}  # spares a walk over all modules
        units = units_of(model, trained) if self.max_norm is not None else {}
        return list(weights.values()), [(weights[name], dimension) for name, dimension in units.items()]

    @torch.no_grad()
    def add_to_gradients(self, weights: Iterable[Tensor]) -> None:
        """Add the gradient of the penalties to the weights' gradients. Weights without a gradient are skipped."""
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
        """Scale units that are longer than `max_norm` down to it.

        Args:
            units: pairs of a weight and the dimension that counts its units.
        """
        if self.max_norm is not None:
            for weight, dimension in units:
                weight.renorm_(2, dimension, self.max_norm)


NONE = Penalties()


def weights_of(model: nn.Module, trained: Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Return the weights among a model's trained parameters, by name."""
    owned = set(trained)
    of_norms = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    known = model.named_parameters()
    return {name: p for name, p in known if p.ndim >= 2 and p.requires_grad and p in owned and p not in of_norms}


def units_of(model: nn.Module, trained: Iterable[Tensor]) -> dict[str, int]:
    """Return the dimension that counts the units of a weight, by name. Our embeddings and class tokens have no units."""
    found = {}
    for name in weights_of(model, trained):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if "weight" in own and not isinstance(module, EMBEDDINGS):
            found[name] = int(isinstance(module, _ConvTransposeNd))
    return found
