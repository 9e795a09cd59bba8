"""Norms, initial weights, shortcuts and dropout of the mlp and the cnn, each by its formula or its statistic."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.models import Dropout, cnn, mlp
from hpo.models.blocks import Residual
from hpo.models.depth import StochasticDepth, rates
from hpo.models.inits import INITS, Init, fit_to, layers
from hpo.models.norms import norm
from hpo.models.preparing import Preparation, prepare, train_autoencoder

SHAPE, CLASSES = (1, 8, 8), 10


def endless(images: Tensor) -> Any:
    while True:
        yield images


def standard(x: Tensor, dims: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """Normalise over these dimensions."""
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, keepdim=True, unbiased=False) + eps).sqrt()


NORMS: dict[str, tuple[Any, Any, Any]] = {  # kind and options, formula of features, formula of images
    "batch": (("batch", {}), lambda x: standard(x, (0,)), lambda x: standard(x, (0, 2, 3))),
    "batch, eps": (
        ("batch", {"norm_eps": 0.5}),
        lambda x: standard(x, (0,), 0.5),
        lambda x: standard(x, (0, 2, 3), 0.5),
    ),
    "layer": (("layer", {}), lambda x: standard(x, (1,)), lambda x: standard(x, (1, 2, 3))),
    "layer, eps": (
        ("layer", {"norm_eps": 0.5}),
        lambda x: standard(x, (1,), 0.5),
        lambda x: standard(x, (1, 2, 3), 0.5),
    ),
    "group": (
        ("group", {"groups": 4}),
        lambda x: standard(x.unflatten(1, (4, 3)), (2,)).flatten(1),
        lambda x: standard(x.unflatten(1, (4, 3)), (2, 3, 4)).flatten(1, 2),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_formula_on_features_and_on_images(name: str) -> None:
    (kind, options), of_features, of_images = NORMS[name]
    x = torch.randn(6, 12, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    [on_images], [on_features] = norm(kind, 12, "images", options), norm(kind, 12, "features", options)
    torch.testing.assert_close(on_images.double()(x), of_images(x))
    torch.testing.assert_close(on_features.double()(x[..., 0, 0]), of_features(x[..., 0, 0]))


def test_a_norm_takes_its_momentum_and_its_groups_fit_or_are_refused() -> None:
    [batch] = norm("batch", 3, "features", {"norm_momentum": 0.25})
    batch(torch.tensor([[1.0, 2, 3], [3, 4, 5]]))
    assert batch.running_mean.tolist() == [0.5, 0.75, 1.0]
    assert [norm("group", features, "features", {})[0].num_groups for features in (64, 12, 7)] == [8, 4, 1]
    with pytest.raises(ValueError, match=r"groups = 5 does not divide 12 features; give one of \[1, 2, 3, 4, 6, 12\]"):
        norm("group", 12, "images", {"groups": 5})
    assert norm("none", 12, "images", {}) == []


FAN_IN, FAN_OUT = 400, 300
BOUND = {"xavier": 6 / (FAN_IN + FAN_OUT), "kaiming": 6 / FAN_IN, "lecun": 3 / FAN_IN}  # squared, of the uniform ones


@pytest.mark.parametrize("name", [f"{kind}_{draw}" for kind in BOUND for draw in ("uniform", "normal")])
def test_scaled_inits_have_their_variance(name: Init) -> None:
    torch.manual_seed(0)
    weight = torch.empty(FAN_OUT, FAN_IN)
    INITS[name](weight)
    squared = BOUND[name.split("_")[0]]
    assert weight.var().item() == pytest.approx(squared / 3, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=5 * math.sqrt(squared / 3 / weight.numel()))
    if name.endswith("uniform"):
        assert weight.abs().max().item() == pytest.approx(math.sqrt(squared), rel=1e-3)
    else:
        assert weight.abs().max().item() > 1.2 * math.sqrt(squared)


def weights(build: Any, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [layer.weight.detach() for layer in layers(build(SHAPE, CLASSES, **options))]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_every_init_reaches_all_layers_of_both_models(build: Any) -> None:
    untouched = weights(build)
    assert all(torch.equal(a, b) for a, b in zip(untouched, weights(build, init="torch"), strict=True))
    for name in set(get_args(Init)) - {"torch"}:
        changed = weights(build, init=name)
        assert len(changed) == 3
        assert not any(torch.equal(a, b) for a, b in zip(untouched, changed, strict=True)), name


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_plain_inits_have_the_given_deviation(name: Init) -> None:
    first = weights(mlp, init=name, init_std=0.3, widths=[500])[0]
    assert first.std().item() == pytest.approx(0.3, rel=0.02)
    assert (first.abs().max().item() > 0.53) == (name == "normal")  # 0.3 * sqrt(3) = 0.52


def test_orthogonal_weights_have_orthonormal_rows() -> None:
    first = weights(mlp, init="orthogonal", widths=[20])[0]
    torch.testing.assert_close(first @ first.T, torch.eye(20), atol=1e-5, rtol=0)


def test_biases_begin_at_zero_if_asked_and_weights_stay() -> None:
    torch.manual_seed(0)
    model = mlp(SHAPE, CLASSES, norm="none", zero_biases=True)
    assert all(layer.bias is not None and not layer.bias.any() for layer in layers(model))
    assert all(torch.equal(a, layer.weight) for a, layer in zip(weights(mlp, norm="none"), layers(model), strict=True))


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_lsuv_brings_every_layers_output_to_variance_one(build: Any, activation: str) -> None:
    torch.manual_seed(0)
    images = 3 * torch.randn(64, *SHAPE)
    model = build(SHAPE, CLASSES, init="lsuv", norm="none", activation=activation)
    assert isinstance(vars(model)["preparation"], Preparation)
    assert prepare(model, endless(images)) is model
    assert "preparation" not in vars(model)
    assert model.training
    for layer in layers(model):
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _i, output, outputs=outputs: outputs.append(output))
        model(images)
        handle.remove()
        assert outputs[0].var().item() == pytest.approx(1, abs=0.1)


def test_lsuv_leaves_a_layer_alone_whose_output_does_not_vary() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    before = model[1].weight.clone()
    fit_to(model, torch.zeros(5, *SHAPE))
    assert torch.equal(model[1].weight, before)


def test_nothing_is_taken_from_the_images_where_nothing_needs_them() -> None:
    prepare(mlp(SHAPE, CLASSES), iter(()))
    prepare(nn.Linear(2, 2), iter(()))


@pytest.mark.parametrize("build", [mlp, cnn])
def test_an_autoencoder_trains_all_but_the_head_and_restores_better(build: Any) -> None:
    torch.manual_seed(0)
    model = build(SHAPE, CLASSES, pretrain="autoencoder", pretrain_steps=60, freeze=1, input_dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    images = torch.randn(64, 4) @ torch.randn(4, 64)  # of four factors
    losses = train_autoencoder(model, endless(images.view(-1, *SHAPE)), 60, 1e-2)
    assert losses[-1] < 0.7 * losses[0]
    *_, weight, bias = before
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(before[name], tensor)}
    assert changed == set(before) - {weight, bias}
    assert not next(model.parameters()).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_an_autoencoder_wants_a_linear_head() -> None:
    with pytest.raises(ValueError, match="needs a model whose last layer is linear, not Conv2d"):
        train_autoencoder(nn.Sequential(nn.Conv2d(1, 1, 1)), endless(torch.zeros(1, *SHAPE)), 1, 0.1)


def test_depth_repeats_the_blocks_of_each_entry() -> None:
    assert [m.out_features for m in layers(mlp(SHAPE, CLASSES, widths=[9, 5], depth=2))] == [9, 9, 5, 5, CLASSES]
    model = cnn(SHAPE, CLASSES, channels=[3, 4], depth=2)
    convolutions = [m for m in model.children() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    assert [getattr(m, "out_channels", "pool") for m in convolutions] == [3, 3, "pool", 4, 4, "pool"]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_a_residual_block_maps_its_input(build: Any) -> None:
    """A residual block adds its input through a map where sizes differ."""
    sizes = {"widths": [6, 6]} if build is mlp else {"channels": [6, 6]}
    model = build(SHAPE, CLASSES, residual=True, activation="tanh", **sizes).eval()
    first, second = [module for module in model if isinstance(module, Residual)]
    assert [type(block.shortcut) is nn.Identity for block in (first, second)] == [False, True]
    x = torch.randn(4, 6) if build is mlp else torch.randn(4, 6, 4, 4)
    torch.testing.assert_close(second(x), x + second.body(x))


def test_stochastic_depth_drops_whole_images_evenly_more_with_depth() -> None:
    model = mlp(SHAPE, CLASSES, widths=[6], depth=4, residual=True, stochastic_depth=0.4)
    assert [m.mask.p for m in model.modules() if isinstance(m, StochasticDepth)] == rates(0.4, 4)
    assert rates(0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    layer = StochasticDepth(0.3)
    layer.mask.generator = torch.Generator().manual_seed(0)
    kept = layer(torch.ones(20_000, 2, 3, 1))
    by_image = kept.flatten(1)
    assert torch.equal(by_image, by_image[:, :1].expand(-1, 6))
    assert by_image[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-4)
    assert (by_image[:, 0] > 0).double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 20_000))
    x = torch.ones(3, 2)
    assert layer.eval()(x) is x


def test_dropout_stands_at_the_input_and_in_the_blocks_if_asked_for() -> None:
    model = cnn(SHAPE, CLASSES, input_dropout=0.1, block_dropout=0.2, dropout=0.3)
    assert [m.p for m in model.children() if isinstance(m, Dropout)] == [0.1, 0.2, 0.2, 0.3]
    assert isinstance(model[0], Dropout)
    assert [m.p for m in mlp(SHAPE, CLASSES, input_dropout=0.1, dropout=0.2).children() if isinstance(m, Dropout)] == [
        0.1,
        0.2,
        0.2,
    ]
    assert not any(isinstance(m, Dropout) and m.p for m in mlp(SHAPE, CLASSES).modules())


def test_what_is_not_asked_for_changes_nothing() -> None:
    """Studies from before these options go on: the same layers, under the same names, with the same weights."""
    torch.manual_seed(0)
    model = mlp(SHAPE, CLASSES, widths=[5], dropout=0.1)
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), Dropout(0.1), nn.Linear(5, CLASSES)
    )
    assert str(model) == str(plain)
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in plain.state_dict().items()
    }
    assert vars(model).keys() == vars(plain).keys()
    assert F.cross_entropy(model(torch.randn(4, *SHAPE)), torch.arange(4)).isfinite()
