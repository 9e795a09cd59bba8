"""Models that the hand-stacked form does not know, trained as one by vmap: equal to the loop, or refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from hpo.data import Splits
from hpo.models import adopt_dropout, mlp
from hpo.train import loop
from hpo.train.epoch import EpochResult
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import cosine
from hpo.train.randomness import initial_model
from hpo.train.run import Run
from hpo.train.stack.dropout_masks import DropoutMasks
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Pass, Unstackable
from hpo.train.stack.stack import Stack
from hpo.train.stack.vmap_forward import VmapForward

EPOCHS, BATCH, STEPS = 10, 8, 10  # 100 steps; 84 training images, the last 4 of each order left out
PS = (0.0, 0.3, 0.6)  # dropout by run
CLASSES = 3


# --- models ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One of a vision transformer, with three layers of dropout."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.dropout = nn.Dropout(p)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(p), nn.Linear(12, width), nn.Dropout(p))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.after(x))


class Transformer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 5, 6) * 0.1)
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(Block(6, p), Block(6, p))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(self.dropout(x)))[:, 0])


class Attention(nn.Module):
    """Attention by hand: gradients come back transposed, as no parameter lies."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(8, 4) * 0.3) for _ in range(3))
        self.out = nn.Parameter(torch.randn(CLASSES, 32) * 0.3)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1).transpose(1, 2)
        q, k, v = x @ self.query, (self.key.t() @ x.mT).mT, torch.einsum("btc,cd->btd", x, self.value)
        weights = self.dropout(torch.softmax(q @ k.mT / 2.0, dim=-1))
        return (weights @ v).flatten(1) @ self.out.t()


class Mixed(nn.Module):
    """Views, means, concatenations, einsum, a bare parameter, PReLU, one dropout in three places."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.mix = nn.Parameter(torch.randn(4, 8, 6) * 0.2)
        self.first, self.second = nn.Linear(64, 6), nn.Linear(16, CLASSES)
        self.act = nn.PReLU(6)
        self.dropout = nn.Dropout(p)
        self.register_buffer("weights", torch.linspace(0, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.dropout(x.view(len(x), 8, 8) * self.scale)
        joined = torch.einsum("bik,hkj,h->bij", rows, self.mix, self.weights).mean(1)
        flat = self.act(self.first(x.reshape(len(x), -1)))
        y = torch.cat([self.dropout(joined), flat, x.mean((1, 2, 3), keepdim=False)[:, None].expand(-1, 4)], dim=1)
        return self.second(self.dropout(y))


class SqueezeExcite(nn.Module):
    """Depthwise convolutions whose channels are weighed by what they hold; batch norm; dropout of images."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.pointwise = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.last = nn.BatchNorm2d(8, momentum=0.3)
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.silu(self.norm(self.stem(x))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.dropout(F.hardswish(self.last(self.pointwise(scale * x))))
        return self.head(self.dropout(x.mean([2, 3])))


class Tokens(nn.Module):
    """Group norm of tokens and batch norm of [B, C, L]; an embedding that is its own inverse."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6, bias=False)
        self.back = nn.Linear(6, 8, bias=False)
        self.back.weight = nn.Parameter(torch.randn(8, 6) * 0.2)
        self.second = nn.Linear(6, 8, bias=False)
        self.second.weight = self.back.weight
        self.group, self.batch = nn.GroupNorm(2, 6), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)).transpose(1, 2)
        x = F.gelu(self.batch(self.dropout(self.group(x)))).transpose(1, 2)
        return self.head((self.back(x) - 0.5 * self.second(x.flip(1))).amax(1))


class WeightNormed(nn.Module):
    """A parametrized layer, whose class is its own, and whose operation vmap has no rule for."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(64, 6))
        self.second = nn.Linear(6, CLASSES)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x.flatten(1)))))


def small_resnet(p: float) -> nn.Module:
    """Return torchvision's ResNet with blocks of resnet18, one in each stage and an eighth as wide."""

    class Basic(BasicBlock):
        def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(inplanes, planes // 8, *args, **kwargs)

    class Narrow(ResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    model = Narrow(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.fc = nn.Sequential(nn.Dropout(p), nn.Linear(64, CLASSES))
    return model


def blocks(p: float) -> nn.Module:
    """Return residual blocks that are dropped image by image, with activations whose shapes differ from run to run."""
    return mlp(
        (1, 8, 8),
        CLASSES,
        widths=[6],
        depth=2,
        residual=True,
        stochastic_depth=p,
        norm="layer",
        activation="swish",
        beta=1.0 + p,
    )


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "transformer": Transformer,
    "attention by hand": Attention,
    "views, einsum, PReLU": Mixed,
    "squeeze and excite": SqueezeExcite,
    "tokens, tied weights": Tokens,
    "weight norm": WeightNormed,
    "resnet": small_resnet,
}


# --- runs -----------------------------------------------------------------------------------------------------------------


def make(
    splits: Splits,
    build: Callable[[], nn.Module],
    seed: int = 0,
    kind: str = "adamw",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Run:
    model = initial_model(build, seed).to(dtype)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": OPTIMIZERS[kind](model.parameters(), lr=0.002 * (seed + 1)),
        "schedule": cosine(EPOCHS * STEPS),
        "splits": splits,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "seed": seed,
    }
    return Run(**(options | changes))


def several(splits: Splits, build: Callable[[float], nn.Module], **changes: Any) -> list[Run]:
    return [make(splits, lambda p=p: build(p), seed=seed, **changes) for seed, p in enumerate(PS)]


def sample(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def train_stacked(runs: list[Run], slots: int | None = None) -> list[list[EpochResult]]:
    """Return each run's results."""
    forward = VmapForward(runs[0].model, sample(next(runs[0].model.parameters()).dtype))
    stack = Stack(forward, runs[0], slots or len(runs))
    for run in runs:
        stack.put(run)
    return [list(results) for results in zip(*(stack.train_epoch() for _ in range(runs[0].epochs)), strict=True)]


def distance(one: list[EpochResult], other: list[EpochResult]) -> float:
    return max(
        abs(a - b)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in (
            (mine.train_loss, theirs.train_loss),
            (mine.validation_loss, theirs.validation_loss),
            (mine.validation_accuracy, theirs.validation_accuracy),
        )
    )


def assert_equal_to_the_loop(alone: list[Run], together: list[Run], *, state: float = 1e-10) -> None:
    curves = train_stacked(together)
    for one, other, curve in zip(alone, together, curves, strict=True):
        assert distance(list(loop.train(one)), curve) < 1e-10
        expected = one.model.state_dict()
        for name, value in other.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=state, msg=name)


# --- equal to the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "sgd") for name in MODELS),
        ("transformer", "adamw"),
        *(pytest.param(name, "adamw", marks=pytest.mark.soak) for name in MODELS if name != "transformer"),
    ],
)
def test_runs_trained_as_one_are_those_trained_alone(splits: Splits, name: str, kind: str) -> None:
    build = MODELS[name]
    with pytest.raises(Unstackable):
        StackedForward(build(0.1))
    # AdamW makes steps of the rounding error where a gradient is 0 in exact numbers: a bias before batch norm or softmax.
    alone, together = (several(splits, build, kind=kind, epochs=3) for _ in range(2))
    assert_equal_to_the_loop(alone, together, state=1e-8 if kind == "adamw" else 1e-10)


def test_runs_that_come_and_go_are_those_trained_alone(splits: Splits) -> None:
    alone, together = several(splits, Transformer, epochs=4), several(splits, Transformer, epochs=4)
    stack = Stack(VmapForward(together[0].model, sample()), together[0], 3)
    stack.put(together[0])
    first = stack.train_epoch() + stack.train_epoch()
    stack.put(together[1])
    both = stack.train_epoch()
    stack.put(together[2])
    all_three = stack.train_epoch()
    stack.remove(together[0])
    stack.compact()
    left = [stack.train_epoch() for _ in range(2)]
    curves = [
        [*first, both[0], all_three[0]],
        [both[1], all_three[1], *(results[0] for results in left)],
        [all_three[2], *(results[1] for results in left)],
    ]
    for run, curve in zip(alone, curves, strict=True):
        assert distance([result for result, _ in zip(loop.train(run), curve, strict=False)], curve) < 1e-10


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", ["transformer", "squeeze and excite"])
def test_other_precisions_come_near(splits: Splits, name: str, precision: str, within: float) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "precision": precision, "epochs": 2, "kind": "sgd"}
    curves = train_stacked(several(splits, MODELS[name], **options))
    for run, curve in zip(several(splits, MODELS[name], **options), curves, strict=True):
        assert (
            distance(
                [dataclasses.replace(one, validation_accuracy=0.0) for one in loop.train(run)],
                [dataclasses.replace(one, validation_accuracy=0.0) for one in curve],
            )
            < within
        )


# --- what it leaves alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_all_generators_are_left_as_they_were(training: bool) -> None:
    model = initial_model(lambda: SqueezeExcite(0.3), 0).double().train(training)
    model.head.eval()
    dropout = torch.Generator()
    model.dropout.generator = dropout
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    modes = [module.training for module in modules]
    drawn = torch.get_rng_state(), dropout.get_state()
    VmapForward(model, sample())
    assert list(model.modules()) == modules
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert torch.equal(dropout.get_state(), drawn[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_python_s_generator_is_left_as_it_was() -> None:
    drawn = random.getstate()
    with pytest.raises(Unstackable):
        VmapForward(REFUSED["random"][0]().double(), sample())
    assert random.getstate() == drawn


def test_between_passes_it_holds_no_weights(splits: Splits) -> None:
    run = make(splits, lambda: Tokens(0.3))
    forward = VmapForward(run.model, sample())
    forward(passing(run, training=True), sample().expand(2, 4, 1, 8, 8))
    held = [*forward._copy.parameters(), *forward._copy.buffers()]
    assert held
    assert all(tensor.is_meta for tensor in held)


def passing(run: Run, *, training: bool) -> Pass:
    """Return a pass of two models, both of them this run's."""
    parameters = {name: torch.stack([p.detach()] * 2) for name, p in run.model.named_parameters()}
    buffers = {name: torch.stack([b] * 2) for name, b in run.model.named_buffers()}
    noise = DropoutMasks(2, torch.device("cpu"), torch.float64)
    for row in range(2):
        noise.of(row, run)
    noise.draw_for([run, None])
    return Pass(2, parameters, buffers, training, noise)


def test_a_pass_in_training_moves_running_statistics(splits: Splits) -> None:
    """A pass in training moves running statistics and leaves counting to the stack."""
    run = make(splits, lambda: SqueezeExcite(0.0))
    forward = VmapForward(run.model, sample())
    at = passing(run, training=True)
    forward(at, sample()[:2].expand(2, 2, 1, 8, 8))
    assert at.buffers["norm.num_batches_tracked"].tolist() == [0, 0]
    assert (at.buffers["norm.running_mean"] != 0).all()
    moved = {name: buffer.clone() for name, buffer in at.buffers.items()}
    logits = forward(Pass(2, at.parameters, at.buffers, False, at.noise), sample())
    assert logits.shape == (2, CLASSES, 4)
    assert all(torch.equal(buffer, moved[name]) for name, buffer in at.buffers.items())


def test_warnings_of_vmap_are_given_to_others_again(splits: Splits) -> None:
    VmapForward(make(splits, lambda: WeightNormed(0.0)).model, sample())
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(lambda v, g: torch._weight_norm(v, g, 0))(torch.ones(2, 3, 4), torch.ones(2, 3, 1))


def test_a_model_that_calls_its_dropout_otherwise_than_before_is_stopped(splits: Splits) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.linear = nn.Dropout(0.3), nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.dropout(x.flatten(1)) if moods["noisy"] else x.flatten(1))

    moods = {"noisy": False}
    run = make(splits, Moody)
    forward = VmapForward(run.model, sample())
    moods["noisy"] = True
    with pytest.raises(RuntimeError, match="other Dropout layers"):
        forward(passing(run, training=True), sample().expand(2, 4, 1, 8, 8))


# --- what it refuses ------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What the refused models have in common: a linear layer, and something before it or in its place."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)
        self.before = before or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.before(x).flatten(1))


def variant(forward: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    """Return a model with this forward and these attributes."""
    model = type("Variant", (Plain,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def logits(model: Any, x: Tensor) -> Tensor:
    return model.linear(x.flatten(1))


class Frozen(Plain):
    """Batch norm that stays in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.before.eval()
        return self


class Recurrent(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.before(x.squeeze(1))[0].flatten(1)], dim=1))


def hooked() -> nn.Module:
    model = Plain()
    model.linear.register_forward_hook(lambda *_: None)
    return model


def bound_to_itself() -> nn.Module:
    model = Plain()
    model.forward = lambda x: model.linear(x.flatten(1))  # type: ignore[method-assign]
    return model


def twice(model: Any, x: Tensor) -> Tensor:
    return logits(model, model.before(model.before(x)))


def branching(model: Any, x: Tensor) -> Tensor:
    y = logits(model, x)
    return y if y.mean() > 0 else -y


def with_item(model: Any, x: Tensor) -> Tensor:
    return logits(model, x) * logits(model, x).abs().max().item()


def checkpointed(model: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(model.linear, x.flatten(1), use_reentrant=False)


def counting(model: Any, x: Tensor) -> Tensor:
    model.passes += 1
    return logits(model, x)


def caching(model: Any, x: Tensor) -> Tensor:
    model.seen = logits(model, x)
    return model.seen


def making_a_layer(model: Any, x: Tensor) -> Tensor:
    if not hasattr(model, "late"):
        model.late = nn.Identity()
        model.late.register_buffer("mean", x.mean())
    return logits(model, x) + model.late.mean


def averaging(model: Any, x: Tensor) -> Tensor:
    model.average = 0.9 * model.average + x.mean()
    return logits(model, x) + model.average


def averaging_model() -> nn.Module:
    model = variant(averaging)
    model.register_buffer("average", torch.zeros((), dtype=torch.float64))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "if": (lambda: variant(branching), "torch.func.vmap cannot run the model: RuntimeError: vmap: It looks like"),
    "item": (lambda: variant(with_item), "torch.func.vmap cannot run the model: RuntimeError: vmap: It looks like"),
    "mask": (
        lambda: variant(lambda m, x: logits(m, x)[logits(m, x)[:, 0] > 0]),
        "torch.func.vmap cannot run the model",
    ),
    "checkpoint": (lambda: variant(checkpointed), "torch.func.vmap cannot run the model"),
    "F.dropout": (lambda: variant(lambda m, x: F.dropout(logits(m, x), 0.2)), "draws random numbers outside of"),
    "rand": (lambda: variant(lambda m, x: logits(m, x) + torch.rand(1)), "draws random numbers outside of"),
    "random": (lambda: variant(lambda m, x: logits(m, x) * random.random()), "draws from Python's random"),
    "Dropout2d": (lambda: Plain(nn.Dropout2d(0.0)), r"layer before \(Dropout2d\) draws its mask from torch's global"),
    "p": (lambda: variant(lambda m, x: logits(m, x) * m.before.p, before=nn.Dropout(0.0)), "no attribute 'p'"),
    "LSTM": (lambda: Recurrent(nn.LSTM(8, 8)), r"before\._flat_weights of LSTM holds tensors that are not registered"),
    "GRU": (lambda: Recurrent(nn.GRU(8, 8)), r"before\._flat_weights of GRU holds tensors that are not registered"),
    "spectral norm": (
        lambda: Plain(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 1, 1))),
        "cannot run the model: RuntimeError: Batching rule not implemented for aten::",
    ),
    "hooks": (hooked, r"layer linear \(Linear\) has hooks"),
    "own forward": (bound_to_itself, "the outputs do not depend on linear.weight, linear.bias"),
    "momentum": (lambda: Plain(nn.BatchNorm2d(1, momentum=None)), "averages over all batches"),
    "batch norm twice": (
        lambda: variant(twice, before=nn.BatchNorm2d(1)),
        "before.num_batches_tracked does not grow by 1 in a training pass",
    ),
    "frozen": (lambda: Frozen(nn.BatchNorm2d(1)), "before.num_batches_tracked does not grow by 1"),
    "instance norm": (
        lambda: Plain(nn.InstanceNorm2d(1, affine=True, track_running_stats=True)),
        "before.num_batches_tracked does not grow by 1",
    ),
    "tuple": (lambda: variant(lambda m, x: (logits(m, x), x)), r"returns tuple for 4 rows, not outputs"),
    "maps": (lambda: variant(lambda m, x: logits(m, x)[:, :, None]), r"returns \[4, 3, 1\] for 4 rows, not outputs"),
    "sum": (lambda: variant(lambda m, x: logits(m, x).sum()), r"returns \[\] for 4 rows, not outputs"),
    "lazy": (lambda: variant(logits, linear=nn.LazyLinear(3)), "linear.weight has no shape before the first pass"),
    "counting": (lambda: variant(counting, passes=0), "forward changes passes, which K models would share"),
    "caching": (lambda: variant(caching), "seen of Variant holds tensors that are not registered"),
    "making a layer": (lambda: variant(making_a_layer), "forward adds or removes late.mean"),
    "averaging": (averaging_model, "forward replaces the tensor average"),
    "tensor": (lambda: variant(logits, seen={"a": [torch.zeros(1)]}), "seen of Variant holds tensors that are not"),
    "hidden layers": (
        lambda: variant(logits, layers=[nn.Linear(3, 3)]),
        "layers of Variant holds tensors that are not",
    ),
    "unused": (lambda: variant(logits, more=nn.Linear(3, 3)), "the outputs do not depend on more.weight, more.bias"),
    "lock": (lambda: variant(logits, lock=threading.Lock()), "the model cannot be copied: TypeError: cannot pickle"),
    "nothing to train": (lambda: variant(lambda m, x: x.flatten(1), linear=nn.Identity()), "no parameters to train"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(name: str) -> None:
    build, message = REFUSED[name]
    model = adopt_dropout(build().double())
    with pytest.raises(Unstackable, match=message) as refusal:
        VmapForward(model, sample())
    assert "\n" not in str(refusal.value)


def test_residual_blocks_are_each_run_s_own(splits: Splits) -> None:
    """Residual blocks of ours are dropped and shaped by each run's own numbers."""
    assert_equal_to_the_loop(several(splits, blocks, kind="sgd"), several(splits, blocks, kind="sgd"))
