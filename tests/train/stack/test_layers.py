"""Every layer of K models as one does what K layers do: 12 steps in float64 against torch.nn and torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.data import Splits
from hpo.models import Dropout, cnn, mlp
from hpo.models.activations import FORMULAS, RReLU, Shaped, SwiGLU
from hpo.models.depth import StochasticDepth
from hpo.models.tables import CategoryEmbedding
from hpo.models.tokens import TokenEmbedding
from hpo.train.stack.forward import ALIKE, FUNCTIONS, SPATIAL, TOGETHER, StackedForward
from hpo.train.stack.layers import ELEMENTWISE, NUMBERS, POOLS, POOLS_1D, RULES, Unstackable
from tests.support import stacks
from tests.support.stacks import CLASSES, Trial, apart, together

EQUAL = 1e-10


def dense(*layers: nn.Module, width: int = 12) -> nn.Module:
    """Put layers between flat features and the logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *layers, nn.Linear(width, CLASSES))


def images(*layers: nn.Module, flat: Iterable[nn.Module] = ()) -> nn.Module:
    """Put layers between an image of four channels and the logits, and some more behind the flattening."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten())
    width = body.eval()(torch.zeros(2, 1, 8, 8)).shape[1]
    return nn.Sequential(*body.train(), *flat, nn.Linear(width, CLASSES))


class Calls(nn.Module):
    """A model that calls a function between its convolution and its flattening."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 256) -> None:
        super().__init__()
        self.conv, self.linear, self.function = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(width, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.function(self.conv(x)), 1))


class Block(nn.Module):
    """A residual block, with the sum written in place or not."""

    def __init__(self, channels: int, out: int, stride: int, *, in_place: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=in_place),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.in_place:
            y += self.shortcut(x)
            return F.relu(y, inplace=True)
        return F.relu(torch.add(y, self.shortcut(x)))


class Residual(nn.Module):
    def __init__(self, dropout: float = 0.0, *, in_place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4, 1, in_place=in_place), Block(4, 8, 2, in_place=in_place))
        self.dropout, self.head = Dropout(dropout), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1)
        return self.head(self.dropout(x.flatten(1)))


class Pair(nn.Module):
    """Two linear layers with a sum between them, perhaps one and the same, perhaps of one weight."""

    def __init__(self, *, same: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.first, self.a = nn.Linear(64, 12), nn.Linear(12, 12)
        self.b = self.a if same else nn.Linear(12, 12)
        if tied:
            self.b.weight = self.a.weight
        self.dropout, self.last = Dropout(0.2), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.flatten(x, start_dim=1)))
        x = self.dropout(0.5 * torch.tanh(self.a(x)) + 1)
        return self.last(self.dropout(x - self.b(x) * x))


def batched(items: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return so many items at a time that the tests stay fast and few enough to see which is wrong."""
    items = list(items)
    return [tuple(items[start : start + 3]) for start in range(0, len(items), 3)]


def shapes() -> list[nn.Module]:
    """Return every formula with a shape of its own, which differs from one call to the next, learned and not."""
    first = torch.empty(()).uniform_(0.2, 1.5).item()
    return [
        Shaped(name, first + 0.1 * index, learned=learned)
        for learned in (False, True)
        for index, name in enumerate(FORMULAS)
    ]


def activations(names: Iterable[str]) -> list[nn.Module]:
    return [ACTIVATIONS[name]() for name in names]


def _each(functions: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def frozen(model: nn.Module) -> nn.Module:
    """Freeze the first half of a model's parameters, and one at the end."""
    parameters = list(model.parameters())
    for parameter in [*parameters[: len(parameters) // 2], parameters[-1]]:
        parameter.requires_grad_(False)
    return model


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": dense,
    "linear without bias": lambda: dense(nn.Linear(12, 7, bias=False), width=7),
    "conv": images,
    "conv: stride, uneven": lambda: images(nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(0, 2))),
    "conv: groups": lambda: images(nn.Conv2d(4, 6, 3, groups=2)),
    "conv: depthwise": lambda: images(nn.Conv2d(4, 8, 3, groups=4, bias=False)),
    "conv: dilation": lambda: images(nn.Conv2d(4, 3, 3, dilation=2, padding=1)),
    "conv: same": lambda: images(nn.Conv2d(4, 3, 4, padding="same", dilation=2)),
    "conv: few channels to eight": lambda: nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.Flatten(), nn.Linear(72, CLASSES)),
    "conv: two channels to eight": lambda: images(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 8, 3, bias=False)),
    "batch norm 1d": lambda: dense(nn.BatchNorm1d(12), nn.Tanh()),
    "batch norm 1d: options": lambda: dense(nn.BatchNorm1d(12, eps=0.1, momentum=0.3), nn.Tanh()),
    "batch norm 1d: not affine": lambda: dense(nn.BatchNorm1d(12, affine=False)),
    "batch norm 1d: no statistics": lambda: dense(nn.BatchNorm1d(12, track_running_stats=False)),
    "batch norm 2d": lambda: images(nn.BatchNorm2d(4), nn.Tanh()),
    "batch norm 2d: options": lambda: images(nn.BatchNorm2d(4, eps=0.1, momentum=0.3, affine=False), nn.Tanh()),
    "batch norm 2d: no statistics": lambda: images(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()),
    "layer norm": lambda: dense(nn.LayerNorm(12), nn.Tanh()),
    "layer norm: no bias": lambda: dense(nn.LayerNorm(12, bias=False), nn.Tanh()),
    "layer norm: not affine": lambda: dense(nn.LayerNorm(12, elementwise_affine=False, eps=0.1), nn.Tanh()),
    "layer norm of images": lambda: images(nn.LayerNorm([4, 8, 8]), nn.Tanh()),
    "layer norm of images: no bias": lambda: images(nn.LayerNorm([4, 8, 8], bias=False), nn.Tanh()),
    "layer norm of images: not affine": lambda: images(nn.LayerNorm([4, 8, 8], elementwise_affine=False)),
    "group norm": lambda: images(nn.GroupNorm(2, 4), nn.Tanh()),
    "group norm: not affine": lambda: images(nn.GroupNorm(1, 4, affine=False, eps=0.1), nn.Tanh()),
    "group norm of features": lambda: dense(nn.GroupNorm(3, 12), nn.Tanh()),
    "group norm of features: not affine": lambda: dense(nn.GroupNorm(2, 12, affine=False, eps=0.1), nn.Tanh()),
    "shapes": lambda: dense(*shapes(), width=12),
    "shapes of images": lambda: images(*shapes()),
    "swiglu": lambda: dense(SwiGLU(), width=6),
    "swiglu of images": lambda: images(SwiGLU()),
    "stochastic depth": lambda: dense(StochasticDepth(0.3), nn.Tanh(), StochasticDepth(0.0)),
    "stochastic depth of images": lambda: images(StochasticDepth(0.3), nn.Tanh(), StochasticDepth(0.5)),
    "residual mlp": lambda: mlp(
        (1, 8, 8),
        CLASSES,
        widths=[9],
        depth=3,
        residual=True,
        stochastic_depth=0.4,
        dropout=0.1,
        norm="layer",
        activation="gelu",
    ),
    "residual cnn": lambda: cnn(
        (1, 8, 8),
        CLASSES,
        channels=[3, 4],
        depth=2,
        residual=True,
        stochastic_depth=0.4,
        block_dropout=0.1,
        input_dropout=0.1,
        norm="layer",
        activation="swiglu",
    ),
    "dropout": lambda: dense(Dropout(0.3), nn.Tanh(), nn.Dropout(0.5)),
    "dropout of images": lambda: images(Dropout(0.3), nn.Tanh(), Dropout(0.1), flat=[Dropout(0.2)]),
    "dropout of the input": lambda: nn.Sequential(Dropout(0.3), *dense()),
    "dropout of all and of none": lambda: dense(Dropout(0.0), nn.Tanh(), Dropout(1.0)),
    "flatten, twice": lambda: dense(nn.Flatten()),
    "activation of the input": lambda: nn.Sequential(nn.Tanh(), *dense()),
    "max pool": lambda: images(nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(2, ceil_mode=True, dilation=2)),
    "average pool": lambda: images(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2)),
    "adaptive max pool": lambda: images(nn.AdaptiveMaxPool2d((3, None))),
    "adaptive average pool": lambda: images(nn.AdaptiveAvgPool2d(3)),
    "pool of the input": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)),
    "mlp": lambda: mlp((1, 8, 8), CLASSES, widths=[9, 7], dropout=0.2, activation="silu"),
    "cnn": lambda: cnn((1, 8, 8), CLASSES, channels=[3, 5], dropout=0.2),
    "residual, in place": lambda: Residual(0.1),
    "residual": lambda: Residual(0.1, in_place=False),
    "two of one": lambda: Pair(),
    "one layer in two places": lambda: Pair(same=True),
    "one weight in two layers": lambda: Pair(tied=True),
    "frozen": lambda: frozen(mlp((1, 8, 8), CLASSES, widths=[9, 7])),
}
ACTIVATIONS = {kind.__name__: kind for kind in ELEMENTWISE} | {
    "CELU: alpha": partial(nn.CELU, alpha=0.5),
    "GELU: tanh": partial(nn.GELU, approximate="tanh"),
    "Hardtanh: ends": partial(nn.Hardtanh, -0.5, 2.0),
    "LeakyReLU: slope": partial(nn.LeakyReLU, 0.3),
    "ReLU: in place": partial(nn.ReLU, inplace=True),
    "Softplus: beta": partial(nn.Softplus, beta=2.0, threshold=3.0),
}
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    **{" ".join(f.__name__ for f in some): (partial(_each, some), 256) for some in batched(ALIKE)},
    "leaky_relu: slope": (lambda x: F.leaky_relu(x, 0.3), 256),
    "gelu: tanh": (lambda x: F.gelu(x, approximate="tanh"), 256),
    "methods": (lambda x: x.relu().add(x.sigmoid()).mul(x.tanh()), 256),
    "methods in place": (lambda x: (x * 2).add_(1).mul_(x), 256),
    "operators": (lambda x: (1 - x) * x * 0.5 + (x - 2), 256),
    "torch's operators": (lambda x: torch.mul(torch.add(x, 1), x), 256),
    "operators in place": (lambda x: _in_place(x), 256),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), 64),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), 64),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), 8),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), 36),
    "flatten": (lambda x: x.flatten(start_dim=1), 256),
}


def _in_place(x: Tensor) -> Tensor:
    y = torch.tanh(x) + 1
    y += x
    y *= x
    return y


MODELS = (
    LAYERS
    | {
        " ".join(some): lambda some=some: images(*activations(some), flat=activations(some))
        for some in batched(ACTIVATIONS)
    }
    | {f"{name}()": lambda call=call: Calls(*call) for name, call in CALLS.items()}
)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_a_stack_train_as_each_alone(splits: Splits, name: str) -> None:
    trial = Trial(splits=splits, build=MODELS[name], optimizer=_adamw, lr=0.01, epochs=3)
    trials = trial.several(2)
    expected = [trial.by_plain_torch() for trial in trials]
    assert apart(together(trials), expected) <= EQUAL
    assert min(abs(curve[-1][0] - curve[0][0]) for curve in expected) > 1e-4  # something was trained


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)


#: tests/train/stack/test_kinds_of_input.py has them.
OF_OTHER_INPUTS = (nn.Conv1d, *POOLS_1D, *NUMBERS, CategoryEmbedding, TokenEmbedding)


def test_every_rule_and_function_is_among_the_models() -> None:
    used = {type(module) for build in LAYERS.values() for module in build().modules()}
    assert set(RULES) - set(ELEMENTWISE) - set(OF_OTHER_INPUTS) <= used | {Dropout}
    assert {Shaped, SwiGLU, StochasticDepth} <= used
    assert set(POOLS) <= used
    assert {function.__name__ for function in (*ALIKE, *SPATIAL)} <= set(" ".join(CALLS).split())
    assert {target for target in (*FUNCTIONS, *TOGETHER) if isinstance(target, str)} == {
        *("relu", "sigmoid", "tanh", "add", "add_", "mul", "mul_"),
    }


@pytest.mark.parametrize("name", ["cnn", "residual", "batch norm 2d", "layer norm of images", "dropout of images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_have_the_models_type(splits: Splits, name: str, dtype: torch.dtype) -> None:
    """Nothing is promoted on the way: a stack in float32 is one in float32."""
    run = Trial(splits=splits, build=MODELS[name], dtype=dtype, epochs=1).run()
    stack = stacks.stack_of([run])
    seen = []
    gradients = stack._gradients
    forward = gradients._forward
    gradients._forward = lambda at, x: seen.append(forward(at, x)) or seen[-1]  # type: ignore[assignment]
    stack.train_epoch()
    assert {logits.dtype for logits in seen} == {dtype}


class Forwards(nn.Module):
    """A user's model with a layer and a forward of its own."""

    def __init__(self, forward: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Linear(64, CLASSES)
        self.other = nn.Linear(CLASSES, CLASSES)
        self.scale = nn.Parameter(torch.ones(()))
        self.called = forward

    def forward(self, x: Tensor) -> Any:
        return self.called(self, x)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(1) * mask)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lstm": (
        lambda: Forwards(lambda m, x: m.layer(x.flatten(1))[0], nn.LSTM(64, CLASSES)),
        r"layer layer \(LSTM\) has no stacked form",
    ),
    "attention": (
        lambda: Forwards(lambda m, x: m.layer(x, x, x)[0], nn.MultiheadAttention(8, 2)),
        r"layer layer \(MultiheadAttention\) has no stacked form",
    ),
    "F.dropout": (lambda: Forwards(lambda m, x: m.layer(F.dropout(x.flatten(1)))), "dropout .* has no stacked form"),
    "x.view": (lambda: Forwards(lambda m, x: m.layer(x.view(-1, 64))), r"view \(at view\) has no stacked form"),
    "x.size": (lambda: Forwards(lambda m, x: m.layer(x.view(x.size(0), -1))), r"size \(at size\) has no stacked form"),
    "x.mean": (lambda: Forwards(lambda m, x: m.layer(x.mean((2, 3)))), "mean .* has no stacked form"),
    "a parameter used directly": (
        lambda: Forwards(lambda m, x: m.layer(x.flatten(1)) * m.scale),
        r"scale \(at scale\) is used outside of a layer",
    ),
    "two inputs": (lambda: TwoInputs(64, CLASSES), "takes more than one input"),
    "a shape that decides": (
        lambda: Forwards(lambda m, x: m.layer(x.flatten(1)) if x.sum() > 0 else x),
        "torch.fx cannot trace the model: TraceError",
    ),
    "circular padding": (lambda: images(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "pads by circular"),
    "an average of all batches": (lambda: dense(nn.BatchNorm1d(12, momentum=None)), r"momentum = None"),
    "Dropout2d": (lambda: images(nn.Dropout2d(0.2)), r"layer 1 \(Dropout2d\) has no stacked form"),
    "RReLU": (lambda: dense(RReLU()), r"layer 2 \(RReLU\) has no stacked form"),
    "PReLU": (lambda: dense(nn.PReLU()), r"layer 2 \(PReLU\) has no stacked form"),
    "a subclass": (lambda: dense(type("Mine", (nn.Linear,), {})(12, 12)), "is used outside of a layer"),
    "a parametrization": (
        lambda: dense(nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))),
        "has no stacked form|is used outside|cannot trace",
    ),
    "softmax": (lambda: dense(nn.Softmax(1)), "Softmax"),
    "images returned": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3)), "does not return flat outputs"),
    "a tuple returned": (lambda: Forwards(lambda m, x: (m.layer(x.flatten(1)), x)), "does not return flat outputs"),
    "a dict returned": (lambda: Forwards(lambda m, x: {"y": m.layer(x.flatten(1))}), "does not return flat outputs"),
    "linear on images": (lambda: nn.Sequential(nn.Linear(8, 8), *dense()), "is applied to images"),
    "batch norm 1d on images": (lambda: nn.Sequential(nn.BatchNorm1d(8), *dense()), "is applied to images"),
    "conv on flat features": (lambda: dense(nn.Conv2d(1, 1, 1)), "is applied to flat features"),
    "pool of flat features": (lambda: dense(nn.MaxPool2d(2)), "is applied to flat features"),
    "F.max_pool2d of flat features": (
        lambda: Forwards(lambda m, x: m.layer(F.avg_pool2d(x.flatten(1), 1))),
        "pools values that are not images",
    ),
    "layer norm of rows": (lambda: images(nn.LayerNorm([8, 8])), "is applied to images"),
    "indices": (lambda: nn.Sequential(nn.MaxPool2d(2, return_indices=True), *dense()), "returns indices too"),
    "flattened from the second": (lambda: nn.Sequential(nn.Flatten(2), *dense()), "flattens other dimensions"),
    "flattened as a whole": (lambda: Forwards(lambda m, x: m.layer(torch.flatten(x))), "flattens other dimensions"),
    "a named argument": (lambda: Forwards(lambda m, x: m.layer(torch.relu(input=x.flatten(1)))), "by keyword"),
    "a layer's named argument": (lambda: Forwards(lambda m, x: m.layer(input=x.flatten(1))), "has no stacked form"),
    "images and features added": (
        lambda: Forwards(lambda m, x: x + m.layer(x.flatten(1))),
        "joins an image and flat features",
    ),
    "alpha": (lambda: Forwards(lambda m, x: m.layer(torch.add(x, x, alpha=2).flatten(1))), "more than two values"),
    "a computed slope": (
        lambda: Forwards(lambda m, x: F.leaky_relu(m.layer(x.flatten(1)), m.other(m.layer(x.flatten(1))))),
        "a computed value where a constant is needed",
    ),
    "a tensor of the model's own": (
        lambda: Forwards(lambda m, x: m.layer(x.flatten(1)) + torch.ones(CLASSES)),
        "is used outside of a layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_stacked_form_is_told(splits: Splits, name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(Unstackable, match=message):
        StackedForward(build())


def test_a_forward_leaves_its_model_as_it_is(splits: Splits) -> None:
    model = replace(Trial(splits=splits), build=lambda: Residual(0.1)).model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    StackedForward(model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
