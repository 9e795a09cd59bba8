from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn

from hpo.train import checkpoint
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import Rate, apply
from tests.support.paths import ROOT

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
    ("adam", {"weight_decay": 0.1, "decoupled": True}, torch.optim.AdamW, {"weight_decay": 0.1}),
    ("adamax", {}, torch.optim.Adamax, {}),
    (
        "adamax",
        {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1},
        torch.optim.Adamax,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    ("nadam", {}, torch.optim.NAdam, {}),
    (
        "nadam",
        {"beta1": 0.8, "momentum_decay": 0.1, "weight_decay": 0.1, "decoupled": True},
        torch.optim.NAdam,
        {"betas": (0.8, 0.999), "momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    ("radam", {}, torch.optim.RAdam, {}),
    (
        "radam",
        {"beta2": 0.9, "weight_decay": 0.1, "decoupled": True},  # adaptive from the sixth step on
        torch.optim.RAdam,
        {"betas": (0.9, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
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
@pytest.mark.parametrize("steps", [1, 8])
def test_a_step_is_the_one_of_torchs_plain_optimizer(name, options, theirs, their_options, steps: int) -> None:
    ours, expected = parameters(), parameters()
    step(OPTIMIZERS[name](ours, lr=0.05, **options), ours, steps)
    step(theirs(expected, lr=0.05, foreach=False, **their_options), expected, steps)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


def by_library(name: str, params: list[nn.Parameter], **options: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of torch and pytorch-optimizer that one of ours with groups stands for."""
    matrices, others = ([p for p in params if (p.ndim == 2) == wanted] for wanted in (True, False))
    if name == "soap":
        return [pytorch_optimizer.SOAP([{"params": matrices}, {"params": others, "weight_decay": 0.0}], **options)]
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, lr=options["lr"], weight_decay=0.0),
    ]


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_step_is_the_one_of_the_library(name: str) -> None:
    ours, expected = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.2}
    groups = [{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}]
    optimizer, theirs = OPTIMIZERS[name](groups, **options), by_library(name, expected, **options)
    for _ in range(12):
        step(optimizer, ours, 1)
        for one in theirs:
            step(one, [p for group in one.param_groups for p in group["params"]], 1)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_decay_of_sgd_shrinks_weights_past_the_momentum(nesterov: bool) -> None:
    ours, expected = parameters(), parameters()
    optimizer = OPTIMIZERS["sgd"](ours, lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.3, decoupled=True)
    plain = torch.optim.SGD(expected, lr=0.05, momentum=0.9, nesterov=nesterov)
    for time in range(6):
        for one, params in ((optimizer, ours), (plain, expected)):
            for p in params:
                p.grad = torch.cos(torch.arange(float(p.numel())) + time).view_as(p)
            if one is plain:
                for p in params:
                    p.data *= 1 - 0.05 * 0.3
            one.step()
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_state_goes_on_in_a_fresh_optimizer_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = parameters()
    optimizer = OPTIMIZERS[name](first, lr=0.01, weight_decay=0.1)
    expected = OPTIMIZERS[name](copies := parameters(), lr=0.01, weight_decay=0.1)
    step(optimizer, first, 7)
    step(expected, copies, 7)
    digest = checkpoint.save(tmp_path / "state.pt", {"optimizer": optimizer.state_dict()})
    second = [nn.Parameter(p.detach().clone()) for p in first]
    further = OPTIMIZERS[name](second, lr=0.5, weight_decay=0.7)
    further.load_state_dict(checkpoint.load(tmp_path / "state.pt", digest)["optimizer"])
    for one, params in ((further, second), (expected, copies)):
        step(one, params, 7)
    for p, q in zip(second, copies, strict=True):
        assert torch.equal(p, q)


FORMS = {"rmsprop": "foreach", "adamax": "foreach", "nadam": "foreach", "radam": "foreach", "soap": "plain"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_fused_form_is_used_where_torch_has_it_and_foreach_elsewhere(name: str) -> None:
    group = OPTIMIZERS[name](parameters(), lr=0.1).param_groups[-1]  # Muon's other parameters
    form = next((form for form in ("fused", "foreach") if group.get(form)), "plain")
    assert form == FORMS.get(name, "fused")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_parameters_may_come_as_an_iterator(name: str) -> None:
    optimizer = OPTIMIZERS[name](iter(parameters()), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_muon_without_a_matrix_says_so() -> None:
    with pytest.raises(ValueError, match="no parameter of the model has two dimensions; choose adamw"):
        OPTIMIZERS["muon"](parameters()[1:], lr=0.1)


def test_nesterov_works_with_a_momentum_that_a_schedule_brings() -> None:
    ours, expected = parameters(), parameters()
    optimizer = OPTIMIZERS["sgd"](ours, lr=0.05, nesterov=True)
    apply(optimizer, [0.05], Rate(1.0, 0.9))
    step(optimizer, ours, 5)
    step(torch.optim.SGD(expected, lr=0.05, momentum=0.9, nesterov=True), expected, 5)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


def test_who_loads_torch_s_compiler() -> None:
    """Torch's compiler is loaded by the loop before its first epoch and by no stack."""
    code = (
        "import sys\n"
        "from hpo.train import loop\n"
        "from hpo.train.optim.optimizers import OPTIMIZERS\n"
        "from tests.support.stacks import Trial, digits, stack_of\n"
        "splits, told = digits(), []\n"
        "for name in ('sgd', 'rmsprop', 'adam', 'adamw', 'adagrad', 'adamax', 'nadam'):\n"
        "    trial = Trial(splits=splits, optimizer=OPTIMIZERS[name])\n"
        "    assert len(stack_of([one.run() for one in trial.several(2)]).train_epoch()) == 2\n"
        "assert 'torch._dynamo' not in sys.modules, 'a stack has loaded it'\n"
        "run = trial.run()\n"
        "list(loop.train(run, lambda: told.append('torch._dynamo' in sys.modules) or len(told) > 1))\n"
        "assert told == [True, True], told\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
