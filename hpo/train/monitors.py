"""What is watched of a run beside its losses and its accuracy: norms of parameters and gradients, the gradients' noise.

All of it is sums over the steps of an epoch, kept on the device. Gradients are those of whole batches, penalties
included, before clipping.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORM, SQUARE, PRODUCT = range(3)  # what is summed up: |g|, |g|^2, g * (the g of the step before)
SUMS = 3


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a run is asked to measure; nothing of it changes what it trains to."""

    metrics: tuple[str, ...] = ()  # of the validation part, beside loss and accuracy
    norms: bool = False
    noise: bool = False
    resources: bool = False
    by_step: bool = False  # loss and norms of every step, for whoever reads `StepMonitor.steps` between epochs

    @property
    def gradients(self) -> bool:
        """Whether something has to be done in every step."""
        return self.norms or self.noise or self.by_step


class StepMonitor:
    """What has been measured of one run's steps in the epoch under way."""

    def __init__(self, watch: Watch, parameters: Mapping[str, Tensor], device: torch.device) -> None:
        """Watch the gradients of these parameters, by name."""
        self.watch = watch
        self.parameters = parameters
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=device)
        self.before: dict[str, Tensor] = {}  # the gradient of the step before; a stack keeps it in a row of its own
        self.steps: list[Tensor] = []  # by step: losses so far, norm of the gradient, of the parameters before the step

    def begin(self) -> None:
        """Begin an epoch."""
        self.sums.zero_()
        self.before, self.steps = {}, []

    def keep_in(self, place: Tensor) -> None:
        """Let the sums be in this place from now on."""
        place.copy_(self.sums)
        self.sums = place

    @torch.no_grad()
    def take(self, losses: Tensor) -> None:
        """Measure a step, between the backward pass and whatever is done to the gradients.

        Args:
            losses: the sum of the epoch's losses so far, without dimensions.
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
        """Return the 2-norm of the parameters that are trained."""
        return norm_of([p.detach() for p in self.parameters.values() if p.requires_grad])

    def trajectory(self) -> list[list[float]]:
        """Return of each step of the epoch its loss, the gradient's norm, and the parameters' before it."""
        if not self.steps:
            return []
        found = torch.stack(self.steps)
        found[1:, 0] -= found[:-1, 0].clone()
        steps: list[list[float]] = found.tolist()
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on amid an epoch."""
        return {"sums": self.sums, "before": dict(self.before), "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, which is not written to later."""
        self.sums.copy_(state["sums"])
        self.before = {name: tensor.clone() for name, tensor in state["before"].items()}
        self.steps = list(state["steps"])


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm over all elements of all tensors, float64 without dimensions."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)))
    return norm


def of_gradients(
    watch: Watch, sums: Sequence[float], parameter_norm: float, *, steps: int, batch_size: int
) -> dict[str, float]:
    """Return what an epoch's sums come to, by name.

    `gradient_variance` is the trace of the covariance of minibatch gradients, `noise_scale` that of single images over the
    squared length of the true gradient, in images: the simple noise scale B = tr(S) / |G|^2 (McCandlish et al., An Empirical
    Model of Large-Batch Training, 2018, appendix A.1). Its two unbiased estimates, from batches of B and 2 B images, come
    to |G|^2 = g1 * g2 and tr(S) = B * (|g|^2 - g1 * g2), each averaged over an epoch's steps before they are divided; g1 and
    g2 are the gradients of successive steps, between which the weights move by one update. Not a number for a single step
    or where the estimate of |G|^2 is not above 0.
    """
    found = {"gradient_norm": sums[NORM] / steps, "parameter_norm": parameter_norm} if watch.norms else {}
    if watch.noise:
        squared = sums[PRODUCT] / (steps - 1) if steps > 1 else math.nan
        variance = sums[SQUARE] / steps - squared
        found["gradient_variance"] = variance
        found["noise_scale"] = batch_size * variance / squared if squared > 0 else math.nan
    return found


def of_resources(device: torch.device, images: int, seconds: float) -> dict[str, float]:
    """Return training images a second and the most memory so far, in MiB: of the GPU, else of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"images_per_second": images / seconds if seconds > 0 else math.nan, "peak_memory_mb": peak}
