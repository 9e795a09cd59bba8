from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.models import Dropout, use_generator
from hpo.train.stack.dropout_masks import DropoutMasks
from hpo.train.stack.layers import RULES, Pass

SHAPES: dict[str, tuple[int, ...]] = {"dense": (7, 5), "images": (7, 3, 4, 5)}  # of one run's values, the batch first


def run(seed: int, *shares: float) -> Any:
    """Return as much of a run as noise looks at: its dropout layers, named 0, 1, ..., and its generator."""
    model = nn.Sequential(*map(Dropout, shares))
    generator = torch.Generator().manual_seed(seed)
    use_generator(model, generator)
    return SimpleNamespace(model=model, randomness=SimpleNamespace(dropout=generator, masks=None))


def noise(runs: list[Any], count: int = 0, dtype: torch.dtype = torch.float32) -> DropoutMasks:
    made = DropoutMasks(count or len(runs), torch.device("cpu"), dtype)
    for row, one in enumerate(runs):
        if one is not None:
            made.of(row, one)
    made.draw_for(runs + [None] * (made.count - len(runs)))
    return made


def alone(seed: int, p: float, shape: tuple[int, ...], calls: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the layer of a run alone makes of ones, call after call."""
    one = run(seed, p)
    return torch.stack([one.model(torch.ones(shape, dtype=dtype)) for _ in range(calls)])


def stacked(x: Tensor, layout: str) -> Tensor:
    """Lay out values of K runs [K, B, ...] as a stack has them."""
    return x.transpose(1, 2) if layout == "dense" else x.transpose(0, 1).flatten(1, 2)


def masks(made: DropoutMasks, layout: str, filling: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the layer makes of ones in a stack."""
    batch, *rest = SHAPES[layout]
    operation, _ = RULES[Dropout](Dropout(), "0", layout)
    ones = torch.ones((made.count, batch + filling, *rest), dtype=dtype)
    return operation(Pass(made.count, {}, {}, True, made, filling), stacked(ones, layout))


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.1, 0.5, 0.73, 0.99999, 1.0])
def test_each_row_has_the_very_masks_of_its_run_alone(layout: str, dtype: torch.dtype, share: float) -> None:
    shares = [share, 0.3, share]
    made = noise([run(seed, p) for seed, p in enumerate(shares)], dtype=dtype)
    expected = [alone(seed, p, SHAPES[layout], 3, dtype) for seed, p in enumerate(shares)]
    for call in range(3):
        found = masks(made, layout, dtype=dtype)
        assert found.dtype == dtype
        assert torch.equal(found, stacked(torch.stack([one[call] for one in expected]), layout))


@pytest.mark.parametrize("layout", SHAPES)
def test_images_that_fill_a_batch_draw_nothing(layout: str) -> None:
    whole, filled = (masks(noise([run(1, 0.4), run(2, 0.2)]), layout, filling) for filling in (0, 9))
    dim = 2 if layout == "dense" else 0
    assert torch.equal(filled.narrow(dim, 0, 7), whole)


def test_where_no_row_drops_anything_nothing_is_drawn() -> None:
    runs = [run(1, 0.0), run(2, 0.0)]
    assert noise(runs).factors("0", 8) is None
    assert torch.equal(runs[0].randomness.dropout.get_state(), run(1).randomness.dropout.get_state())


def test_a_row_without_dropout_draws_nothing_beside_one_with() -> None:
    runs = [run(1, 0.0), run(2, 0.5)]
    factors = noise(runs).factors("0", 8)
    assert factors is not None
    assert factors[0].eq(1).all()
    assert torch.equal(runs[0].randomness.dropout.get_state(), run(1).randomness.dropout.get_state())
    assert not torch.equal(runs[1].randomness.dropout.get_state(), run(2).randomness.dropout.get_state())


def test_a_row_that_waits_keeps_its_generator() -> None:
    runs = [run(1, 0.5), run(2, 0.5)]
    made = noise(runs)
    made.draw_for([None, runs[1]])
    before = torch.get_rng_state()
    made.factors("0", 8)
    assert torch.equal(torch.get_rng_state(), before)
    made.draw_for(runs)
    factors = made.factors("0", 8)
    assert factors is not None
    assert torch.equal(factors[0], alone(1, 0.5, (8,))[0])
    assert torch.equal(factors[1], alone(2, 0.5, (8,), 2)[1])


def test_layers_have_shares_of_their_own() -> None:
    made = noise([run(1, 0.0, 0.5)])
    assert made.factors("0", 8) is None
    assert torch.equal(made.factors("1", 8), alone(1, 0.5, (1, 8)).view(1, 8))


def test_a_newcomer_has_its_own_share_in_a_row_that_was_anothers() -> None:
    made = noise([run(1, 0.9), run(2, 0.9)])
    made.factors("0", 8)
    newcomer = run(3, 0.2)
    made.of(0, newcomer)
    made.draw_for([newcomer, None])
    factors = made.factors("0", 64)
    assert factors is not None
    assert torch.equal(factors[0], alone(3, 0.2, (64,))[0])


def test_an_empty_stack_drops_nothing() -> None:
    assert DropoutMasks(2, torch.device("cpu"), torch.float32).factors("0", 8) is None
