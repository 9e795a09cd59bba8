"""A model's parameters as the groups of an optimizer: what weight decay leaves alone, and what learns at a rate of its own.

Groups are made here alone, in torch's own form, so that any optimizer takes them. A parameter says its share of the learning
rate by an attribute, `parameter.lr_factor = 0.1`; one that says nothing has all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

FACTOR = "lr_factor"

Group = dict[str, Any]
Params = Iterable[nn.Parameter] | Iterable[Group]  # what an optimizer is made of


def split(model: nn.Module, *, decay: Literal["weights", "all"] = "weights") -> list[Group]:
    """Return the groups of a model's parameters, frozen ones among them.

    With decay = "weights", weight decay leaves biases, the scales and shifts of norms and the slopes of activations alone:
    all that has fewer than two dimensions (He et al. 2019, "Bag of Tricks", no bias decay). With "all" it leaves
    nothing alone.

    Parameters of one learning rate follow one another, weights first, whatever is decayed: so runs that differ in decay
    lie alike in the rows of a stack. Those of the whole rate come first, as it is the first group's that a run reports.
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
    """Return parameters or groups as groups."""
    given: list[Any] = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def joined(params: Params) -> list[Group]:
    """Return parameters or groups as groups, those as one that differ in weight decay alone: for when there is none."""
    one: dict[tuple[tuple[str, Any], ...], Group] = {}
    for group in grouped(params):
        options = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        one.setdefault(tuple(sorted(options.items())), {"params": [], **options})["params"].extend(group["params"])
    return list(one.values())


def set_rates(optimizer: Optimizer) -> None:
    """Give each group of a fresh optimizer its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get(FACTOR, 1.0)


def _factor(parameter: nn.Parameter) -> float:
    return float(getattr(parameter, FACTOR, 1.0))


def _is_no_weight(parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2
