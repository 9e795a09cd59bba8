"""Monitors of a run: norms of parameters and gradients, noise of gradients.

They keep sums over the steps of an epoch on the device. Gradients are those of whole batches, with penalties and before
clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpo.train import devices

NORM, SQUARE, PRODUCT = range(3)  # places of the sums of |g|, |g|^2, and g * (g of the previous step)
SUMS = 3


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a run measures. It does not change the trained weights."""

    metrics: tuple[str, ...] = ()  # validation metrics other than loss and accuracy
    norms: bool = False
    noise: bool = False
    resources: bool = False
    by_step: bool = False  # whether `StepMonitor.steps` keeps loss and norms of every step of the epoch

    @property
    def gradients(self) -> bool:
        """Whether something is measured in every step."""
        return self.norms or self.noise or self.by_step


class StepMonitor:
    """The measurements of one run's steps in the current epoch."""

    def __init__(self, watch: Watch, parameters: Mapping[str, Tensor], device: torch.device) -> None:
        """Watch these parameters, given by name."""
        self.watch = watch
        self.parameters = parameters
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=device)
        self.before: dict[str, Tensor] = {}  # gradient of the previous step; a stack keeps it in a row instead
        self.steps: list[Tensor] = []  # by step: sum of losses, norm of the gradient, norm of the parameters before it

    def begin(self) -> None:
        """Begin an epoch. Its sums are cleared by the caller."""
        self.before, self.steps = {}, []

    def keep_in(self, place: Tensor) -> None:
        """Move the sums into this tensor."""
        place.copy_(self.sums)
        self.sums = place

    @torch.no_grad()
    def take(self, losses: Tensor) -> None:
        """Measure a step, between the backward pass and clipping.

        Args:
            losses: sum of the epoch's losses so far, a tensor without dimensions.
        """
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = norm_of(list(found.values()))
        self.sums[NORM] += norm
        self.sums[SQUARE] += norm.square()
        if self.watch.noise:
            for name, gradient in found.items():
                if name in self.before:
                    self.sums[PRODUCT] += (gradient * self.before[name]).sum(dtype=torch.float64)
                    self.before[name].copy_(gradient)
                else:
                    self.before[name] = gradient.clone()
        if self.watch.by_step:
            self.steps.append(torch.stack([losses, norm, self.parameter_norm()]))

    def parameter_norm(self) -> Tensor:
        """Return the 2-norm of the trained parameters."""
        return norm_of([p.detach() for p in self.parameters.values() if p.requires_grad])

    def trajectory(self) -> list[list[float]]:
        """Return loss, norm of the gradient, and norm of the parameters before the step, for each step of the epoch."""
        if not self.steps:
            return []
        found = torch.stack(self.steps)
        found[1:, 0] -= found[:-1, 0].clone()
        steps: list[list[float]] = found.tolist()
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue within an epoch."""
        return {"sums": self.sums, "before": dict(self.before), "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state. It is not written to later."""
        self.sums.copy_(state["sums"])
        self.before = {name: tensor.clone() for name, tensor in state["before"].items()}
        self.steps = list(state["steps"])


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm over all elements of all tensors, a float64 tensor without dimensions."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)))
    return norm


def of_gradients(
    watch: Watch, sums: Sequence[float], parameter_norm: float, *, steps: int, batch_size: int
) -> dict[str, float]:
    """Return the gradient statistics of an epoch by name.

    `gradient_variance` is the trace of the covariance of batch gradients. `noise_scale` is the simple noise scale tr(S)
    / |G|^2 in rows, where S is the covariance of single rows' gradients and G the true gradient (McCandlish et al.,
    An Empirical Model of Large-Batch Training, 2018, appendix A.1). The unbiased estimates, from batches of B and 2 B
    rows, are |G|^2 = g1 * g2 and tr(S) = B * (|g|^2 - g1 * g2), where g1 and g2 are the gradients of successive
    steps. Between these the weights move by one update. Each estimate is averaged over an epoch's steps before the
    division. The result is NaN for a single step, and the noise scale also if the estimate of |G|^2 is not above 0.

    Args:
        sums: sums of the epoch's steps, by NORM, SQUARE and PRODUCT.
        parameter_norm: 2-norm of the trained parameters.
        steps: steps of the epoch.
        batch_size: rows per batch.
    """
    found = {"gradient_norm": sums[NORM] / steps, "parameter_norm": parameter_norm} if watch.norms else {}
    if watch.noise:
        squared = sums[PRODUCT] / (steps - 1) if steps > 1 else math.nan
        variance = sums[SQUARE] / steps - squared
        found["gradient_variance"] = variance
        found["noise_scale"] = batch_size * variance / squared if squared > 0 else math.nan
    return found


def of_resources(device: torch.device, rows: int, seconds: float) -> dict[str, float]:
    """Return training examples per second and peak memory in MiB, of the GPU or else of this process."""
    return {
        "examples_per_second": rows / seconds if seconds > 0 else math.nan,
        "peak_memory_mb": devices.peak_memory_mb(device),
    }
