"""Averages of weights over training, by name.

Validation, the best checkpoint and the final weights use the average. The optimizer continues from the weights
themselves, which the average does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SLOWNESS = 10  # of the decay's warm-up: an average of n weights forgets at least 9 / (10 + n) of itself


def _all(_count: int) -> float:
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Which weights are averaged, and how much each counts."""

    every: Literal["step", "epoch"] | None = None  # None: no average
    share: Callable[[int], float] = _all  # count of averaged weights, from 1 -> share of the newest in the average
    start: float = 0.0  # share of the run's epochs before the first weights are taken
    fresh_statistics: bool = False  # whether batch norm's statistics are computed anew instead of averaged

    def has_begun(self, epoch: int, epochs: int) -> bool:
        """Return whether the weights of this epoch, from 1, of a run of `epochs` epochs are taken."""
        return epoch > self.start * epochs


def none() -> Averaging:
    """Build no average: validation uses the trained weights."""
    return Averaging()


def ema(*, decay: Annotated[float, Ge(0), Lt(1)] = 0.999, warm_up: bool = True) -> Averaging:
    """Build the exponential moving average of the weights after each step (Polyak & Juditsky 1992; Tarvainen & Valpola 2017).

    After each step: average = decay * average + (1 - decay) * weights. It starts with the weights after the first step.
    Floating-point buffers, such as batch norm's running statistics, are averaged too. Other buffers, such as counters,
    are copied from the newest weights.

    Args:
        decay: share of the average that a step keeps.
        warm_up: whether the decay is at most (1 + n) / (10 + n) after n weights, as in TensorFlow's
            ExponentialMovingAverage. So the average soon forgets early weights.
    """

    def share(count: int) -> float:
        before = count - 1
        kept = min(decay, (1 + before) / (SLOWNESS + before)) if warm_up else decay
        return 1.0 - kept if before else 1.0

    return Averaging(every="step", share=share)


def swa(*, start: Annotated[float, Ge(0), Lt(1)] = 0.75) -> Averaging:
    """Build stochastic weight averaging (Izmailov et al. 2018): the mean of the weights at the ends of epochs.

    After each epoch one pass over its batches, without augmentation, computes batch norm's statistics for the average.

    Args:
        start: share of the run's epochs before the average begins. Until then validation uses the trained weights.
    """
    return Averaging(every="epoch", share=lambda count: 1 / count, start=start, fresh_statistics=True)


AVERAGINGS: dict[str, Callable[..., Averaging]] = {"none": none, "ema": ema, "swa": swa}
NONE = none()


@dataclass(frozen=True)
class Pairs:
    """Averages, each with the tensor that it averages."""

    averages: list[Tensor]
    newest: list[Tensor]
    copies: list[Tensor]  # copies of the tensors that are not floating-point
    originals: list[Tensor]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Pairs:
        real: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for average, newest in pairs:
            (real if average.is_floating_point() else others).append((average, newest.detach()))
        return cls(*([pair[side] for pair in pairs] for pairs in (real, others) for side in (0, 1)))

    @torch.no_grad()
    def take(self, share: float) -> None:
        """Move the averages by this share towards the newest tensors, and update the copies."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self.newest, share)
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)


class Average:
    """The average of one run's weights and buffers."""

    def __init__(self, averaging: Averaging, model: nn.Module, epochs: int) -> None:
        self.averaging = averaging
        self.count = 0  # number of weights in the average
        self.values = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self.norms_anew = averaging.fresh_statistics and any(map(_has_statistics, model.modules()))
        self._epochs = epochs

    def pairs(self, model: nn.Module) -> Pairs:
        """Return the pairs for `take`. They stay valid while the model and this average keep their tensors."""
        newest = _tensors(model)
        return Pairs.of((average, newest[name]) for name, average in self.values.items())

    def takes_step(self, epoch: int) -> bool:
        """Return whether the weights after each step of this epoch, from 1, are taken."""
        return self.averaging.every == "step" and self.averaging.has_begun(epoch, self._epochs)

    def takes_epoch(self, epoch: int) -> bool:
        """Return whether the weights at the end of this epoch, from 1, are taken."""
        return self.averaging.every == "epoch" and self.averaging.has_begun(epoch, self._epochs)

    def take(self, pairs: Pairs) -> None:
        """Take the newest weights into the average."""
        self.count += 1
        pairs.take(self.averaging.share(self.count))

    @contextmanager
    def shown_in(self, model: nn.Module) -> Iterator[None]:
        """Put the average into a model during the context. Nothing changes before the first weights are taken."""
        if not self.count:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        _write(model, self.values)
        try:
            yield
        finally:
            _write(model, own)

    @torch.no_grad()
    def compute_statistics(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Compute batch norm's statistics for the average from batches.

        Call it within `shown_in`, with the model in train mode. Unlike torch.optim.swa_utils.update_bn it leaves frozen
        norms in eval mode.

        Args:
            model: the model, which holds the average.
            batches: what the model takes.
        """
        moving = {module: module.momentum for module in model.modules() if _has_statistics(module) and module.training}
        try:
            for module in moving:
                module.reset_running_stats()
                module.momentum = None  # None: the mean over all batches
            for inputs in batches:
                model(inputs)
        finally:
            for module, momentum in moving.items():
                module.momentum = momentum
        for name, buffer in model.named_buffers():
            self.values[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return count and values. The tensors are not copied."""
        return {"count": self.count, "values": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this average."""
        self.count = state["count"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def judged_weights(model: nn.Module, average: Average | None) -> dict[str, Tensor]:
    """Return a model's state dict, with the average's tensors if there is an average."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if average is None or not average.count:
        return state
    names = {tensor: name for name, tensor in _tensors(model).items()}
    for name, tensor in _tensors(model, remove_duplicate=False).items():
        if name in state:  # some buffers are not persistent
            state[name] = average.values[names[tensor]]
    return state


def _tensors(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name."""
    parameters = model.named_parameters(remove_duplicate=remove_duplicate)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=remove_duplicate))}


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(values[name])


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
