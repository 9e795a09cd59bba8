from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpo.train.optim import OPTIMIZERS
from hpo.train.schedule import Rate, apply

CASES: list[tuple[str, dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", {}, torch.optim.SGD, {}),
    ("sgd", {"weight_decay": 0.1, "momentum": 0.9}, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ("sgd", {"nesterov": True}, torch.optim.SGD, {}),
    ("rmsprop", {}, torch.optim.RMSprop, {}),
    (
        "rmsprop",
        {"alpha": 0.9, "momentum": 0.5, "eps": 1e-6, "weight_decay": 0.1},
        torch.optim.RMSprop,
        {"alpha": 0.9, "momentum": 0.5, "eps": 1e-6, "weight_decay": 0.1},
    ),
    ("adam", {}, torch.optim.Adam, {}),
    (
        "adam",
        {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1},
        torch.optim.Adam,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    ("adamw", {}, torch.optim.AdamW, {}),
    (
        "adamw",
        {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1},
        torch.optim.AdamW,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    ("adagrad", {}, torch.optim.Adagrad, {}),
    ("adagrad", {"eps": 1e-6, "weight_decay": 0.1}, torch.optim.Adagrad, {"eps": 1e-6, "weight_decay": 0.1}),
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (5,))]


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], times: int) -> None:
    for time in range(times):
        for p in params:
            p.grad = torch.sin(p.detach() * 3 + time)
        optimizer.step()


@pytest.mark.parametrize(("name", "options", "theirs", "their_options"), CASES)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_step_is_the_one_of_torchs_plain_optimizer(name, options, theirs, their_options, steps: int) -> None:
    ours, expected = parameters(), parameters()
    step(OPTIMIZERS[name](ours, lr=0.05, **options), ours, steps)
    step(theirs(expected, lr=0.05, foreach=False, **their_options), expected, steps)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_fused_form_is_used_where_torch_has_it_and_foreach_elsewhere(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters(), lr=0.1)
    (group,) = optimizer.param_groups
    if name == "rmsprop":
        assert group["foreach"] is True
        assert not group.get("fused")
    else:
        assert group["fused"] is True
        assert not group["foreach"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_parameters_may_come_as_an_iterator(name: str) -> None:
    optimizer = OPTIMIZERS[name](iter(parameters()), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_nesterov_works_with_a_momentum_that_a_schedule_brings() -> None:
    ours, expected = parameters(), parameters()
    optimizer = OPTIMIZERS["sgd"](ours, lr=0.05, nesterov=True)
    apply(optimizer, [0.05], Rate(1.0, 0.9))
    step(optimizer, ours, 5)
    step(torch.optim.SGD(expected, lr=0.05, momentum=0.9, nesterov=True), expected, 5)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
