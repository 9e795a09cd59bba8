"""A captured step computes what the step computes: what changes between steps is not baked in."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.data import Splits
from hpo.models import cnn, mlp
from hpo.train import graphs as captures
from hpo.train.graphs import CapturedStep, FixedMasks
from hpo.train.loop import Loop
from hpo.train.optim import losses, schedules
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.penalties import Penalties
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.stack import Stack
from tests.support import stacks, twin, twin_graphs
from tests.support.stacks import CLASSES, Trial, numbers
from tests.support.twin_graphs import Recorder


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    monkeypatch.setattr(captures, "SETTLED", 0)
    with twin_graphs.plugged_in() as made:
        yield made


class NoDropout:
    def factors(self, name: str, elements: int) -> Tensor | None:
        return None


def step(body: Any, changed: list[Tensor]) -> Callable[..., None]:
    """Return the function that takes a step."""
    captured = CapturedStep(twin.DEVICE, FixedMasks(NoDropout().factors))
    return partial(captured.take, body, lambda: changed)


def test_what_is_baked_in_at_the_capture_differs_at_the_replay(graphs: list[Recorder]) -> None:
    """A rate, a step and an index are right as tensors that are written before, and wrong as numbers of the host."""
    table = torch.arange(5.0).to(twin.DEVICE)
    good, bad = torch.zeros(3, device=twin.DEVICE), torch.zeros(3, device=twin.DEVICE)
    now = 0

    def well(rate: Tensor, row: Tensor, count: Tensor) -> None:
        good.add_(rate * table.index_select(0, row) * count)

    def badly(rate: Tensor, row: Tensor, count: Tensor) -> None:
        bad.add_((now + 1) * table[now] * (now + 2))

    captured, baked = step(well, [good]), step(badly, [bad])
    expected = 0.0
    for now in range(3):
        given = (torch.tensor(float(now + 1)), torch.tensor([now]), torch.tensor(float(now + 2)))
        there = [one.to(twin.DEVICE) for one in given]
        captured(*there)
        baked(*there)
        expected += (now + 1) * now * (now + 2)
        assert good.tolist() == [expected] * 3
        assert bad.tolist() == [0.0] * 3  # the first step again and again
    assert [one.replays for one in graphs] == [3, 3]


def test_what_cannot_be_captured_runs_as_it_is(graphs: list[Recorder]) -> None:
    total = torch.zeros((), device=twin.DEVICE)

    def waits(x: Tensor) -> None:
        total.add_(x.sum().item())

    take = step(waits, [total])
    for value in (1.0, 2.0):
        take(torch.full((2,), value).to(twin.DEVICE))
    assert total.item() == 6.0
    [failure] = captures.failures
    assert "operation not permitted when stream is capturing" in failure
    assert graphs == []
    assert not captures.can_capture(twin.DEVICE)  # in the rest of this process


def runs(splits: Splits, model: Any, count: int = 3) -> list[Run]:
    """Return runs that differ in optimizer, rate, schedule, dropout, smoothing and length."""
    kinds = [partial(OPTIMIZERS["adamw"], weight_decay=0.1), OPTIMIZERS["sgd"], OPTIMIZERS["rmsprop"]]
    return [
        Trial(
            splits=splits,
            build=partial(model, dropout=0.1 * number),
            optimizer=kinds[number],
            lr=0.01 * (number + 1),
            schedule=[schedules.cosine, schedules.constant, schedules.cosine][number],
            seed=number,
            epochs=2 + number,
            options={"loss": losses.cross_entropy(label_smoothing=0.05 * number), "clip_norm": 1.0 + number},
        ).run()
        for number in range(count)
    ]


def trained(splits: Splits, model: Any, *, captures: bool) -> tuple[list[Any], list[dict[str, Tensor]], int]:
    """Train runs in a stack, each to its end. Return curves, weights, and the launches of the second epoch."""
    put = runs(splits, model)
    stack = Stack(StackedForward(put[0].model), put[0], 4, captures=captures)
    for run in put:
        stack.put(run)
    found: list[list[Any]] = [[] for _ in put]
    launches = []
    while stack.runs:
        now = stack.runs
        with twin.counting() as counts:
            results = stack.train_epoch()
        launches.append(counts.launches)
        for run, result in zip(now, results, strict=True):
            found[put.index(run)].append(result)
            if run.finished:
                stack.remove(run)
    assert stack.capture_failure is None
    states = [{name: value.cpu() for name, value in run.model.state_dict().items()} for run in put]
    return [numbers(results) for results in found], states, launches[1]


def test_a_captured_stack_trains_as_the_stack_does(graphs: list[Recorder]) -> None:
    """Bit for bit: rates, rows, dropout factors and statistics are those of each step. Launches fall by half and more."""
    on_device, model = stacks.digits(device=twin.DEVICE), partial(mlp, (1, 8, 8), CLASSES, widths=[9, 7])
    curves, states, launches = trained(on_device, model, captures=False)
    assert graphs == []
    curves_too, states_too, fewer = trained(on_device, model, captures=True)
    assert curves_too == curves
    for one, other in zip(states, states_too, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sum(one.replays for one in graphs) == 4 * 4  # steps of the longest run, all replayed
    assert fewer < launches / 2


def alone(build: Any, epochs: int, *, captures: bool, unfreezes: bool = False) -> tuple[Any, list[Tensor], int]:
    """Train a run in the loop. Return its curve, its weights, and the launches of its second epoch."""
    options = {"loss": losses.cross_entropy(label_smoothing=0.1), "clip_norm": 1.0, "penalised": Penalties(l1=0.01)}
    run = Trial(
        splits=stacks.digits(device=twin.DEVICE), build=build, schedule=schedules.cosine, epochs=epochs, options=options
    ).run()
    loop = Loop(captures=captures)
    loop.put(run)
    first = next(run.model.parameters())
    results, launches = [], []
    for epoch in range(epochs):
        if unfreezes:
            first.requires_grad_(epoch > 0)
        with twin.counting() as counts:
            results += loop.train_epoch()
        launches.append(counts.launches)
    assert loop.capture_failure is None
    return numbers(results), [value.cpu() for value in run.model.state_dict().values()], launches[1]


@pytest.mark.parametrize(("unfreezes", "replays"), [(False, [12]), (True, [4, 8])])
def test_a_captured_loop_trains_as_the_loop_does(unfreezes: bool, replays: list[int], graphs: list[Recorder]) -> None:
    """A layer that is unfrozen between epochs leads to another capture."""
    build = partial(cnn, (1, 8, 8), CLASSES, channels=[8, 5], dropout=0.3)
    curve, weights, launches = alone(build, 3, captures=False, unfreezes=unfreezes)
    curve_too, weights_too, fewer = alone(build, 3, captures=True, unfreezes=unfreezes)
    assert curve_too == curve
    assert all(torch.equal(one, other) for one, other in zip(weights, weights_too, strict=True))
    assert [one.replays for one in graphs] == replays
    assert fewer < launches


def test_a_stop_within_an_epoch_goes_on_with_the_graph(graphs: list[Recorder]) -> None:
    on_device = stacks.digits(device=twin.DEVICE)
    model = partial(mlp, (1, 8, 8), CLASSES, widths=[9])
    whole, _, _ = trained(on_device, model, captures=True)
    [run] = runs(on_device, model, 1)
    stack = Stack(StackedForward(run.model), run, 1, captures=True)
    stack.put(run)
    asked = iter([False, False, True])
    assert stack.train_epoch(lambda: next(asked)) == []
    results = [stack.train_epoch()[0], stack.train_epoch()[0]]
    assert numbers(results) == whole[0]


def test_after_a_change_a_step_is_captured_again_once_it_has_settled(
    graphs: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stack whose rows get trials with other losses in every epoch would do little but capture."""
    monkeypatch.setattr(captures, "SETTLED", 2)
    total = torch.zeros((), device=twin.DEVICE)
    captured = CapturedStep(twin.DEVICE, FixedMasks(NoDropout().factors))

    def replays(steps: int) -> list[int]:
        for _ in range(steps):
            captured.take(lambda x: total.add_(x), lambda: [total], torch.ones((), device=twin.DEVICE))
        return [one.replays for one in graphs]

    captured.forget()  # nothing was captured yet
    assert replays(1) == [1]
    captured.forget()
    assert replays(1) == [1]
    captured.forget()
    assert replays(2) == [1]
    assert replays(3) == [1, 3]
    assert total.item() == 7.0


def test_a_compacted_stack_is_not_captured(graphs: list[Recorder]) -> None:
    """The graph was checked in the stack's full size. When runs come again, the stack has that size, and a new graph."""
    put = runs(stacks.digits(device=twin.DEVICE), partial(mlp, (1, 8, 8), CLASSES, widths=[9]))
    stack = Stack(StackedForward(put[0].model), put[0], 3, captures=True)
    for run in put[:2]:
        stack.put(run)
    stack.compact()
    stack.train_epoch()
    assert graphs == []
    for run in put[2:]:
        stack.put(run)
    stack.train_epoch()
    assert [one.replays for one in graphs] == [4]


@pytest.mark.parametrize("executor", ["loop", "stack"])
def test_an_executor_that_was_captured_is_freed_at_its_end(executor: str, graphs: list[Recorder]) -> None:
    """Without the garbage collector, which may come late: on a GPU its memory would be missing for the next trials."""
    [run] = runs(stacks.digits(device=twin.DEVICE), partial(mlp, (1, 8, 8), CLASSES, widths=[9], dropout=0.5), 1)
    trainer = Loop(captures=True) if executor == "loop" else Stack(StackedForward(run.model), run, 2, captures=True)
    trainer.put(run)
    gc.collect()
    gc.disable()
    try:
        trainer.train_epoch()
        assert len(graphs) == 1
        trainer.remove(run)
        held = weakref.ref(trainer if executor == "stack" else run)
        del trainer, run
        assert held() is None
    finally:
        gc.enable()
