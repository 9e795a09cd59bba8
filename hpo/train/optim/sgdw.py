"""SGD with decoupled weight decay, which torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD


class SGDW(SGD):
    """SGD that multiplies the weights by 1 - lr * weight_decay before each step (Loshchilov & Hutter 2019, algorithm 1)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if decay and trained:
                torch._foreach_mul_(trained, 1 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
