from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpo.models import MODELS, Dropout, adopt_dropout, cnn, mlp, use_generator
from hpo.models.dropout import LEVELS, fill_kept, kept_levels


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def noise(p: float, count: int, seed: int = 0) -> torch.Tensor:
    return Dropout(p, generator(seed))(torch.ones(count))


@pytest.mark.parametrize("name", ["cnn", "mlp"])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_every_model_turns_images_into_one_logit_per_class(name: str, norm: str, activation: str) -> None:
    model = MODELS[name]((3, 9, 12), 7, dropout=0.5, norm=norm, activation=activation)
    logits = model(torch.randn(4, 3, 9, 12))
    assert logits.shape == (4, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_mlp_is_linear_norm_activation_dropout_per_width() -> None:
    hidden = ["Linear", "BatchNorm1d", "GELU", "Dropout"]
    assert kinds(mlp((1, 8, 8), 10, widths=[5, 4], activation="gelu")) == ["Flatten", *hidden, *hidden, "Linear"]
    assert kinds(mlp((1, 8, 8), 10, widths=[])) == ["Flatten", "Linear"]


def test_the_cnn_halves_the_image_at_every_stage() -> None:
    model = cnn((1, 8, 8), 10, channels=[4, 6], norm="none")
    stage = ["Conv2d", "MaxPool2d", "ReLU"]
    assert kinds(model) == [*stage, *stage, "Flatten", "Dropout", "Linear"]
    assert model[-1].in_features == 6 * 2 * 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_relu_behind_its_pooling_is_the_relu_before_it_to_the_last_bit(channels_last: bool) -> None:
    model = cnn((3, 16, 16), 10, channels=[8, 8], depth=2, norm="batch")
    layers = list(model.children())
    assert kinds(model)[:7] == [
        *("Conv2d", "BatchNorm2d", "ReLU"),
        *("Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"),
    ]
    swapped = {5: layers[6], 6: layers[5], 12: layers[13], 13: layers[12]}
    usual = nn.Sequential(*(swapped.get(place, layer) for place, layer in enumerate(layers)))
    images = torch.randn(32, 3, 16, 16)
    images = images.to(memory_format=torch.channels_last) if channels_last else images

    def outcome(model: nn.Module) -> list[torch.Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    assert all(map(torch.equal, outcome(model), outcome(usual)))


def test_a_dropout_or_another_activation_stays_before_the_pooling() -> None:
    dropping = cnn((1, 8, 8), 10, channels=[4], norm="none", block_dropout=0.5)
    assert kinds(dropping)[:4] == ["Conv2d", "ReLU", "Dropout", "MaxPool2d"]
    gelu = cnn((1, 8, 8), 10, channels=[4], norm="none", activation="gelu")
    assert kinds(gelu)[:3] == ["Conv2d", "GELU", "MaxPool2d"]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_layers_before_a_batch_norm_have_no_bias(build) -> None:
    for norm, biased in (("batch", False), ("none", True)):
        *hidden, last = [m for m in build((1, 8, 8), 10, norm=norm).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert [layer.bias is not None for layer in hidden] == [biased] * 2
        assert last.bias is not None


def test_too_many_poolings_are_refused_with_the_number_that_fits() -> None:
    cnn((1, 8, 9), 10, channels=[2, 2, 2])
    with pytest.raises(ValueError, match=r"channels = \[2, 2, 2, 2\].*8x9 pixels 4 times.*at most 3 entries"):
        cnn((1, 8, 9), 10, channels=[2, 2, 2, 2])


def test_dropout_is_the_identity_without_p_and_in_eval_mode() -> None:
    x = torch.randn(5)
    assert Dropout(0.0)(x) is x
    assert Dropout(1e-6)(x) is x  # less than half a level
    assert Dropout(0.5).eval()(x) is x


def test_dropout_draws_nothing_where_it_drops_nothing() -> None:
    own = generator(3)
    Dropout(0.0, own)(torch.ones(8))
    Dropout(0.5, own).eval()(torch.ones(8))
    assert torch.equal(own.get_state(), generator(3).get_state())


def test_dropout_of_everything_is_zero_and_not_nan() -> None:
    assert torch.equal(noise(1.0, 9), torch.zeros(9))


def test_dropout_refuses_a_p_that_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"p = 1.5 is not a probability"):
        Dropout(1.5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.73])
def test_kept_elements_are_scaled_by_the_exact_inverse(p: float) -> None:
    """Kept elements are scaled by the exact inverse of the quantised probability."""
    kept = kept_levels(p)
    assert abs(kept / LEVELS - (1 - p)) <= 0.5 / LEVELS
    assert set(noise(p, 1000).tolist()) == {0.0, torch.tensor(LEVELS / kept).item()}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_have_the_mean_and_variance_of_bernoulli_draws(p: float) -> None:
    count = 400_000
    values = noise(p, count).double()
    variance = p / (1 - p)
    assert values.mean().item() == pytest.approx(1.0, abs=5 * (variance / count) ** 0.5)
    assert values.var().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("lane", range(4))
def test_each_lane_of_a_word_is_unbiased_and_independent_of_the_next(lane: int) -> None:
    count, p = 100_000, 0.3
    kept = fill_kept(torch.empty(count, 4), kept_levels(p), generator(11)).double()
    bound = 5 * (p * (1 - p) / count) ** 0.5
    assert kept[:, lane].mean().item() == pytest.approx(1 - p, abs=bound)
    both = (kept[:, lane] * kept[:, (lane + 1) % 4]).mean().item()
    assert both == pytest.approx((1 - p) ** 2, abs=5 * (0.25 / count) ** 0.5)


def test_masks_depend_on_the_generator_alone() -> None:
    assert torch.equal(noise(0.5, 999, seed=1), noise(0.5, 999, seed=1))
    assert not torch.equal(noise(0.5, 999, seed=1), noise(0.5, 999, seed=2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise(0.5, 999)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mask_drawn_into_a_slot_of_a_stack_is_the_mask_drawn_alone() -> None:
    stack = torch.empty(3, 10, 7)
    for slot in range(3):
        fill_kept(stack[slot], 40_000, generator(slot))
    assert torch.equal(stack[2], fill_kept(torch.empty(10, 7), 40_000, generator(2)))


def test_a_channels_last_input_gets_the_same_mask() -> None:
    x = torch.randn(2, 3, 4, 5)
    plain = Dropout(0.5, generator(0))(x)
    assert torch.equal(Dropout(0.5, generator(0))(x.to(memory_format=torch.channels_last)), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_keeps_the_type_and_the_mask_in_every_float(dtype: torch.dtype) -> None:
    out = Dropout(0.3, generator(0))(torch.ones(100, dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out != 0, noise(0.3, 100) != 0)


def test_gradients_pass_where_elements_were_kept() -> None:
    x = torch.ones(50, requires_grad=True)
    out = Dropout(0.4, generator(0))(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_one_generator_serves_every_dropout_of_a_model() -> None:
    model, own = mlp((1, 8, 8), 10), generator(0)
    use_generator(model, own)
    assert [m.generator is own for m in model.modules() if isinstance(m, Dropout)] == [True, True]
    assert not any("generator" in key for key in model.state_dict())


def test_a_model_with_generators_can_be_copied() -> None:
    model = mlp((1, 8, 8), 10, dropout=0.5)
    use_generator(model, generator(0))
    copy.deepcopy(model)(torch.randn(2, 1, 8, 8))


def test_dropouts_of_users_models_are_adopted_in_place_and_others_left() -> None:
    class Own(nn.Dropout):
        pass

    shared = nn.Dropout(0.25)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(2, 2), shared, nn.Dropout2d(0.5)), Own(0.5)).eval()
    assert adopt_dropout(model) is model
    first, inner, own = model
    assert type(first) is Dropout
    assert (first.p, first.training) == (0.25, False)
    assert inner[1] is first
    assert type(inner[2]) is nn.Dropout2d
    assert type(own) is Own
    assert type(adopt_dropout(nn.Dropout(0.5))) is Dropout
