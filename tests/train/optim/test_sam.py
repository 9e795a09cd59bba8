"""Sharpness-aware minimisation against its formula in plain torch, around any optimizer, and what it leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.data import Splits
from hpo.errors import SpecError
from hpo.models import cnn, mlp
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig, Training
from hpo.train import loop
from hpo.train.build import assemble, executor, registry
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import Rate
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Stack
from tests.support import stacks
from tests.support.stacks import Trial, apart, numbers, weights

RHO = 0.3


def trial(splits: Splits, name: str = "sgd", rho: float = RHO, **changes: Any) -> Trial:
    options = changes.pop("options", {})
    fields: dict[str, Any] = {"optimizer": OPTIMIZERS[name], "lr": 0.02, "epochs": 5} | changes
    return Trial(splits=splits, options={"sam_rho": rho, **options}, **fields)


class ByFormula:
    """SAM around another optimizer, as its paper writes it, for a loss without noise."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float) -> None:
        self.model, self.base, self.rho = model, base, rho

    def step_on(self, images: Tensor, labels: Tensor) -> float:
        parameters = list(self.model.parameters())
        loss = F.cross_entropy(self.model(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        length = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        uphill = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter, gradient in zip(uphill.parameters(), gradients, strict=True):
                parameter += self.rho * gradient / length
        F.cross_entropy(uphill(images), labels).backward()
        for parameter, other in zip(parameters, uphill.parameters(), strict=True):
            parameter.grad = other.grad
        self.base.step()
        return loss.item()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"soap"}))  # which turns on the last bit of a gradient
def test_every_step_is_the_formulas_whatever_the_optimizer(splits: Splits, name: str) -> None:
    one = trial(splits, name, epochs=2)
    run, model = one.run(), one.model()
    by_formula = ByFormula(model, one.optimizer(model.parameters(), lr=one.lr), RHO)
    images = (splits.train.inputs.double() - splits.mean.double().view(-1, 1, 1)) / splits.std.double().view(-1, 1, 1)
    for result in loop.train(run):
        twin = one.run()
        twin.epoch = result.epoch - 1
        losses = [by_formula.step_on(images[rows], splits.train.targets[rows]) for rows in twin.order().split(20)]
        assert result.train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def still(length: int) -> Any:
    return lambda step: Rate(0.0)


def noisy_cnn() -> nn.Module:
    return cnn((1, 8, 8), stacks.CLASSES, channels=[3, 4], dropout=0.3)


class Drawing(nn.Module):
    """A user's model, which draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, stacks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(x.flatten(1), 0.3, self.training))
        return logits


@pytest.mark.parametrize("build", [noisy_cnn, Drawing])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_the_second_pass_leaves_alone(splits: Splits, accumulation: int, build: Callable[[], nn.Module]) -> None:
    """The second pass leaves weights statistics losses and draws alone."""
    options = {"accumulation": accumulation}
    common: dict[str, Any] = {"build": build, "schedule": still, "options": options, "dtype": torch.float32}
    sharp, plain = (trial(splits, rho=rho, **common).run() for rho in (RHO, 0.0))
    assert apart(numbers(loop.train(sharp)), numbers(loop.train(plain))) == 0.0
    before, after = weights(plain), weights(sharp)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(sharp.randomness.dropout.get_state(), plain.randomness.dropout.get_state())


def test_micro_batches_climb_together(splits: Splits) -> None:
    build = partial(mlp, (1, 8, 8), stacks.CLASSES, widths=[7], norm="none")
    whole, pieces = (trial(splits, build=build, options={"accumulation": count}).run() for count in (1, 4))
    assert apart(numbers(loop.train(whole)), numbers(loop.train(pieces))) <= 1e-10


def test_it_trains_otherwise_than_without(splits: Splits) -> None:
    sharp, plain = (numbers(loop.train(trial(splits, rho=rho).run())) for rho in (RHO, 0.0))
    assert apart(sharp, plain) > 1e-3


def test_it_is_trained_alone_and_says_why(splits: Splits) -> None:
    sharp, plain = (trial(splits, rho=rho).run() for rho in (RHO, 0.0))
    why = "sharpness-aware minimisation takes each batch twice"
    with pytest.raises(Unstackable, match=why):
        Stack(StackedForward(sharp.model), sharp, 2)
    stack = Stack(StackedForward(plain.model), plain, 2)
    with pytest.raises(Unstackable, match="reason against a stack"):
        stack.put(sharp)
    assert executor.stack_key_of(sharp, Training()) != executor.stack_key_of(plain, Training())


DOCUMENT: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [4]},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "training": {"epochs": 2, "batch_size": 100},
}


def test_a_file_s_search_over_rho_is_trained_by_the_loop(tmp_path: Path) -> None:
    document = DOCUMENT | {"sam": {"rho": {"low": 0.01, "high": 0.1}}}
    spec = registry.resolve(StudySpec.from_document(document), tmp_path)
    assert spec.identity["sam"] == document["sam"]
    config = TrainConfig.from_tree(spec.tree | {"sam": {"rho": 0.05}})
    splits = assemble.load_splits(config, 0, tmp_path, torch.device("cpu"))
    assert assemble.build_run(config, splits, 0, tmp_path, torch.device("cpu")).sam_rho == 0.05
    choice = executor.choose(spec, config, splits, tmp_path, torch.device("cpu"))
    assert choice.executor == "loop"
    assert choice.why == "cannot be trained as one model: sharpness-aware minimisation takes each batch twice"


def test_a_rho_below_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"sam\.rho = -0\.1: input should be greater than or equal to 0"):
        registry.resolve(StudySpec.from_document(DOCUMENT | {"sam": {"rho": -0.1}}), tmp_path)
