from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from hpo.train.optim import schedules
from hpo.train.optim.schedules import SCHEDULES, Rate

LR = 0.3
RELATIVE = 1e-12


def optimizer(kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=LR, **options)


def torchs_rates(given: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, length: int) -> list[Rate]:
    rates = []
    for _ in range(length):
        (group,) = given.param_groups
        rates.append(Rate(group["lr"] / LR, group["momentum"] if "momentum" in group else group["betas"][0]))
        given.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("length", [1, 2, 7, 200])
@pytest.mark.parametrize("final_factor", [0.01, 0.5, 1.0])
def test_cosine_is_torchs_at_every_step(length: int, final_factor: float) -> None:
    given = optimizer()
    theirs = torchs_rates(given, lr_scheduler.CosineAnnealingLR(given, length, eta_min=final_factor * LR), length)
    ours = schedules.cosine(length, final_factor=final_factor)
    assert [ours(step).factor for step in range(length)] == pytest.approx([r.factor for r in theirs], rel=RELATIVE)


def test_cosine_ends_at_its_final_factor() -> None:
    assert schedules.cosine(10)(10).factor == 0.0
    assert schedules.cosine(10, final_factor=0.25)(10).factor == 0.25


@pytest.mark.parametrize("length", [5, 8, 40, 333])
@pytest.mark.parametrize("pct_start", [0.25, 0.3, 0.9])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_onecycle_is_torchs_at_every_step_momentum_included(length: int, pct_start: float, kind) -> None:
    given = optimizer(kind, **({"momentum": 0.5} if kind is torch.optim.SGD else {}))
    scheduler = lr_scheduler.OneCycleLR(
        given, LR, total_steps=length + 1, pct_start=pct_start, div_factor=20, final_div_factor=300, base_momentum=0.8
    )
    theirs = torchs_rates(given, scheduler, length)
    ours = schedules.onecycle(
        length + 1,
        pct_start=pct_start,
        div_factor=20,
        final_div_factor=300,
        cycle_momentum=True,
        base_momentum=0.8,
    )
    for step, rate in enumerate(theirs):
        assert ours(step) == pytest.approx(rate, rel=RELATIVE), step


def test_onecycle_leaves_momentum_alone_unless_told() -> None:
    assert {schedules.onecycle(30)(step).momentum for step in range(40)} == {None}


def test_onecycle_peaks_at_the_learning_rate() -> None:
    """Onecycle peaks at the sampled learning rate and ends far below its start."""
    ours = schedules.onecycle(100, pct_start=0.3, div_factor=10, final_div_factor=100)
    assert ours(0).factor == pytest.approx(0.1, rel=RELATIVE)
    assert ours(29).factor == 1.0
    assert ours(99).factor == pytest.approx(1e-3, rel=RELATIVE)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_onecycle_is_finite_over_very_few_steps(length: int) -> None:
    for pct_start in (0.01, 0.25, 0.5, 0.99):
        ours = schedules.onecycle(length, pct_start=pct_start)
        assert all(0.0 < ours(step).factor <= 1.0 for step in range(length))


def test_step_drops_where_torchs_multistep_does() -> None:
    given = optimizer()
    theirs = torchs_rates(given, lr_scheduler.MultiStepLR(given, [30, 60], gamma=0.2), 90)
    ours = schedules.step(90, drops=2, gamma=0.2)
    assert [ours(step).factor for step in range(90)] == pytest.approx([r.factor for r in theirs], rel=RELATIVE)


def test_exponential_is_torch_s() -> None:
    """Exponential is torch's with the ratio that ends at the final factor."""
    given = optimizer()
    theirs = torchs_rates(given, lr_scheduler.ExponentialLR(given, 0.02 ** (1 / 50)), 50)
    ours = schedules.exponential(50, final_factor=0.02)
    assert [ours(step).factor for step in range(50)] == pytest.approx([r.factor for r in theirs], rel=RELATIVE)
    assert ours(50).factor == 0.02


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_polynomial_is_torchs_at_every_step(power: float) -> None:
    given = optimizer()
    theirs = torchs_rates(given, lr_scheduler.PolynomialLR(given, 60, power), 70)
    ours = schedules.polynomial(60, power=power)
    assert [ours(step).factor for step in range(70)] == pytest.approx([r.factor for r in theirs], rel=1e-9, abs=1e-15)
    assert schedules.polynomial(60, power=power, final_factor=0.3)(60).factor == 0.3


@pytest.mark.parametrize(("cycles", "t_mult", "first"), [(1, 1, 40), (4, 1, 10), (3, 2, 9), (2, 3, 1)])
@pytest.mark.parametrize("final_factor", [0.0, 0.1])
def test_warm_restarts_are_torchs_at_every_step(cycles: int, t_mult: int, first: int, final_factor: float) -> None:
    length = sum(first * t_mult**cycle for cycle in range(cycles))
    given = optimizer()
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(given, first, t_mult, eta_min=final_factor * LR)
    theirs = torchs_rates(given, scheduler, length)
    ours = schedules.warm_restarts(length, cycles=cycles, t_mult=t_mult, final_factor=final_factor)
    assert [ours(step).factor for step in range(length)] == pytest.approx([r.factor for r in theirs], rel=RELATIVE)
    assert ours(length).factor == pytest.approx(final_factor, abs=1e-15)


@pytest.mark.parametrize("length", range(1, 12))
def test_warm_restarts_that_do_not_divide_the_length_stay_within_bounds(length: int) -> None:
    ours = schedules.warm_restarts(length, cycles=5, t_mult=3, final_factor=0.1)
    assert all(0.1 <= ours(step).factor <= 1.0 for step in range(length + 3))


CURVES = {
    "falls": [1 / (1 + epoch) for epoch in range(30)],
    "stands": [1.0] * 30,
    "falls too slowly": [1 - 5e-5 * epoch for epoch in range(30)],
    "by turns": [1 + 0.5 * (-1) ** epoch / (1 + epoch // 4) for epoch in range(30)],
    "no number": [1.0, math.nan, 0.5, math.inf, *[math.nan] * 8, 0.1],
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    "options",
    [
        {"patience": 3},
        {"patience": 0, "factor": 0.7, "cooldown": 4},
        {"patience": 2, "threshold": 0.0, "factor": 0.5},
        {"patience": 1, "factor": 0.5, "min_factor": 0.2, "cooldown": 1},
    ],
)
def test_plateau_is_torchs_after_every_epoch(curve: str, options: dict[str, float]) -> None:
    given, losses = optimizer(), CURVES[curve]
    theirs = {key: value for key, value in options.items() if key != "min_factor"}
    scheduler = lr_scheduler.ReduceLROnPlateau(given, min_lr=options.get("min_factor", 0.0) * LR, eps=0.0, **theirs)
    ours = schedules.plateau(100, **options)
    for epoch, loss in enumerate(losses):
        expected = given.param_groups[0]["lr"] / LR
        assert schedules.after(ours, losses[:epoch])(7 * epoch).factor == pytest.approx(expected, rel=RELATIVE), epoch
        scheduler.step(loss)


def test_a_schedule_that_knows_no_curve_is_the_same_after_any() -> None:
    ours = schedules.cosine(10)
    assert schedules.after(ours, [1.0, 2.0]) is ours


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_past_its_length_a_schedule_stays_at_its_last_value(name: str) -> None:
    ours = SCHEDULES[name](17)
    assert ours(17) == ours(18) == ours(10_000)
    assert math.isfinite(ours(17).factor)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_over_no_steps_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot have 0 steps"):
        SCHEDULES[name](0)


def test_apply_scales_each_group_from_its_own_base() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    given = torch.optim.SGD(groups, momentum=0.7)
    schedules.apply(given, [1.0, 0.1], Rate(0.5))
    assert [(group["lr"], group["momentum"]) for group in given.param_groups] == [(0.5, 0.7), (0.05, 0.7)]


def test_apply_sets_momentum_or_the_first_beta() -> None:
    for given, key, value in (
        (optimizer(momentum=0.5), "momentum", 0.9),
        (optimizer(torch.optim.RMSprop), "momentum", 0.9),
        (optimizer(torch.optim.AdamW), "betas", (0.9, 0.999)),
    ):
        schedules.apply(given, [LR], Rate(1.0, 0.9))
        assert given.param_groups[0][key] == value


def test_a_momentum_for_an_optimizer_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Adagrad has none; set it to false"):
        schedules.apply(optimizer(torch.optim.Adagrad), [LR], Rate(1.0, 0.9))
