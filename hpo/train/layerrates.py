"""Learning rates of single layers: an optimizer's parameter groups split by how slowly their parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def slow_down(optimizer: Optimizer, rates: Mapping[Tensor, float]) -> None:
    """Move parameters into groups whose learning rate is their group's times their factor; all else of a group is kept.

    The groups of full rate stay in front, as the first one's rate is what a run reports. Call it before the first step.
    """
    if not rates:
        return
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        of_rate: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            of_rate.setdefault(rates.get(parameter, 1.0), []).append(parameter)
        groups += [{**group, "params": params, "lr": group["lr"] * rate} for rate, params in of_rate.items()]
    groups.sort(key=lambda group: any(parameter in rates for parameter in group["params"]))  # stable
    optimizer.param_groups[:] = groups
