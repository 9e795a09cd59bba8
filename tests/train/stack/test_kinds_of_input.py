"""Models of tables, features, series and texts in a stack are those trained alone: in float64 but for rounding.

In a stack of another size they are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import data
from hpo.data import Source, Splits
from hpo.models import MODELS
from hpo.models.tables import QuantileEmbedding
from hpo.train.optim.losses import LOSSES
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Stack
from tests.support.inputs import MODELS_OF, SHAPES, splits_of
from tests.support.stacks import Trial, train, weights
from tests.train.stack.test_layers import OF_OTHER_INPUTS

#: Layers between a series [B, 2, 20] and four outputs; each rule for series is in one of them.
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolution, stride": lambda: [nn.Conv1d(2, 3, 4, stride=2, dilation=2, padding=1), nn.Tanh()],
    "convolution, groups": lambda: [nn.Conv1d(2, 8, 3, bias=False), nn.Conv1d(8, 4, 3, groups=2, padding="same")],
    "batch norm": lambda: [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4, affine=False)],
    "other norms": lambda: [nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm([4, 18]), nn.GroupNorm(1, 4)],
    "pools": lambda: [nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveMaxPool1d(4), nn.AdaptiveAvgPool1d(3)],
}


class Named(nn.Module):
    """A user's model of two tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 5), nn.Conv1d(2, 4, 3), nn.Linear(5 + 4 * 6, 4)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        right = torch.flatten(torch.relu(self.right(x["right"])), 1)
        return self.last(torch.cat([torch.tanh(self.left(x["left"])), right], dim=1))


def named() -> Splits:
    generator = torch.Generator().manual_seed(0)
    inputs: Any = {"left": torch.randn(80, 3, generator=generator), "right": torch.randn(80, 2, 8, generator=generator)}
    return data.load(Source(inputs=inputs, targets=torch.arange(80) % 4, num_classes=4), split_seed=0, device="cpu")


def in_series(*layers: nn.Module) -> nn.Module:
    body = nn.Sequential(*layers, nn.Flatten())
    width = body.eval()(torch.zeros(2, 2, 20)).shape[1]
    return nn.Sequential(*body.train(), nn.Linear(width, 4))


def trial_of(
    splits: Splits, build: Callable[[], nn.Module], seed: int, dtype: torch.dtype | None, **more: Any
) -> Trial:
    return Trial(
        splits=splits,
        build=build,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        lr=0.05 / (1 + seed),
        seed=seed,
        dtype=dtype or torch.float32,
        epochs=3,
        batch_size=16,
        options=more,
    )


def found(splits: Splits, build: Callable[[], nn.Module], **more: Any) -> str:
    """Return the executor for these runs; it is compared with single runs in float64 before."""

    def make(seed: int, some: Splits, dtype: torch.dtype | None) -> Run:
        return trial_of(some, build, seed, dtype, **more).run()

    return select.find(make, splits, 16).name


def build_of(name: str, dropout: float = 0.2) -> Callable[[], nn.Module]:
    model, kind, chosen = MODELS_OF[name]
    return lambda: MODELS[model](SHAPES[kind], 4, **(chosen | {"dropout": dropout}))


@pytest.mark.parametrize("name", MODELS_OF)
def test_a_model_of_ours_trains_in_a_stack_as_alone(name: str) -> None:
    assert found(splits_of(MODELS_OF[name][1]), build_of(name)) == executor_of(name)


def executor_of(name: str) -> str:
    return "vmap" if MODELS_OF[name][0] in ("gru", "lstm", "transformer") else "stack"


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_series_train_in_a_stack_as_alone(name: str) -> None:
    assert found(splits_of("series"), lambda: in_series(*LAYERS[name]())) == "stack"


def test_every_rule_for_other_inputs_is_among_the_models() -> None:
    layers = [*(in_series(*some()) for some in LAYERS.values()), *(build_of(name)() for name in MODELS_OF)]
    used = {type(module) for model in layers for module in model.modules()}
    assert set(OF_OTHER_INPUTS) <= used


@pytest.mark.parametrize("task", ["binary", "regression"])
@pytest.mark.parametrize(
    "name", ["mlp of table, quantile", "cnn1d of series", "gru of tokens", "transformer of series"]
)
def test_other_tasks_train_in_a_stack_as_alone(name: str, task: str) -> None:
    model, kind, chosen = MODELS_OF[name]
    loss = LOSSES["bce_with_logits" if task == "binary" else "mse"]()
    outputs = 1 if task == "binary" else 4
    assert found(splits_of(kind, task), lambda: MODELS[model](SHAPES[kind], outputs, **chosen), loss=loss) in (
        "stack",
        "vmap",
    )


def test_a_users_model_of_named_tensors_trains_in_a_stack_as_alone() -> None:
    assert found(named(), Named) == "stack"


@pytest.mark.parametrize(
    "name",
    [
        *("mlp of table", "mlp of table, linear", "mlp of table, periodic", "mlp of table, quantile"),
        *("mlp of features", "cnn1d of series", "cnn1d of words", "cnn1d, deep"),
        *("gru, both ways", "lstm of tokens", "transformer of tokens", "transformer, patches"),
    ],
)
def test_a_slot_is_the_same_bit_for_bit_whatever_the_size_of_the_stack(name: str) -> None:
    splits = splits_of(MODELS_OF[name][1])
    trials = [trial_of(splits, build_of(name, 0.1 * (seed + 1)), seed, None) for seed in range(5)]
    states = []
    for others in ((), (1,), (1, 2, 3, 4)):
        run, *more = [trials[row].run() for row in (0, *others)]
        stack = Stack(select.of(executor_of(name), run), run, 1 + len(more))
        for one in [*more, run]:  # in another row each time
            stack.put(one)
        train(stack)
        states.append(weights(run))
    for other in states[1:]:
        assert [key for key, value in states[0].items() if not torch.equal(value, other[key])] == []


def test_runs_of_one_stack_keep_their_own_quantiles() -> None:
    splits = splits_of("features")
    runs = [
        replace(trial_of(splits, build_of("mlp of features, quantile"), 0, None), seed=seed).run() for seed in (0, 1)
    ]
    edges = []
    for run in runs:
        [embedding] = [module for module in run.model.modules() if isinstance(module, QuantileEmbedding)]
        embedding.fit(torch.randn(50, 3, generator=torch.Generator().manual_seed(run.seed)))
        edges.append(embedding.edge.clone())
    stack = Stack(select.of("stack", runs[0]), runs[0], 2)
    for run in runs:
        stack.put(run)
    train(stack)
    for run, edge in zip(runs, edges, strict=True):
        assert torch.equal(run.model.state_dict()["0.edge"], edge)
    assert not torch.equal(*edges)


class Joins(nn.Module):
    """A user's model that joins two tensors in a way that has no stacked form."""

    def __init__(self, forward: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.linear, self.called = nn.Linear(3, 4), forward

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.called(self, x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.linear(x["lft"]), r"getitem \(at getitem\) takes 'lft' of the input, which has no tensor of that"),
        (lambda m, x: m.linear(x), "a layer takes several tensors by name"),
        (lambda m, x: m.linear(torch.cat([x["left"], x["left"]], 0)), "joins along another dimension than that of features"),
        (lambda m, x: m.linear(torch.cat([x["right"], x["right"]], 1)), "joins values that are not flat features"),
    ],
)  # fmt: skip
def test_what_has_no_stacked_form_is_told(forward: Any, message: str) -> None:
    with pytest.raises(Unstackable, match=message):
        StackedForward(Joins(forward), {"left": torch.zeros(2, 3), "right": torch.zeros(2, 2, 8)})


def test_an_input_of_five_dimensions_is_left_to_vmap() -> None:
    with pytest.raises(Unstackable, match="an input of 5 dimensions has no stacked form"):
        StackedForward(nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)), torch.zeros(2, 2, 2, 2, 2))
