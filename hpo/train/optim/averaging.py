"""Averages of weights over training by name: validation, the best checkpoint and what is kept in the end are the average's.

The optimizer goes on from the weights themselves, which the average does not touch.
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

SLOWNESS = 10  # of the decay's warm-up: what is forgotten of an average of n is 9 / (10 + n) then


def _all(_count: int) -> float:
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Which weights are averaged, and how much each counts."""

    every: Literal["step", "epoch"] | None = None  # None: no average is made
    share: Callable[[int], float] = _all  # of the newest in an average of so many, from 1, of which it is all
    start: float = 0.0  # share of the run's epochs before the first is taken
    fresh_statistics: bool = False  # batch norm's are computed anew for the average, not averaged

    def has_begun(self, epoch: int, epochs: int) -> bool:
        """Return whether the weights of an epoch, from 1, of so many are taken."""
        return epoch > self.start * epochs


def none() -> Averaging:
    """Build no average: the weights are judged as they are trained."""
    return Averaging()


def ema(*, decay: Annotated[float, Ge(0), Lt(1)] = 0.999, warm_up: bool = True) -> Averaging:
    """Build the exponential moving average of the weights after each step (Polyak & Juditsky 1992; Tarvainen & Valpola 2017).

    Each step, decay of the average is kept and the weights give the rest; the first ones are taken whole. With warm_up,
    after so many weights it is at most (1 + count) / (10 + count), as TensorFlow's ExponentialMovingAverage has it, so that the
    early ones are forgotten soon. Buffers of real numbers, such as batch norm's running statistics, are averaged
    alike; others, such as counters, are those of the newest weights.
    """

    def share(count: int) -> float:
        before = count - 1
        kept = min(decay, (1 + before) / (SLOWNESS + before)) if warm_up else decay
        return 1.0 - kept if before else 1.0

    return Averaging(every="step", share=share)


def swa(*, start: Annotated[float, Ge(0), Lt(1)] = 0.75) -> Averaging:
    """Build stochastic weight averaging (Izmailov et al. 2018): the plain mean of the weights at the ends of epochs.

    Epochs count from this share of all of them on; before, the weights are judged as they are. Batch norm's statistics
    are computed anew for the average, by one pass over the epoch's batches, without augmentation, each epoch.
    """
    return Averaging(every="epoch", share=lambda count: 1 / count, start=start, fresh_statistics=True)


AVERAGINGS: dict[str, Callable[..., Averaging]] = {"none": none, "ema": ema, "swa": swa}
NONE = none()


@dataclass(frozen=True)
class Pairs:
    """Averages, and beside each what it is the average of."""

    averages: list[Tensor]
    newest: list[Tensor]
    copies: list[Tensor]  # of what has no mean
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
        """Take the newest into the averages, of which it is then this share."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self.newest, share)
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)


class Average:
    """The average of one run's weights and buffers."""

    def __init__(self, averaging: Averaging, model: nn.Module, epochs: int) -> None:
        self.averaging = averaging
        self.count = 0  # weights that were taken
        self.values = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self.norms_anew = averaging.fresh_statistics and any(map(_has_statistics, model.modules()))
        self._epochs = epochs

    def pairs(self, model: nn.Module) -> Pairs:
        """Return what `take` takes, for as long as neither the model's tensors nor these are exchanged."""
        newest = _tensors(model)
        return Pairs.of((average, newest[name]) for name, average in self.values.items())

    def takes_step(self, epoch: int) -> bool:
        """Return whether the weights after a step of an epoch, from 1, are taken."""
        return self.averaging.every == "step" and self.averaging.has_begun(epoch, self._epochs)

    def takes_epoch(self, epoch: int) -> bool:
        """Return whether the weights at the end of an epoch, from 1, are taken."""
        return self.averaging.every == "epoch" and self.averaging.has_begun(epoch, self._epochs)

    def take(self, pairs: Pairs) -> None:
        """Take the newest weights."""
        self.count += 1
        pairs.take(self.averaging.share(self.count))

    @contextmanager
    def shown_in(self, model: nn.Module) -> Iterator[None]:
        """Let a model have the average for a while, if there is one."""
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
    def compute_statistics(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Compute batch norm's statistics for the average, which the model, in train mode, has just now, from batches of images.

        As torch.optim.swa_utils.update_bn does, which puts norms that are kept in eval mode, frozen ones, back into train mode.
        """
        moving = {module: module.momentum for module in model.modules() if _has_statistics(module) and module.training}
        try:
            for module in moving:
                module.reset_running_stats()
                module.momentum = None  # the mean over all batches
            for images in batches:
                model(images)
        finally:
            for module, momentum in moving.items():
                module.momentum = momentum
        for name, buffer in model.named_buffers():
            self.values[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return count and values; the tensors are the average's own."""
        return {"count": self.count, "values": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, which is copied."""
        self.count = state["count"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def judged_weights(model: nn.Module, average: Average | None) -> dict[str, Tensor]:
    """Return a model's state dict with the average, if there is one, in the place of what it is the average of."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if average is None or not average.count:
        return state
    names = {tensor: name for name, tensor in _tensors(model).items()}
    for name, tensor in _tensors(model, remove_duplicate=False).items():
        if name in state:  # some buffers are not kept
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
