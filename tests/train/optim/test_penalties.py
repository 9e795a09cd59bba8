"""Penalties are what differentiating the penalised loss gives; bounds are torch.renorm's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hpo.models import MODELS, cnn, mlp
from hpo.models.shapes import TableShape, TokenShape
from hpo.train import loop
from hpo.train.optim.penalties import Penalties, units_of, weights_of
from tests.support import stacks
from tests.support.stacks import CLASSES, Trial, apart, numbers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm([3, 4])
        self.up = nn.ConvTranspose2d(2, 3, 2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return cnn((1, 8, 8), CLASSES, channels=[3, 4]).double()


def penalised(penalties: Penalties, net: nn.Module) -> Tensor:
    weights = [p for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear) for p in [module.weight]]
    return sum(
        (penalties.l1 * w.abs().sum() + penalties.l2 / 2 * w.square().sum() for w in weights), start=torch.zeros(())
    )


@pytest.mark.parametrize("penalties", [Penalties(l1=0.1), Penalties(l2=0.2), Penalties(l1=0.3, l2=0.1), Penalties()])
def test_the_gradient_is_that_of_the_penalised_loss(penalties: Penalties) -> None:
    one, other, images = model(), model(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    one(images).square().sum().backward()
    penalties.add_to_gradients(list(weights_of(one, one.parameters()).values()))
    (other(images).square().sum() + penalised(penalties, other)).backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("penalties", "weights", "units"),
    [(Penalties(), 0, 0), (Penalties(l1=0.1), 3, 0), (Penalties(l2=0.1), 3, 0), (Penalties(max_norm=1.0), 3, 3)],
)
def test_when_a_model_is_searched_for_weights(penalties: Penalties, weights: int, units: int) -> None:
    """A model is searched for weights only where something is done to them."""
    net = model()
    assert [len(found) for found in penalties.targets(net, list(net.parameters()))] == [weights, units]


def test_weights_are_what_biases_and_norms_are_not() -> None:
    net = model()
    found = weights_of(net, net.parameters())
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert list(found) == [f"{layer}.weight" for layer in layers]
    frozen = next(iter(found.values()))
    frozen.requires_grad_(False)
    assert len(weights_of(net, net.parameters())) == len(found) - 1
    assert weights_of(net, list(net.parameters())[-2:]).keys() == {list(found)[-1]}


def test_units_are_outputs_and_channels_and_tokens_have_none() -> None:
    net = Attention()
    assert units_of(net, net.parameters()) == {
        "attention.in_proj_weight": 0,
        "attention.out_proj.weight": 0,
        "up.weight": 1,
    }


def test_embeddings_of_a_table_and_of_words_have_no_units() -> None:
    table = mlp(TableShape(numbers=2, categories=(3,)), 2, widths=[4], embedding="periodic", norm="none")
    words = MODELS["gru"](TokenShape(length=5, vocabulary=7), 2, width=4)
    assert units_of(table, table.parameters()).keys() == {"1.weight", "4.weight"}
    of_layer = {f"layers.0.ahead.weight_{kind}" for kind in ("ih", "hh")}
    assert units_of(words, words.parameters()).keys() == {*of_layer, "head.weight"}


def test_a_bound_scales_each_long_unit_down_to_it_and_leaves_the_others() -> None:
    net, limit = model(), 0.6
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    units = units_of(net, net.parameters())
    weights = dict(net.named_parameters())
    Penalties(max_norm=limit).bound([(weights[name], dimension) for name, dimension in units.items()])
    scaled = 0
    for name, tensor in net.state_dict().items():
        if name not in units:
            assert torch.equal(tensor, before[name])
            continue
        for mine, theirs in zip(tensor, before[name], strict=True):
            is_long = theirs.norm() > limit
            torch.testing.assert_close(mine, theirs * limit / theirs.norm() if is_long else theirs, rtol=1e-6, atol=0)
            scaled += int(is_long)
    assert 0 < scaled < sum(len(before[name]) for name in units)


def test_l2_is_coupled_weight_decay_of_the_weights() -> None:
    def decayed(parameters: object, lr: float) -> torch.optim.Optimizer:
        given = list(parameters)  # type: ignore[call-overload]
        groups = [
            {"params": [p for p in given if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in given if p.ndim < 2]},
        ]
        return torch.optim.SGD(groups, lr=lr)

    trial = Trial(splits=stacks.digits(), epochs=3)
    expected = numbers(loop.train(replace(trial, optimizer=decayed).run()))
    assert apart(numbers(loop.train(replace(trial, options={"penalised": Penalties(l2=0.1)}).run())), expected) <= 1e-10


def test_penalties_come_before_the_gradient_is_clipped() -> None:
    trial = Trial(splits=stacks.digits(), epochs=1, options={"penalised": Penalties(l1=100.0), "clip_norm": 1e-3})
    run = trial.run()
    before = [p.detach().clone() for p in run.model.parameters()]
    list(loop.train(run))
    moved = torch.stack([(p - b).norm() for p, b in zip(run.model.parameters(), before, strict=True)]).norm()
    assert moved <= trial.steps * trial.lr * 1e-3 * (1 + 1e-6)
