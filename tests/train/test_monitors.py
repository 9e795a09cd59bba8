"""Norms and noise of gradients against autograd by hand; the same in every executor, whatever interrupts it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpo import data
from hpo.data import Source, Splits
from hpo.models import mlp
from hpo.spec.seeds import derive
from hpo.train import loop
from hpo.train.epoch import EpochResult
from hpo.train.monitors import Watch, of_gradients
from hpo.train.optim.penalties import Penalties
from hpo.train.run import Run
from tests.support.stacks import CLASSES, Trial, stack_of, stop_before, train

NAMES = {"gradient_norm", "parameter_norm", "gradient_variance", "noise_scale"}
EVERYTHING = Watch(norms=True, noise=True, by_step=True)


def clear_digits() -> Splits:
    """Return images in which the labels are plain to see, so that gradients agree on where to go."""
    labels = torch.arange(120) % CLASSES
    images = torch.randint(0, 100, (120, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[torch.arange(120), 0, labels] = 255
    return data.load(Source(inputs=images, targets=labels, num_classes=CLASSES), split_seed=0, device="cpu")


TRIAL = Trial(splits=clear_digits(), epochs=3, options={"watch": EVERYTHING})


def gradients_by_hand(trial: Trial) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Train with torch.autograd alone; return every step's gradient by epoch, flat, and the parameters after each epoch."""
    model, splits = trial.model(), trial.splits
    parameters = list(model.parameters())
    images = (splits.train.inputs.to(trial.dtype) - splits.mean.view(-1, 1, 1)) / splits.std.view(-1, 1, 1)
    found, ends = [], []
    for epoch in range(trial.epochs):
        generator = torch.Generator().manual_seed(derive(trial.seed, "order", epoch))
        found.append([])
        for rows in torch.randperm(len(images), generator=generator).split(trial.batch_size)[: trial.steps]:
            loss = F.cross_entropy(model(images[rows]), splits.train.targets[rows])
            gradient = torch.autograd.grad(loss, parameters)
            found[-1].append(torch.cat([g.reshape(-1) for g in gradient]))
            with torch.no_grad():
                for parameter, g in zip(parameters, gradient, strict=True):
                    parameter -= trial.lr * g
        ends.append(torch.cat([p.detach().reshape(-1).clone() for p in parameters]))
    return found, ends


def test_norms_and_noise_are_those_of_autograd_by_hand() -> None:
    run = TRIAL.run()
    steps, ends = gradients_by_hand(TRIAL)
    for result, gradients, weights in zip(loop.train(run), steps, ends, strict=True):
        norms = torch.stack([g.norm() for g in gradients])
        products = torch.stack([a @ b for a, b in pairwise(gradients)])
        variance = norms.square().mean() - products.mean()
        assert result.watched.keys() == NAMES
        assert math.isfinite(result.watched["noise_scale"])
        assert result.watched["gradient_norm"] == pytest.approx(norms.mean().item(), rel=1e-9)
        assert result.watched["parameter_norm"] == pytest.approx(weights.norm().item(), rel=1e-9)
        assert result.watched["gradient_variance"] == pytest.approx(variance.item(), rel=1e-9)
        assert result.watched["noise_scale"] == pytest.approx(20 * (variance / products.mean()).item(), rel=1e-9)
        assert [step[1] for step in run.monitor.trajectory()] == pytest.approx(norms.tolist(), rel=1e-9)
        assert sum(step[0] for step in run.monitor.trajectory()) / 4 == pytest.approx(result.train_loss, rel=1e-12)


def test_the_noise_scale_is_mccandlishs_estimate_from_two_batch_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (1.0 + torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(2))
    small, size = (one.square().sum() + other.square().sum()) / 2, 20
    big = ((one + other) / 2).square().sum()  # of a batch twice as large
    squared = (2 * size * big - size * small) / (2 * size - size)
    trace = (small - big) / (1 / size - 1 / (2 * size))
    sums = [0.0, (2 * small).item(), (one @ other).item()]
    found = of_gradients(Watch(noise=True), sums, 0.0, steps=2, batch_size=size)
    assert found["noise_scale"] == pytest.approx((trace / squared).item())
    assert found["gradient_variance"] == pytest.approx((trace / size).item())


def test_the_noise_scale_finds_the_noise_that_was_put_in() -> None:
    """Gradients of 10 images each: the true one has length 2, each image's noise a covariance of trace 300."""
    generator = torch.Generator().manual_seed(1)
    true = torch.full((100,), 0.2, dtype=torch.float64)
    noise = math.sqrt(3.0) * torch.randn(2000, 10, 100, dtype=torch.float64, generator=generator)
    batches = (true + noise).mean(1)
    sums = [
        batches.norm(dim=1).sum().item(),
        batches.square().sum().item(),
        (batches[1:] * batches[:-1]).sum().item(),
    ]
    found = of_gradients(Watch(noise=True), sums, 0.0, steps=2000, batch_size=10)
    assert found["gradient_variance"] == pytest.approx(30.0, rel=0.03)
    assert found["noise_scale"] == pytest.approx(75.0, rel=0.1)


def test_what_cannot_be_told_is_no_number() -> None:
    alone = of_gradients(Watch(noise=True), [1.0, 1.0, 0.0], 0.0, steps=1, batch_size=2)
    opposed = of_gradients(Watch(noise=True), [2.0, 2.0, -1.0], 0.0, steps=2, batch_size=2)
    assert math.isnan(alone["noise_scale"])
    assert math.isnan(opposed["noise_scale"])
    assert opposed["gradient_variance"] == 2.0


def test_norms_are_of_the_unclipped_gradient() -> None:
    """Norms are of the gradient before it is clipped and of the whole batch."""
    clipped = replace(TRIAL, options={"watch": EVERYTHING, "clip_norm": 1e-9, "clip_value": 1e-9}).run()
    assert next(loop.train(clipped)).watched["gradient_norm"] > 0.1
    plain = replace(TRIAL, build=lambda: mlp((1, 8, 8), CLASSES, widths=[7], norm="none"))
    whole = next(loop.train(plain.run())).watched
    pieces = next(loop.train(replace(plain, options={"watch": EVERYTHING, "accumulation": 3}).run())).watched
    assert pieces == pytest.approx(whole, rel=1e-9)


def test_what_is_not_asked_for_is_not_measured() -> None:
    assert next(loop.train(replace(TRIAL, options={}).run())).watched == {}
    only = next(loop.train(replace(TRIAL, options={"watch": Watch(norms=True)}).run())).watched
    assert only.keys() == {"gradient_norm", "parameter_norm"}
    resources = next(loop.train(replace(TRIAL, options={"watch": Watch(resources=True)}).run()))
    assert resources.watched["examples_per_second"] == pytest.approx(80 / resources.seconds)
    assert 50 < resources.watched["peak_memory_mb"] < 100_000


def frozen_mlp() -> torch.nn.Module:
    model = mlp((1, 8, 8), CLASSES, widths=[7, 5])
    next(model.parameters()).requires_grad_(False)
    return model


def dropped_mlp() -> torch.nn.Module:
    return mlp((1, 8, 8), CLASSES, widths=[7, 5], dropout=0.3)


@pytest.mark.parametrize("build", [frozen_mlp, dropped_mlp])
@pytest.mark.parametrize("options", [{}, {"penalised": Penalties(l1=0.02, l2=0.1), "clip_norm": 0.5}])
def test_a_stack_measures_each_run_as_the_loop_does(
    build: Callable[[], torch.nn.Module], options: dict[str, Any]
) -> None:
    trials = replace(TRIAL, build=build, options={"watch": EVERYTHING, **options}).several(3)
    runs, steps = [trial.run() for trial in trials], {}
    stack, stacked = stack_of(runs), {}
    while stack.runs:
        for run, result in zip(stack.runs, stack.train_epoch(), strict=True):
            stacked.setdefault(run, []).append(result)
            steps.setdefault(run, []).append(run.monitor.trajectory())
            if run.finished:
                stack.remove(run)
    for run, trial in zip(runs, trials, strict=True):
        alone, expected = trial.run(), []
        for one in loop.train(alone):
            expected.append((one, alone.monitor.trajectory()))
        for mine, theirs, (other, of_steps) in zip(stacked[run], steps[run], expected, strict=True):
            assert dict(mine.watched) == pytest.approx(dict(other.watched), rel=1e-9, nan_ok=True)
            assert list(chain.from_iterable(theirs)) == pytest.approx(list(chain.from_iterable(of_steps)), rel=1e-9)


def test_measures_do_not_depend_on_neighbours() -> None:
    """What a stack measures of a run does not depend on its neighbours."""
    trials = replace(TRIAL, dtype=torch.float32).several(5)
    runs = [trial.run() for trial in trials]
    together = train(stack_of(runs))
    for run, trial in zip(runs, trials, strict=True):
        alone = trial.run()
        assert [one.watched for one in train(stack_of([alone]))[alone]] == [one.watched for one in together[run]]


Executor = Callable[[Run, Callable[[], bool]], list[EpochResult]]


def by_loop(run: Run, stop: Callable[[], bool]) -> list[EpochResult]:
    return list(loop.train(run, stop))


def by_stack(run: Run, stop: Callable[[], bool]) -> list[EpochResult]:
    """Train beside a run that is an epoch or a few batches behind."""
    stack, found = stack_of([run, replace(TRIAL, seed=9, epochs=9).run()], 2), []
    while not run.finished:
        results = dict(zip(stack.runs, stack.train_epoch(stop), strict=False))
        if run not in results:
            break
        found.append(results[run])
    stack.remove(run)
    return found


@pytest.mark.parametrize("first", [by_loop, by_stack])
@pytest.mark.parametrize("then", [by_loop, by_stack])
def test_a_run_that_was_stopped_amid_an_epoch_measures_on(first: Executor, then: Executor) -> None:
    whole = by_loop(TRIAL.run(), lambda: False)
    run = TRIAL.run()
    found = first(run, stop_before(6))
    state: dict[str, Any] = torch.load(saved(run.state_dict()), weights_only=True)
    other = TRIAL.run()
    other.load_state_dict(state)
    found += then(other, lambda: False)
    assert len(found) == 3
    for one, expected in zip(found, whole, strict=True):
        assert dict(one.watched) == pytest.approx(dict(expected.watched), rel=1e-9)
    assert len(other.monitor.trajectory()) == 4


def test_a_run_that_was_stopped_measures_bit_for_bit_what_it_would_have() -> None:
    whole = [one.watched for one in loop.train(TRIAL.run())]
    run = TRIAL.run()
    before = [one.watched for one in loop.train(run, stop_before(6))]
    other = TRIAL.run()
    other.load_state_dict(torch.load(saved(run.state_dict()), weights_only=True))
    assert before + [one.watched for one in loop.train(other)] == whole
    assert other.state_dict()["gauge"] is None  # between epochs there is nothing to keep


def saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
