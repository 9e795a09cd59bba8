"""Optimizers by name; every keyword-only parameter of a function is an option of the optimizer.

Each is torch's own, in its fused form where this torch has one for the parameters, else in its foreach form:
torch's default on a CPU is a Python loop over the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop


def sgd(
    params: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Build stochastic gradient descent with momentum (Sutskever et al. 2013); nesterov is idle while
    momentum is 0.
    """
    optimizer = _fastest(SGD, params, lr=lr, weight_decay=weight_decay, momentum=momentum)
    # Not through the constructor: it refuses momentum 0, where a schedule may yet cycle the momentum.
    for group in optimizer.param_groups:
        group["nesterov"] = nesterov
    return optimizer


def rmsprop(
    params: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    alpha: Annotated[float, Ge(0), Lt(1)] = 0.99,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build RMSprop (Tieleman & Hinton 2012); alpha is the decay of the mean square."""
    return _fastest(RMSprop, params, lr=lr, weight_decay=weight_decay, momentum=momentum, alpha=alpha, eps=eps)


def adam(
    params: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build Adam (Kingma & Ba 2015); weight decay is added to the gradient."""
    return _fastest(Adam, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.01,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build Adam with decoupled weight decay (Loshchilov & Hutter 2019): each step shrinks weights by lr *
    weight_decay.
    """
    return _fastest(AdamW, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def adagrad(
    params: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    eps: Annotated[float, Gt(0)] = 1e-10,
) -> Optimizer:
    """Build Adagrad (Duchi et al. 2011)."""
    return _fastest(Adagrad, params, lr=lr, weight_decay=weight_decay, eps=eps)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "adagrad": adagrad,
}


def _fastest(kind: Callable[..., Optimizer], params: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    params = list(params)
    if all(_has_fused(kind, p.device.type, p.dtype) for p in params):
        return kind(params, fused=True, **options)
    return kind(params, foreach=True, **options)


@cache
def _has_fused(kind: Callable[..., Optimizer], device_type: str, dtype: torch.dtype) -> bool:
    """Ask torch by taking one step: kernels differ between versions, devices and number types."""
    probe = nn.Parameter(torch.zeros(1, device=device_type, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=1.0, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; no such kernel
        return False
    return True
