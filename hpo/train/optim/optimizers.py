"""Optimizers by name. The keyword-only parameters of a function are the options of the optimizer.

Each function takes parameters or parameter groups, see `param_groups.py`. It builds torch's own optimizer where torch
has one. It uses the fused form if this torch has one for the parameters, else the foreach form. Torch's default on a
CPU is a Python loop.

Weight decay is coupled by default: it is added to the gradient. Decoupled weight decay multiplies the weights by
1 - lr * weight_decay in each step, and changes neither gradient nor momentum (Loshchilov & Hutter 2019).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hpo.train.optim.muon import MuonWithAdamW
from hpo.train.optim.param_groups import Group, Params, grouped, joined
from hpo.train.optim.sgdw import SGDW


def sgd(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
) -> Optimizer:
    """Build stochastic gradient descent with momentum (Sutskever et al. 2013).

    Args:
        nesterov: whether Nesterov's momentum is used. It has no effect while momentum is 0.
        decoupled: whether weight decay is decoupled.
    """
    optimizer = _fastest(SGDW if decoupled else SGD, params, lr=lr, weight_decay=weight_decay, momentum=momentum)
    # The constructor would refuse nesterov with momentum 0, but a schedule may still cycle the momentum.
    for group in optimizer.param_groups:
        group["nesterov"] = nesterov
    return optimizer


def rmsprop(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    alpha: Annotated[float, Ge(0), Lt(1)] = 0.99,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build RMSprop (Tieleman & Hinton 2012).

    Args:
        alpha: decay of the mean square.
    """
    return _fastest(RMSprop, params, lr=lr, weight_decay=weight_decay, momentum=momentum, alpha=alpha, eps=eps)


def adam(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
    decoupled: bool = False,
) -> Optimizer:
    """Build Adam (Kingma & Ba 2015).

    Args:
        decoupled: whether weight decay is decoupled: AdamW with Adam's defaults.
    """
    return _fastest(
        AdamW if decoupled else Adam, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps
    )


def adamw(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.01,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return _fastest(AdamW, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def adagrad(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    eps: Annotated[float, Gt(0)] = 1e-10,
) -> Optimizer:
    """Build Adagrad (Duchi et al. 2011)."""
    return _fastest(Adagrad, params, lr=lr, weight_decay=weight_decay, eps=eps)


def adamax(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build Adamax: Adam with an exponentially weighted maximum in place of the mean square (Kingma & Ba 2015)."""
    return _fastest(Adamax, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def nadam(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
    momentum_decay: Annotated[float, Ge(0)] = 4e-3,
    decoupled: bool = False,
) -> Optimizer:
    """Build NAdam: Adam with Nesterov's momentum (Dozat 2016).

    Args:
        momentum_decay: how fast momentum grows to beta1.
        decoupled: whether weight decay is decoupled.
    """
    own: dict[str, Any] = {"momentum_decay": momentum_decay, "decoupled_weight_decay": decoupled}
    return _fastest(NAdam, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, **own)


def radam(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
    decoupled: bool = False,
) -> Optimizer:
    """Build RAdam: Adam without an adaptive rate until the variance of that rate is tractable (Liu et al. 2020).

    Args:
        decoupled: whether weight decay is decoupled.
    """
    own: dict[str, Any] = {"decoupled_weight_decay": decoupled}
    return _fastest(RAdam, params, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, **own)


def muon(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.1,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
    nesterov: bool = True,
    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Optimizer:
    """Build Muon for two-dimensional parameters (Jordan et al. 2024), and AdamW for all others, such as convolutions.

    Muon's steps are orthogonal matrices. Both share learning rate and decoupled weight decay. ValueError if no
    parameter has two dimensions.

    Args:
        ns_steps: Newton-Schulz iterations per step.
        adjust_lr_fn: scale of Muon's steps. `match_rms_adamw`: as large as AdamW's, so a learning rate for AdamW fits
            (Liu et al. 2025, "Muon is Scalable"). `original`: Jordan's scale, for which it does not.
        beta1: of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
    """
    both = {"lr": lr, "weight_decay": weight_decay}
    own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
    groups = _groups(params, weight_decay)
    adamw = {**both, "betas": (beta1, beta2), "eps": eps, _fastest_form(AdamW, groups): True}
    return MuonWithAdamW(groups, {**both, **own}, adamw)


def soap(
    params: Params,
    *,
    lr: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)] = 0.01,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.95,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
    eps: Annotated[float, Gt(0)] = 1e-8,
    precondition_frequency: Annotated[int, Ge(1)] = 10,
    max_precondition_dim: Annotated[int, Ge(1)] = 10_000,
) -> Optimizer:
    """Build pytorch-optimizer's SOAP: Adam in the eigenbases of Shampoo's preconditioners (Vyas et al. 2024).

    The first step only collects statistics and changes no weight. Weight decay is decoupled.

    Args:
        precondition_frequency: steps between two updates of the eigenbases.
        max_precondition_dim: largest dimension of a parameter that gets an eigenbasis.
    """
    from pytorch_optimizer import SOAP  # here, since the package is an extra and has a hundred optimizers

    return SOAP(
        _groups(params, weight_decay),
        lr=lr,
        weight_decay=weight_decay,
        betas=(beta1, beta2),
        eps=eps,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=max_precondition_dim,
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "adagrad": adagrad,
    "adamax": adamax,
    "nadam": nadam,
    "radam": radam,
    "muon": muon,
    "soap": soap,
}
NEEDS = {"soap": "soap"}  # optimizer -> the extra that it needs
#: By class of an optimizer: why its runs are not trained in a stack.
ALONE = {"SOAP": "soap's eigenbases of matrices without full rank depend on the last bit"}


def _fastest(
    kind: Callable[..., Optimizer], params: Params, *, lr: float, weight_decay: float, **options: Any
) -> Optimizer:
    groups = _groups(params, weight_decay)
    form: dict[str, Any] = {_fastest_form(kind, groups): True}
    return kind(groups, lr=lr, weight_decay=weight_decay, **options, **form)


def _groups(params: Params, weight_decay: float) -> list[Group]:
    return grouped(params) if weight_decay else joined(params)


def _fastest_form(kind: Callable[..., Optimizer], groups: list[Group]) -> Literal["fused", "foreach"]:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if kind in (SGD, SGDW) and not all(parameter.requires_grad for parameter in parameters):
        return "foreach"  # the fused form needs a momentum for all parameters or none; unfrozen layers have none yet
    return "fused" if all(_has_fused(kind, p.device.type, p.dtype) for p in parameters) else "foreach"


@cache
def _has_fused(kind: Callable[..., Optimizer], device_type: str, dtype: torch.dtype) -> bool:
    """Return whether torch has a fused kernel, by taking one step: kernels differ by version, device and dtype."""
    probe = nn.Parameter(torch.zeros(1, device=device_type, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer = kind([probe], lr=1.0, fused=True)
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(optimizer)  # the wrapped step would load the compiler, see below
    except (TypeError, RuntimeError):  # no such argument, or no such kernel
        return False
    return True


def load_compiler() -> None:
    """Load torch's compiler, which an optimizer's first step would load, so that no epoch's time includes it."""
    importlib.import_module("torch._dynamo")


def _spare_the_compiler() -> None:
    """Keep optimizers from loading torch's compiler when they are built, which takes more than a second.

    An optimizer loads the compiler only to exclude these methods from compilation. torch keeps the excluded form of a
    method in this attribute, so the methods are their own excluded form here. If a version of torch does not read the
    attribute, the compiler is loaded as usual. A stack's steps do not need the compiler.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict, Optimizer.zero_grad):
        plain = inspect.unwrap(method)
        plain.__dynamo_disable = plain


_spare_the_compiler()
