"""Optimizers on rows do what torch's do, keep torch's state, and leave it where torch finds it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from hpo.data import Splits
from hpo.train import checkpoint, loop
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import cosine, onecycle
from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.row_by_row import stepper
from hpo.train.stack.row_state import order_of, own_state
from tests.support import stacks
from tests.support.stacks import Trial, apart, numbers, plain_epochs, stack_of, train

EQUAL = 1e-10


class Lion(Optimizer):
    """A user's optimizer (Chen et al. 2023), which also clears its gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    one, two = group["betas"]
                    parameter.sub_(mean.lerp(parameter.grad, 1 - one).sign_(), alpha=group["lr"])
                    mean.lerp_(parameter.grad, 1 - two)
        self.zero_grad()


class Mine(optim.Adam):
    """A user's variant of a known kind."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(2).clamp_(-0.1, 0.1)
        return super().step(closure)


def grouped(kind: Callable[..., Optimizer], first: slice, **options: Any) -> Callable[..., Optimizer]:
    """Return an optimizer of two groups that differ in learning rate and weight decay, as users make them."""

    def make(params: Any, lr: float) -> Optimizer:
        params = list(params)
        left, here = list(params), params[first]
        for parameter in here:
            left = [other for other in left if other is not parameter]
        return kind([{"params": here, "lr": 0.3 * lr, "weight_decay": 0.1}, {"params": left}], lr=lr, **options)

    return make


def hooked(params: Any, lr: float) -> Optimizer:
    """Return an optimizer that shrinks the weights after each step."""
    optimizer = optim.SGD(params, lr=lr)

    @torch.no_grad()
    def shrink(optimizer: Optimizer, *_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.mul_(0.99)

    optimizer.register_step_post_hook(shrink)
    return optimizer


BY_TORCH = ("radam", "muon", "soap")  # steps of these are torch's own in a row, or none
ROW: dict[str, tuple[Callable[..., Optimizer], float]] = {  # with a learning rate that trains
    "sgd": (optim.SGD, 0.1),
    "sgd decay": (partial(optim.SGD, weight_decay=0.01), 0.1),
    "sgd momentum": (partial(optim.SGD, momentum=0.9), 0.05),
    "sgd momentum decay": (partial(optim.SGD, momentum=0.9, weight_decay=0.01), 0.05),
    "sgd nesterov decay": (partial(optim.SGD, momentum=0.9, weight_decay=0.01, nesterov=True), 0.05),
    "adam": (optim.Adam, 0.01),
    "adam decay": (partial(optim.Adam, weight_decay=0.01, betas=(0.8, 0.99), eps=1e-6), 0.01),
    "adamw": (optim.AdamW, 0.01),
    "adamw options": (partial(optim.AdamW, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6), 0.01),
    "adagrad": (optim.Adagrad, 0.05),
    "adagrad options": (partial(optim.Adagrad, weight_decay=0.01, lr_decay=0.01, eps=1e-8), 0.05),
    "rmsprop": (optim.RMSprop, 0.003),
    "rmsprop decay": (partial(optim.RMSprop, weight_decay=0.01, alpha=0.9), 0.003),
    "rmsprop momentum": (partial(optim.RMSprop, momentum=0.9, weight_decay=0.01), 0.001),
    "adamax": (partial(optim.Adamax, weight_decay=0.01), 0.01),
    "nadam": (optim.NAdam, 0.01),
    "nadam decay": (partial(optim.NAdam, weight_decay=0.01), 0.01),
    "nadam decoupled": (partial(optim.NAdam, weight_decay=0.01, decoupled_weight_decay=True), 0.01),
    "sgd decoupled": (partial(OPTIMIZERS["sgd"], momentum=0.9, weight_decay=0.1, decoupled=True), 0.05),
    "sgd nesterov decoupled": (
        partial(OPTIMIZERS["sgd"], momentum=0.9, nesterov=True, weight_decay=0.1, decoupled=True),
        0.05,
    ),
    **{f"ours: {name}": (OPTIMIZERS[name], 0.01) for name in OPTIMIZERS if name not in BY_TORCH},
    "groups: sgd": (grouped(optim.SGD, slice(0, None, 2), momentum=0.9), 0.05),
    "groups: adamw": (grouped(optim.AdamW, slice(2, 4)), 0.01),
    "groups: rmsprop": (grouped(optim.RMSprop, slice(3), momentum=0.5), 0.003),
    "groups: nadam": (grouped(optim.NAdam, slice(1, None, 3)), 0.01),
    "groups: an empty one": (grouped(optim.Adam, slice(0)), 0.01),
}
TORCHS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "sgd dampened": (partial(optim.SGD, momentum=0.9, dampening=0.5), 0.05),
    "sgd maximize": (partial(optim.SGD, maximize=True), 0.001),
    "amsgrad": (partial(optim.AdamW, amsgrad=True), 0.01),
    "rmsprop centered": (partial(optim.RMSprop, centered=True), 0.003),
    "radam": (partial(optim.RAdam, weight_decay=0.01), 0.01),
    "adadelta": (optim.Adadelta, 1.0),
    "rprop": (optim.Rprop, 0.001),
    "asgd": (optim.ASGD, 0.05),
    "lion": (Lion, 0.001),
    "a subclass": (Mine, 0.01),
    "hooked": (hooked, 0.05),
    "ours: radam": (OPTIMIZERS["radam"], 0.01),
    "ours: muon": (OPTIMIZERS["muon"], 0.01),
    "groups: radam": (grouped(optim.RAdam, slice(0, None, 2)), 0.01),
}
ALL = ROW | TORCHS


def first_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return the first of each kind. What leads into a stack and out of it is the same for the others of that kind."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(name.removeprefix("ours: ").split()[0], name)
    return list(found.values())


FIRST = [*first_of_each_kind(ROW), *first_of_each_kind(TORCHS)]


def trial(splits: Splits, name: str, **changes: Any) -> Trial:
    optimizer, lr = ALL[name]
    return Trial(splits=splits, optimizer=optimizer, lr=lr, **changes)


@pytest.mark.parametrize("name", ALL)
def test_curves_and_weights_are_those_of_the_loop_and_of_plain_torch(splits: Splits, name: str) -> None:
    trials = trial(splits, name, epochs=2).several(2)
    runs, alone = [trial.run() for trial in trials], [trial.run() for trial in trials]
    results = train(stack_of(runs))
    expected = [trial.by_plain_torch() for trial in trials]
    assert apart([numbers(results[run]) for run in runs], expected) <= EQUAL
    assert apart([numbers(loop.train(run)) for run in alone], expected) <= EQUAL
    for one, other in zip(runs, alone, strict=True):
        torch.testing.assert_close(stacks.weights(one), stacks.weights(other), rtol=0, atol=1e-9)
        torch.testing.assert_close(  # same keys too, where there is a state at all
            {key: state for key, state in one.optimizer.state_dict()["state"].items() if state},
            other.optimizer.state_dict()["state"],
            rtol=1e-9,
            atol=1e-9,
            check_dtype=False,  # of the count, which torch keeps as float32 where it calls a fused kernel
        )


@pytest.mark.parametrize("name", ALL)
def test_which_take_our_step_and_which_torchs(splits: Splits, monkeypatch, name: str) -> None:
    run = trial(splits, name, epochs=1).run()
    stack, called = stack_of([run]), []
    monkeypatch.setattr(run.optimizer, "step", lambda: called.append(1))
    stack.train_epoch()
    assert bool(called) == (name in TORCHS)


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        *((True, name) for name in FIRST),
        (False, "adamw"),
        (False, "hooked"),
        *(pytest.param(True, name, marks=pytest.mark.soak) for name in ALL if name not in FIRST),
        *(pytest.param(False, name, marks=pytest.mark.soak) for name in ALL if name not in ("adamw", "hooked")),
    ],
)
def test_a_state_from_a_stack_goes_on_in_plain_torch(splits: Splits, tmp_path: Path, name: str, saved: bool) -> None:
    one = trial(splits, name, epochs=4, schedule=cosine)
    run = one.run()
    stack = stack_of([one.several(2)[1].run(), run])
    head = [numbers(stack.train_epoch())[-1] for _ in range(2)]
    if saved:
        digest = checkpoint.save(tmp_path / "run.pt", run.state_dict())
        state = checkpoint.load(tmp_path / "run.pt", digest)
    else:
        state = copy.deepcopy(run.state_dict())
    stack.train_epoch()  # what the stack does later is no matter

    model = one.model()
    optimizer = one.optimizer(model.parameters(), lr=one.lr)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert apart(head + plain_epochs(one, model, optimizer, range(2, 4)), one.by_plain_torch()) <= EQUAL


LATER = ("adamw", "rmsprop momentum", "radam")
MOVING = [name for name in ALL if "groups" not in name]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("stack loop stack", name) for name in MOVING if name in FIRST),
        *(("loop stack loop", name) for name in LATER),
        *(pytest.param("stack loop stack", name, marks=pytest.mark.soak) for name in MOVING if name not in FIRST),
        *(pytest.param("loop stack loop", name, marks=pytest.mark.soak) for name in MOVING if name not in LATER),
    ],
)
def test_a_run_moves_between_executors(splits: Splits, name: str, way: str) -> None:
    one = trial(splits, name, epochs=3, schedule=cosine)
    run, results = one.run(), []
    for executor in way.split():
        if executor == "stack":
            stack = stack_of([run, *(other.run() for other in one.several(2))])
            results.append(stack.train_epoch()[0])
            stack.remove(run)
            stack.train_epoch()  # its place is no more its own
        else:
            training: Any = loop.train(run)  # a generator, which is left midway
            results.append(next(training))
            training.close()
    assert apart(numbers(results), one.by_plain_torch()) <= EQUAL
    assert run.executors == way.split()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(16))


def in_row(kind: Callable[..., Optimizer]) -> tuple[Optimizer, Callable[[], None], FlatParameters, Two]:
    """Bring a model's optimizer into the second of three rows."""
    model = Two()
    optimizer = kind(model.parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = FlatParameters(model, order_of(optimizer, names), 3)
    rows.adopt(1, model)
    return optimizer, stepper(optimizer, names, rows, 1), rows, model


FUSED = {
    "sgd": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": partial(optim.Adam, lr=0.1, weight_decay=0.1),
    "adamw": partial(optim.AdamW, lr=0.1, weight_decay=0.1),
    "adagrad": partial(optim.Adagrad, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", FUSED)
def test_hyperparameters_are_read_at_each_step(name: str) -> None:
    """Hyperparameters are read from the groups at each step bit for bit."""
    kind = partial(FUSED[name], fused=True)
    optimizer, take, rows, model = in_row(kind)
    twin = copy.deepcopy(model)
    other = kind(twin.parameters())
    before = rows.values.clone()
    for step in range(6):
        for each in (optimizer, other):
            each.param_groups[0]["lr"] = 0.1 / (1 + step)
            each.param_groups[0]["weight_decay"] = 0.1 * step
            if "momentum" in each.param_groups[0]:
                each.param_groups[0]["momentum"] = 0.1 * step  # none at first
            elif "betas" in each.param_groups[0]:
                each.param_groups[0]["betas"] = (0.1 * step, 0.9)
        if step == 3:  # the groups are others from here on
            optimizer.__setstate__({"param_groups": copy.copy([dict(group) for group in optimizer.param_groups])})
        for parameter, key in ((twin.weight, "weight"), (twin.bias, "bias")):
            parameter.grad = torch.randn(parameter.shape)
            rows.of(rows.gradients, 1, key).copy_(parameter.grad)
        take()
        other.step()
        assert torch.equal(model.weight, twin.weight)
        assert torch.equal(model.bias, twin.bias)
    assert torch.equal(rows.values[[0, 2]], before[[0, 2]])
    assert not any(moment[[0, 2]].any() for moment in rows.moments)
    for one, another in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {key: value.tolist() for key, value in one.items()} == {k: v.tolist() for k, v in another.items()}


def test_a_state_holds_momentum_once_there_is_some_and_not_before() -> None:
    optimizer, take, _, model = in_row(partial(optim.SGD, lr=0.1))
    take()
    assert optimizer.state[model.weight] == {}
    optimizer.param_groups[0]["momentum"] = 0.5
    take()
    assert list(optimizer.state[model.weight]) == ["momentum_buffer"]


def test_each_parameter_has_a_count_of_its_own() -> None:
    optimizer, take, _, model = in_row(partial(optim.NAdam, lr=0.1))
    take()
    first, second = (optimizer.state[parameter] for parameter in model.parameters())
    first["step"].add_(5)
    first["mu_product"].zero_()
    assert second["step"].item() == 1
    assert second["mu_product"].item() != 0


def test_a_state_of_its_own_is_left_alone_by_the_row() -> None:
    optimizer, take, rows, model = in_row(partial(optim.AdamW, lr=0.1))
    rows.gradients.fill_(1.0)
    take()
    own_state(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    for moment in rows.moments:
        moment.zero_()
    take()
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state[model.bias]["step"].item() == 1


def test_order_is_by_group_and_without_frozen_parameters() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    layers[1].bias.requires_grad_(False)
    names: dict[Tensor, str] = {parameter: name for name, parameter in layers.named_parameters()}
    optimizer = optim.SGD([{"params": layers[2].parameters()}, {"params": layers[1].parameters()}], lr=0.1)
    assert order_of(optimizer, names) == ["2.weight", "2.bias", "1.weight"]


def test_momentum_cycles_from_the_first_step(splits: Splits) -> None:
    """Momentum cycles from the first step where the optimizer was made without."""
    for name in ("sgd", "rmsprop", "adam", "nadam"):
        schedule = partial(onecycle, cycle_momentum=True)
        trials = trial(splits, name, schedule=schedule).several()
        expected = [trial.by_plain_torch() for trial in trials]
        assert apart(stacks.together(trials), expected) <= EQUAL
