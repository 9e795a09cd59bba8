"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from hpo.train.optim.param_groups import Group


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon for two-dimensional parameters, the only ones that it takes, and torch.optim.AdamW for the others.

    Both share this optimizer's groups and state. So schedules, `state_dict` and `load_state_dict` see one optimizer.
    """

    def __init__(self, groups: list[Group], muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        """Split the groups into those of Muon, which come first, and those of AdamW; ValueError if no parameter is a matrix.

        Args:
            groups: parameter groups.
            muon: options of torch.optim.Muon.
            adamw: options of torch.optim.AdamW.
        """
        matrices, others = (_only(groups, wanted) for wanted in (True, False))
        if not matrices:
            raise ValueError("no parameter of the model has two dimensions; choose adamw")
        self._muon = torch.optim.Muon(matrices, **muon)
        self._adamw = AdamW(others, **adamw) if others else None
        self._matrices = len(matrices)  # number of Muon's groups
        super().__init__([*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else [])], {})
        self._share()

    def _share(self) -> None:
        self._muon.state, self._muon.param_groups = self.state, self.param_groups[: self._matrices]
        if self._adamw is not None:
            self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[self._matrices :]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the closure if there is one, then one step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()  # type: ignore[no-untyped-call]
        if self._adamw is not None:
            self._adamw.step()
        return loss


def _only(groups: list[Group], matrices: bool) -> list[Group]:
    """Return the groups with only their matrices, or only their other parameters, without empty groups."""

    def wanted(parameter: nn.Parameter) -> bool:
        return (parameter.ndim == 2) == matrices

    parts = [{**group, "params": list(filter(wanted, group["params"]))} for group in groups]
    return [part for part in parts if part["params"]]
