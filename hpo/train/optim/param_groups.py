"""Parameter groups of an optimizer: which parameters have no weight decay, and which have their own learning rate.

Only this module makes groups, in torch's own form, so that any optimizer takes them. A parameter's attribute
`lr_factor`, as in `parameter.lr_factor = 0.1`, is its learning-rate multiplier. Without the attribute it is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

FACTOR = "lr_factor"

Group = dict[str, Any]
Params = Iterable[nn.Parameter] | Iterable[Group]  # the first argument of an optimizer


def split(model: nn.Module, *, decay: Literal["weights", "all"] = "weights") -> list[Group]:
    """Return the groups of a model's parameters, including frozen ones.

    Parameters with the same learning rate follow each other, weights first, for both values of `decay`. So runs that
    differ in `decay` have the same layout in the rows of a stack. Parameters with multiplier 1 come first, since a run
    reports the learning rate of the first group.

    Args:
        decay: which parameters have weight decay. `weights`: those of two or more dimensions, so not biases, scales and
            shifts of norms, and slopes of activations (He et al. 2019, "Bag of Tricks", no bias decay). `all`: all.
    """
    parameters = list(model.parameters())
    factors = sorted(dict.fromkeys(map(_factor, parameters)), key=lambda factor: factor != 1.0)
    parameters.sort(key=lambda parameter: (factors.index(_factor(parameter)), _is_no_weight(parameter)))
    groups: dict[tuple[bool, float], Group] = {}
    for parameter in parameters:
        spared, factor = decay == "weights" and _is_no_weight(parameter), _factor(parameter)
        options = ({"weight_decay": 0.0} if spared else {}) | ({FACTOR: factor} if factor != 1.0 else {})
        groups.setdefault((spared, factor), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def grouped(params: Params) -> list[Group]:
    """Return parameters or groups as a list of groups."""
    given: list[Any] = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def joined(params: Params) -> list[Group]:
    """Return parameters or groups as a list of groups, merging those that differ only in weight decay.

    Use it where the weight decay is 0.
    """
    one: dict[tuple[tuple[str, Any], ...], Group] = {}
    for group in grouped(params):
        options = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        one.setdefault(tuple(sorted(options.items())), {"params": [], **options})["params"].extend(group["params"])
    return list(one.values())


def set_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rate of each group of a new optimizer by the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get(FACTOR, 1.0)


def _factor(parameter: nn.Parameter) -> float:
    return float(getattr(parameter, FACTOR, 1.0))


def _is_no_weight(parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2
