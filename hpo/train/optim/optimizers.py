"""Optimizers by name; every keyword-only parameter of a function is an option of the optimizer.

Each takes parameters or groups of them, see `param_groups.py`. Each is torch's own where torch has it. It takes
the fused form where this torch has one for the parameters, else the foreach form. Torch's default on a CPU is a Python loop.

Weight decay is coupled where nothing is said: it is added to the gradient. Decoupled, each step shrinks weights by
lr * weight_decay instead, past gradient and momentum (Loshchilov & Hutter 2019).
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
    """Build stochastic gradient descent with momentum (Sutskever et al. 2013); nesterov is idle while
    momentum is 0.
    """
    optimizer = _fastest(SGDW if decoupled else SGD, params, lr=lr, weight_decay=weight_decay, momentum=momentum)
    # Not through the constructor: it refuses momentum 0, where a schedule may yet cycle the momentum.
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
    """Build RMSprop (Tieleman & Hinton 2012); alpha is the decay of the mean square."""
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
    """Build Adam (Kingma & Ba 2015); decoupled, it is AdamW with Adam's defaults."""
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
    """Build Adam with decoupled weight decay (Loshchilov & Hutter 2019): each step shrinks weights by lr *
    weight_decay.
    """
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
    """Build Adamax, which is Adam with the largest gradient of late in place of the mean square (Kingma & Ba 2015)."""
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
    """Build NAdam, which is Adam with Nesterov's momentum (Dozat 2016); momentum grows to beta1, the faster the larger
    momentum_decay is.
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
    """Build RAdam, which is Adam without an adaptive rate until its variance is known (Liu et al. 2020)."""
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
    """Build Muon, whose steps are orthogonal matrices (Jordan et al. 2024), for parameters of two dimensions, and AdamW, by
    beta1, beta2 and eps, for the others, convolutions among them.

    Both have one learning rate and one decoupled weight decay. With "match_rms_adamw" the steps of both are of one size (Liu
    et al. 2025, "Muon is Scalable"), so a learning rate for AdamW serves; with "original" they are not.
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
    """Build SOAP, which is Adam in the eigenbases of Shampoo's preconditioners (Vyas et al. 2024), from pytorch-optimizer.

    The bases are brought up to date every precondition_frequency steps, those of dimensions up to max_precondition_dim. The
    first step only gathers. Weight decay is decoupled.
    """
    from pytorch_optimizer import SOAP  # an extra, and a package of a hundred optimizers

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
NEEDS = {
    "soap": ("pytorch_optimizer", "soap")
}  # by optimizer: the package that it needs, and the extra that installs it
#: Why a run of such an optimizer is not trained together with others, by the optimizer's class.
ALONE = {"SOAP": "soap's eigenbases of matrices that are not of full rank turn on the last bit"}


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
        return "foreach"  # the fused form wants momenta of all or of none, and layers that are thawed have none yet
    return "fused" if all(_has_fused(kind, p.device.type, p.dtype) for p in parameters) else "foreach"


@cache
def _has_fused(kind: Callable[..., Optimizer], device_type: str, dtype: torch.dtype) -> bool:
    """Ask torch by taking one step: kernels differ between versions, devices and number types."""
    probe = nn.Parameter(torch.zeros(1, device=device_type, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer = kind([probe], lr=1.0, fused=True)
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(optimizer)  # as the step that is wrapped loads the compiler, see below
    except (TypeError, RuntimeError):  # no such argument; no such kernel
        return False
    return True


def load_compiler() -> None:
    """Load what an optimizer's own step loads at its first time, so that no epoch is charged with that."""
    importlib.import_module("torch._dynamo")


def _spare_the_compiler() -> None:
    """Let no optimizer load torch's compiler as it is made, which takes more than a second: it would only be told there to
    leave these methods alone. A stack's steps do without it.

    Torch keeps what it is told in this attribute. Where it does not, the compiler is loaded as ever.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict, Optimizer.zero_grad):
        plain = inspect.unwrap(method)
        plain.__dynamo_disable = plain


_spare_the_compiler()
