"""Parameters in groups: which are decayed, at what rate each learns, and that a stack steps every group as the loop does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from hpo.data import Splits
from hpo.models import cnn
from hpo.spec.training import Training
from hpo.train import loop
from hpo.train.build.executor import stack_key_of
from hpo.train.optim import param_groups
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.param_groups import joined, set_rates, split
from hpo.train.optim.schedules import cosine
from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from tests.support import stacks
from tests.support.stacks import Trial, apart, numbers, stack_of, train, weights


def net() -> nn.Module:
    """A model with everything that is told apart: convolution, norm, slope, embedding of positions, weights and biases."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.Flatten(), nn.Linear(8, 3))
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 4, 2)))
    return model


def named(model: nn.Module, given: list[param_groups.Group]) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in given]


WEIGHTS = ["position", "0.weight", "4.weight"]
SPARED = ["0.bias", "1.weight", "1.bias", "2.weight", "4.bias"]


def test_what_has_one_dimension_is_left_alone() -> None:
    """What has fewer than two dimensions is left alone and weights come first."""
    model = net()
    found = split(model)
    assert named(model, found) == [WEIGHTS, SPARED]
    assert [group.get("weight_decay") for group in found] == [None, 0.0]
    assert named(model, split(model, decay="all")) == [WEIGHTS + SPARED]
    assert named(model, joined(found)) == [WEIGHTS + SPARED]


def test_parameters_of_another_rate_are_groups_of_their_own() -> None:
    model = net()
    for layer in (model[0], model[1]):
        for parameter in layer.parameters():
            parameter.lr_factor = 0.1
    found = split(model)
    slow, fast = ["0.weight", "0.bias", "1.weight", "1.bias"], ["position", "4.weight", "2.weight", "4.bias"]
    assert named(model, found) == [fast[:2], fast[2:], slow[:1], slow[1:]]
    assert named(model, joined(found)) == [fast, slow]
    optimizer = OPTIMIZERS["adamw"](found, lr=0.5, weight_decay=0.1)
    set_rates(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.05, 0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]


def test_frozen_parameters_stay_in_their_groups() -> None:
    """Frozen parameters stay in their groups and shared ones count once."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert named(model, split(model)) == [["0.weight"], ["0.bias", "1.bias"]]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("decay", ["weights", "all"])
def test_a_step_without_a_gradient_shrinks_weights(name: str, decay: Any) -> None:
    """Coupled decay of an adaptive optimizer moves as well: its gradient is the decay alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    nn.init.ones_(model[0].bias)
    optimizer = OPTIMIZERS[name](split(model, decay=decay), lr=0.1, weight_decay=0.1)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for _ in range(2):  # SOAP's first step gathers
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    shrunk = {key for key, parameter in model.named_parameters() if parameter.norm() < before[key].norm()}
    assert shrunk == ({"0.weight"} if decay == "weights" else {"0.weight", "0.bias", "1.weight"})
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key not in shrunk)


def test_without_decay_there_is_one_group_in_the_same_order() -> None:
    model = net()
    decayed, plain = (OPTIMIZERS["sgd"](split(model), lr=0.1, weight_decay=decay) for decay in (0.1, 0.0))
    assert named(model, plain.param_groups) == [WEIGHTS + SPARED]
    assert named(model, decayed.param_groups) == [WEIGHTS, SPARED]


# --- in a stack ----------------------------------------------------------------------------------------------------------


def ours(name: str, *, decay: Any = "weights", slow: float = 1.0, **options: Any) -> Callable[..., Optimizer]:
    def make(params: Any, lr: float) -> Optimizer:
        model = nn.ParameterList(params)
        [p for p in model if p.ndim > 1][1].lr_factor = slow
        optimizer = OPTIMIZERS[name](split(model, decay=decay), lr=lr, **options)
        set_rates(optimizer)
        return optimizer

    return make


def torchs(kind: Callable[..., Optimizer], weight_decay: float, *, spares: bool, **options: Any) -> Callable[..., Any]:
    def make(params: Any, lr: float) -> Optimizer:
        params = list(params)
        left = [p for p in params if p.ndim < 2]
        decayed = {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay}
        return kind([decayed, {"params": left, "weight_decay": 0.0 if spares else weight_decay}], lr=lr, **options)

    return make


PAIRS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {  # ours, and torch's by hand
    "adamw": (ours("adamw", weight_decay=0.2), torchs(AdamW, 0.2, spares=True)),
    "adamw all": (ours("adamw", weight_decay=0.2, decay="all"), torchs(AdamW, 0.2, spares=False)),
    "adamw none": (ours("adamw", weight_decay=0.0), torchs(AdamW, 0.0, spares=True)),
    "sgd": (ours("sgd", momentum=0.9, weight_decay=0.1), torchs(SGD, 0.1, spares=True, momentum=0.9)),
    "sgd none": (ours("sgd", weight_decay=0.0), torchs(SGD, 0.0, spares=True)),
    "sgd decoupled": (
        ours("sgd", momentum=0.9, weight_decay=0.1, decoupled=True),
        torchs(SGDW, 0.1, spares=True, momentum=0.9),
    ),
}


def small_cnn() -> nn.Module:
    return cnn((1, 8, 8), stacks.CLASSES, channels=[3, 4], activation="gelu")


def test_runs_decayed_otherwise_share_a_stack(splits: Splits, monkeypatch: Any) -> None:
    """Runs that are decayed otherwise share a stack each as plain torch."""
    common: dict[str, Any] = {"splits": splits, "build": small_cnn, "lr": 0.01, "schedule": cosine, "epochs": 12}
    trials = [Trial(seed=seed, optimizer=mine, **common) for seed, (mine, _) in enumerate(PAIRS.values())]
    expected = [
        Trial(seed=seed, optimizer=theirs, **common).by_plain_torch() for seed, (_, theirs) in enumerate(PAIRS.values())
    ]
    runs = [trial.run() for trial in trials]
    assert len({stack_key_of(run, Training()) for run in runs}) == 1
    for run in runs:
        monkeypatch.setattr(run.optimizer, "step", lambda: pytest.fail("torch's own step, for a row that we know"))
    results = train(stack_of(runs))
    assert apart([numbers(results[run]) for run in runs], expected) <= 1e-10
    assert apart([numbers(loop.train(trial.run())) for trial in trials], expected) <= 1e-10


@pytest.mark.parametrize("name", PAIRS)
def test_neighbours_that_are_decayed_otherwise_change_no_bit(splits: Splits, name: str) -> None:
    optimizer = PAIRS[name][0]
    trial = Trial(splits=splits, optimizer=optimizer, lr=0.01, epochs=3, seed=3, dtype=torch.float32)
    alone, run = trial.run(), trial.run()
    expected = numbers(train(stack_of([alone]))[alone])
    others = [replace(trial, seed=9, optimizer=mine).run() for mine, _ in PAIRS.values()]
    assert numbers(train(stack_of([*others, run]))[run]) == expected
    for key, tensor in weights(alone).items():
        assert torch.equal(weights(run)[key], tensor)


def test_a_rate_of_its_own_holds_in_a_stack_and_is_another_stack_key(splits: Splits) -> None:
    trial = Trial(
        splits=splits, optimizer=ours("adamw", slow=0.1, weight_decay=0.1), lr=0.01, schedule=cosine, epochs=8
    )
    trials = trial.several(2)
    runs = [one.run() for one in trials]
    results = train(stack_of(runs))
    curves = [numbers(loop.train(one.run())) for one in trials]
    assert apart([numbers(results[run]) for run in runs], curves) <= 1e-10
    same = replace(trial, optimizer=ours("adamw", weight_decay=0.1))
    assert apart(curves[0], numbers(loop.train(same.run()))) > 1e-4
    assert stack_key_of(same.run(), Training()) != stack_key_of(runs[0], Training())


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "rmsprop", "adamax", "adamw"])
def test_groups_that_differ_in_decay_alone_are_stepped_by_one_call(splits: Splits, monkeypatch: Any, name: str) -> None:
    for slow, calls in ((1.0, 1), (0.1, 3)):
        run = Trial(splits=splits, optimizer=ours(name, slow=slow, weight_decay=0.1), lr=0.01, epochs=1).run()
        kind, called = ROW_OPTIMIZERS[type(run.optimizer)], []

        def step(*given: Any, kind: RowOptimizer = kind, called: list[Any] = called) -> None:
            called.append(given)
            kind.step(*given)

        monkeypatch.setitem(ROW_OPTIMIZERS, type(run.optimizer), replace(kind, step=step))
        train(stack_of([run]))
        assert len(called) == calls * run.steps_per_epoch
        monkeypatch.undo()
