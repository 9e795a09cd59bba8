"""Every activation is torch's, or its formula, and its gradient too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.models import mlp, use_generator
from hpo.models.activations import ACTIVATIONS, Activation, RReLU, Shaped, SwiGLU

X = torch.linspace(-4, 4, 202, dtype=torch.float64).view(2, -1)  # without 0, where slopes break

#: By name and options: what it is equal to.
EXPECTED: dict[tuple[str, tuple[tuple[str, Any], ...]], Callable[[Tensor], Tensor]] = {
    ("relu", ()): F.relu,
    ("gelu", ()): F.gelu,
    ("silu", ()): F.silu,
    ("sigmoid", ()): torch.sigmoid,
    ("tanh", ()): torch.tanh,
    ("softplus", ()): F.softplus,
    ("softplus", (("beta", 2.5),)): lambda x: F.softplus(x, beta=2.5),
    ("leaky_relu", ()): F.leaky_relu,
    ("leaky_relu", (("negative_slope", 0.25),)): lambda x: F.leaky_relu(x, 0.25),
    ("prelu", ()): lambda x: F.prelu(x, x.new_tensor([0.25])),
    ("prelu", (("negative_slope", 0.5),)): lambda x: F.prelu(x, x.new_tensor([0.5])),
    ("elu", ()): F.elu,
    ("elu", (("alpha", 1.5),)): lambda x: F.elu(x, 1.5),
    ("selu", ()): F.selu,
    ("swish", ()): F.silu,
    ("swish", (("beta", 1.75),)): lambda x: x / (1 + torch.exp(-1.75 * x)),
    ("swish", (("beta", 1.75), ("learn_beta", True))): lambda x: x / (1 + torch.exp(-1.75 * x)),
    ("swiglu", ()): lambda x: x[:, :50] * torch.sigmoid(x[:, :50]) * x[:, 50:],
    ("mish", ()): F.mish,
    ("relu2", ()): lambda x: F.relu(x) ** 2,
    ("hardsigmoid", ()): F.hardsigmoid,
    ("hardtanh", ()): F.hardtanh,
    ("hardswish", ()): F.hardswish,
    ("rrelu", ()): lambda x: F.rrelu(x, training=False),
    ("rrelu", (("lower", 0.25), ("upper", 0.75))): lambda x: F.rrelu(x, 0.25, 0.75, training=False),
}


def test_every_name_is_in_the_table_and_has_a_test() -> None:
    assert list(ACTIVATIONS) == list(get_args(Activation))
    assert {name for name, _ in EXPECTED} == set(ACTIVATIONS)


@pytest.mark.parametrize(("name", "options"), EXPECTED)
def test_an_activation_is_its_formula(name: Activation, options: tuple[tuple[str, Any], ...]) -> None:
    x = (X[:, :100] if name == "swiglu" else X).clone().requires_grad_()
    module = ACTIVATIONS[name](dict(options)).double().eval()
    y, expected = module(x), EXPECTED[name, options](x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_shapes_that_are_learned_are_parameters_and_the_others_buffers() -> None:
    learned = [ACTIVATIONS["prelu"]({}), ACTIVATIONS["swish"]({"learn_beta": True})]
    fixed = [ACTIVATIONS["swish"]({}), ACTIVATIONS["elu"]({"alpha": 2.0})]
    assert [[name for name, _ in m.named_parameters()] for m in (*learned, *fixed)] == [["shape"], ["shape"], [], []]
    assert [list(m.state_dict()) for m in (*learned, *fixed)] == [["shape"], ["shape"], [], []]


def test_rrelu_draws_slopes_from_its_generator() -> None:
    """Rrelu draws even slopes for negative elements from its generator."""
    count = 100_000
    module = RReLU(0.2, 0.6, torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    slopes = -module(torch.full((count,), -1.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.2 <= slopes.min() < 0.2001
    assert 0.5999 < slopes.max() <= 0.6
    spread = 0.4 / math.sqrt(12)
    assert slopes.mean().item() == pytest.approx(0.4, abs=5 * spread / math.sqrt(count))
    assert slopes.std().item() == pytest.approx(spread, rel=0.02)
    again = RReLU(0.2, 0.6, torch.Generator().manual_seed(3))
    assert torch.equal(-again(torch.full((count,), -1.0)), slopes)
    assert torch.equal(module(torch.ones(9)), torch.ones(9))
    with pytest.raises(ValueError, match=r"lower = 0.5 is greater than upper = 0.25; swap them"):
        RReLU(0.5, 0.25)


def test_one_generator_serves_rrelu_and_dropout_of_a_model() -> None:
    model, own = mlp((1, 8, 8), 10, activation="rrelu", dropout=0.5), torch.Generator()
    use_generator(model, own)
    assert sum(getattr(module, "generator", None) is own for module in model.modules()) == 4


def test_swiglu_is_fed_twice_as_many_features_as_it_gives() -> None:
    model = mlp((1, 8, 8), 10, widths=[12], activation="swiglu", norm="none")
    linear, head = [module for module in model.children() if isinstance(module, nn.Linear)]
    assert (linear.out_features, head.in_features) == (24, 12)
    assert torch.equal(SwiGLU()(torch.ones(1, 4, 2, 2)), F.silu(torch.ones(1, 2, 2, 2)))


def test_a_shape_keeps_the_type_of_what_it_is_applied_to() -> None:
    assert Shaped("leaky", 0.1)(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
