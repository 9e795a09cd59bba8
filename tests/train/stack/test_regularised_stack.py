"""Losses, penalties and averages of runs in a stack: each run has its own, and what it has alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.data import Splits, Strength
from hpo.models import Dropout, cnn
from hpo.train import checkpoint, loop
from hpo.train.epoch import EpochResult
from hpo.train.optim import averaging, losses
from hpo.train.optim.losses import Loss
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.penalties import Penalties
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Stack
from tests.support.stacks import CLASSES, Trial, apart, numbers, stack_of, stop_before, timeless, train
from tests.train.stack.test_stack import EQUAL, alone_in_a_stack, assert_same, noisy_cnn, noisy_mlp, state

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"loss": losses.cross_entropy(label_smoothing=0.2)},
    "bce": {"loss": losses.bce_with_logits(), "clip_norm": 0.5},
    "bce smoothed": {"loss": losses.bce_with_logits(label_smoothing=0.1), "penalised": Penalties(l2=0.02)},
    "mse": {"loss": losses.mse(), "averaging": averaging.ema(decay=0.8)},
    "mse of logits": {"loss": losses.mse(of="logits", label_smoothing=0.3), "penalised": Penalties(max_norm=0.8)},
    "penalised": {"penalised": Penalties(l1=0.003, l2=0.01)},
    "bounded": {"penalised": Penalties(max_norm=0.5), "clip_value": 0.1},
    "mixed": {"augment": Strength(mixup=0.5), "loss": losses.bce_with_logits(label_smoothing=0.1)},
    "averaged": {"averaging": averaging.ema(decay=0.9, warm_up=False), "penalised": Penalties(l1=0.001, max_norm=1.0)},
}


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](parameters, lr=lr)


def tied() -> nn.Module:
    """A layer that stands in two places, and one that is not trained."""
    twice = nn.Linear(9, 9)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), twice, nn.Tanh(), Dropout(0.2), twice, nn.Linear(9, CLASSES))
    net[1].requires_grad_(False)
    return net


def trials(splits: Splits, **options: Any) -> dict[str, Trial]:
    common: dict[str, Any] = {"build": noisy_mlp, "optimizer": adamw, "lr": 0.02, "epochs": 5, "splits": splits}
    return {
        way: Trial(**(common | options), seed=seed, options=changes) for seed, (way, changes) in enumerate(WAYS.items())
    }


@pytest.mark.parametrize("build", [noisy_mlp, noisy_cnn, tied])
def test_each_run_of_a_stack_comes_to_what_it_comes_to_in_the_loop(splits: Splits, build: Any) -> None:
    by_sgd = partial(torch.optim.SGD, momentum=0.9)  # Adam blows rounding up where gradients are next to none
    ones = list(trials(splits, build=build, optimizer=by_sgd, lr=0.1).values())
    runs, alone = [one.run() for one in ones], [one.run() for one in ones]
    results = train(stack_of(runs))
    for run, other in zip(runs, alone, strict=True):
        expected = list(loop.train(other))
        assert apart(numbers(results[run]), numbers(expected)) <= EQUAL
        for name, tensor in other.judged_weights().items():
            torch.testing.assert_close(run.judged_weights()[name], tensor, rtol=1e-8, atol=1e-9)
    curves = [tuple(result.validation_loss for result in results[run]) for run in runs]
    assert len(set(curves)) == len(WAYS)


def test_in_vmap_s_forward_pass_too(splits: Splits) -> None:
    ones = list(trials(splits, epochs=3, lr=0.1, optimizer=torch.optim.SGD).values())
    runs = [one.run() for one in ones]
    stack = Stack(select.of("vmap", runs[0]), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    results = train(stack)
    for run, one in zip(runs, ones, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(one.run()))) <= EQUAL


OTHERWISE: list[dict[str, Any]] = [{"build": noisy_cnn}, {"build": tied, "dtype": torch.float64}]


@pytest.mark.parametrize(
    ("options", "way"),
    [
        *(({"batch_size": 21}, way) for way in WAYS),
        *((options, way) for options in OTHERWISE for way in ("averaged", "mse")),
        *(
            pytest.param(options, way, marks=pytest.mark.soak)
            for options in OTHERWISE
            for way in WAYS
            if way not in ("averaged", "mse")
        ),
    ],
)
def test_neighbours_with_other_ways_leave_no_trace(splits: Splits, way: str, options: dict[str, Any]) -> None:
    ones = trials(splits, **({"dtype": torch.float32, "epochs": 2} | options))
    expected = alone_in_a_stack(ones[way])
    others = [replace(one, seed=100 + seed, lr=0.1 + seed) for seed, one in enumerate(ones.values())]
    for count, row in ((2, 1), (3, 0), (10, 9)):
        runs = [one.run() for one in (others * 2)[row : row + count]]
        runs[row] = ones[way].run()
        assert timeless(train(stack_of(runs))[runs[row]]) == expected[0]
        assert_same(state(runs[row]), expected[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_neighbour_gone_wrong_leaves_no_trace(splits: Splits, way: str) -> None:
    ones = trials(splits, dtype=torch.float32, epochs=2)
    expected = alone_in_a_stack(ones[way])
    for ill in ("plain", "mse of logits", "averaged"):
        runs = [replace(ones[ill], seed=50, lr=float("inf")).run(), ones[way].run(), ones["bounded"].run()]
        assert timeless(train(stack_of(runs))[runs[1]]) == expected[0]
        assert_same(state(runs[1]), expected[1])


@pytest.mark.parametrize("step", [2, 5])
def test_runs_left_amid_an_epoch_go_on_anywhere(splits: Splits, tmp_path: Path, step: int) -> None:
    ones = trials(splits, dtype=torch.float32, epochs=3)
    ways = ["averaged", "mse", "plain", "bounded"]
    left = [ones[way].run() for way in ways]
    stack, stop, results = stack_of(left), stop_before(step), []
    while ended := stack.train_epoch(stop):
        results.append(ended)
    for way, run in zip(ways, left, strict=True):
        checkpoint.save(tmp_path / f"{way}.pt", run.state_dict())
    stack.train_epoch()  # what becomes of the old stack is no matter
    runs = [ones[way].run() for way in ways]
    for way, run in zip(ways, runs, strict=True):
        run.load_state_dict(checkpoint.load(tmp_path / f"{way}.pt"))
    again = train(stack_of([ones["bce"].run(), *reversed(runs)]))
    for index, (way, run) in enumerate(zip(ways, runs, strict=True)):
        expected = alone_in_a_stack(ones[way])
        assert timeless([ended[index] for ended in results] + again[run]) == expected[0]
        assert_same(state(run), expected[1])


def test_runs_come_and_go_and_the_loop_takes_one_on(splits: Splits) -> None:
    ones = trials(splits, epochs=4)
    run, guests = ones["averaged"].run(), [ones[way].run() for way in ("mse", "plain", "bounded", "smoothed")]
    stack: Stack = stack_of([guests[0], run], slots=3)
    results: list[EpochResult] = [stack.train_epoch()[1]]
    stack.remove(guests[0])
    assert guests[0].average is not None
    before = {name: value.clone() for name, value in guests[0].average.values.items()}
    stack.put(guests[1])  # in the place of one with an average
    stack.put(guests[2])
    results.append(stack.train_epoch()[stack.runs.index(run)])
    assert all(torch.equal(before[name], value) for name, value in guests[0].average.values.items())
    for guest in guests[1:3]:
        stack.remove(guest)
    stack.compact()
    results.append(stack.train_epoch()[0])
    stack.remove(run)
    results += loop.train(run)
    assert apart(numbers(results), numbers(loop.train(ones["averaged"].run()))) <= EQUAL
    assert apart(numbers(loop.train(guests[0])), numbers(loop.train(ones["mse"].run()))[1:]) <= EQUAL


def test_weights_averaged_by_epoch_are_stacked_where_no_batch_norm_is(splits: Splits) -> None:
    found = {"averaging": averaging.swa(start=0.5)}
    ones = [replace(one, options=found) for one in trials(splits, build=tied).values()][:3]
    ones.append(trials(splits, build=tied)["plain"])
    runs = [one.run() for one in ones]
    results = train(stack_of(runs))
    for run, one in zip(runs, ones, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(one.run()))) <= EQUAL
    assert runs[0].average is not None
    assert runs[0].average.count == 3

    normed = replace(ones[0], build=lambda: cnn((1, 8, 8), CLASSES, channels=[3])).run()
    with pytest.raises(Unstackable, match="averaging swa computes batch norm's statistics anew"):
        Stack(StackedForward(normed.model), normed, 2)


class Focal(nn.Module):
    """A user's own loss, which looks at the whole batch."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        found = F.cross_entropy(logits, labels, reduction="none")
        return found * (found / found.detach().mean())


def test_losses_of_ones_own_are_stacked_among_themselves(splits: Splits) -> None:
    own: Loss = Focal()
    ones = [replace(one, options={"loss": own}) for one in list(trials(splits, batch_size=21).values())[:3]]
    runs = [one.run() for one in ones]
    results = train(stack_of(runs))
    for run, one in zip(runs, ones, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(one.run()))) <= EQUAL
    stack, stranger = stack_of([ones[0].run()], slots=2), trials(splits, batch_size=21)["bce"].run()
    with pytest.raises(Unstackable, match=r"differs from those of the stack: loss$"):
        stack.put(stranger)


def test_no_memory_goes_to_averages_that_nobody_makes(splits: Splits) -> None:
    ones = trials(splits)
    stack = stack_of([ones["plain"].run(), ones["bce"].run()], slots=3)
    assert stack._averages._values is None
    run: Run = ones["averaged"].run()
    stack.put(run)
    assert stack._averages._values is not None
