"""What a run trains to in a stack is what it trains to alone: bit for bit in a stack of its own, else but for rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from hpo import data
from hpo.data import Splits
from hpo.models import Dropout, cnn, mlp
from hpo.train import checkpoint, loop
from hpo.train.epoch import EpochResult
from hpo.train.optim import schedules
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.warmup import before, linear
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Stack
from tests.support import stacks
from tests.support.stacks import (
    CLASSES,
    Trial,
    apart,
    numbers,
    stack_of,
    stop_before,
    timeless,
    together,
    train,
    weights,
)
from tests.train.stack.test_layers import Residual, frozen

EQUAL = 1e-10


def noisy_mlp() -> nn.Module:
    return mlp((1, 8, 8), CLASSES, widths=[9, 7], dropout=0.3, activation="gelu")


def noisy_cnn(side: int = 8, channels: int = 1) -> nn.Module:
    return cnn((channels, side, side), CLASSES, channels=[8, 5], dropout=0.3, activation="silu")


def first_norm() -> nn.Module:
    """A model whose flat features fill no cache line, whether they come from an image or from a layer norm."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 4, padding=1),
        nn.GroupNorm(1, 3),
        nn.Tanh(),
        Dropout(0.2),
        nn.Flatten(),
        nn.Linear(147, 9),
        nn.LayerNorm(9),
        nn.Mish(),
        Dropout(0.2),
        nn.Linear(9, CLASSES),
    )


def adamw(parameters: Any, lr: float) -> optim.Optimizer:
    return OPTIMIZERS["adamw"](parameters, lr=lr, weight_decay=0.1)


def state(run: Run) -> dict[str, Any]:
    """Return a copy of a run's state without what tells where and how long it was trained."""
    return copy.deepcopy({**run.state_dict(), "seconds": 0.0, "executors": []})


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def alone_in_a_stack(trial: Trial) -> tuple[list[EpochResult], dict[str, Any]]:
    run = trial.run()
    return timeless(train(stack_of([run]))[run]), state(run)


# --- float64 ------------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[int], schedules.Schedule]] = {
    "constant": schedules.constant,
    "cosine": partial(schedules.cosine, final_factor=0.1),
    "onecycle": schedules.onecycle,
    "onecycle with momentum": partial(schedules.onecycle, cycle_momentum=True),
    "step": partial(schedules.step, drops=3, gamma=0.5),
    "exponential": schedules.exponential,
    "polynomial": partial(schedules.polynomial, power=2.0),
    "warm restarts": schedules.warm_restarts,
    "plateau": partial(schedules.plateau, patience=0, threshold=0.03, factor=0.7),
    "warmed up": lambda length: before(schedules.cosine(length - 10), 10, linear(10)),
}


SGD = partial(optim.SGD, momentum=0.9)
ALSO_BY_ADAMW = ("cosine", "onecycle with momentum")  # which moves betas where it moves SGD's momentum


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(pytest.param(SGD, name, id=f"sgd-{name}") for name in SCHEDULES),
        *(pytest.param(adamw, name, id=f"adamw-{name}") for name in ALSO_BY_ADAMW),
        *(
            pytest.param(adamw, name, id=f"adamw-{name}", marks=pytest.mark.soak)
            for name in SCHEDULES
            if name not in ALSO_BY_ADAMW
        ),
    ],
)
def test_schedules(splits: Splits, name: str, kind: Callable[..., optim.Optimizer]) -> None:
    trial = Trial(splits=splits, schedule=SCHEDULES[name], optimizer=kind, lr=0.02, epochs=12)
    trials = [
        *trial.several(2),
        replace(trial, seed=9, schedule=schedules.cosine),
        replace(trial, seed=8, epochs=7, schedule=schedules.step),  # leaves before the others
    ]
    for curve, trial in zip(together(trials), trials, strict=True):
        assert apart(curve, trial.by_plain_torch()) <= EQUAL


def test_a_plateau_is_each_runs_own(splits: Splits) -> None:
    trial = Trial(splits=splits, schedule=SCHEDULES["plateau"], lr=0.02, epochs=12)
    trials = [trial, replace(trial, seed=5, lr=0.5)]
    runs = [trial.run() for trial in trials]
    results = train(stack_of(runs))
    for run, one in zip(runs, trials, strict=True):
        factors = [result.learning_rate / one.lr for result in results[run]]
        assert factors[0] == 1.0 > factors[-1]
        assert factors == pytest.approx([result.learning_rate / one.lr for result in loop.train(one.run())])
    assert len({tuple(result.learning_rate / 0.02 for result in results[run]) for run in runs}) == 2


CLIPS: list[dict[str, float]] = [{"clip_norm": 0.3}, {"clip_value": 0.01}, {"clip_norm": 0.1, "clip_value": 0.02}]


@pytest.mark.parametrize("options", CLIPS)
def test_gradients_are_clipped_run_by_run(splits: Splits, options: dict[str, float]) -> None:
    trial = Trial(splits=splits, build=lambda: frozen(stacks.small_mlp()), options=options, lr=0.2)
    trials = [*trial.several(2), replace(trial, seed=5, lr=math.inf), replace(trial, seed=6, options={})]
    curves = together(trials)
    expected = [trial.by_plain_torch() for trial in trials]
    assert apart(curves[:2] + curves[3:], expected[:2] + expected[3:]) <= EQUAL
    assert apart(expected[0], replace(trial, options={}).by_plain_torch()) > 1e-3  # it was clipped


def heads(parameters: Any, lr: float) -> optim.Optimizer:
    """Train the last layer alone."""
    return optim.AdamW(list(parameters)[-2:], lr=lr)


def test_what_the_optimizer_was_not_given_stays_and_counts_in_no_norm(splits: Splits) -> None:
    trial = Trial(splits=splits, optimizer=heads, lr=0.02, options={"clip_norm": 0.2}, epochs=8)
    run, alone = trial.run(), trial.run()
    before = weights(run)
    stack = stack_of([trial.several(2)[1].run(), run])
    results = train(stack)[run]
    assert apart(numbers(results), numbers(loop.train(alone))) <= EQUAL
    after = weights(run)
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(before[name], after[name])}
    assert len(changed) == 2


def test_runs_come_and_go_and_gaps_are_closed(splits: Splits) -> None:
    """Refill and compaction: seven trials of different lengths through three slots, each as alone."""
    trial = Trial(splits=splits, optimizer=adamw, lr=0.01, schedule=schedules.cosine)
    lengths = [9, 5, 6, 9, 3, 10, 9]
    trials = [replace(t, epochs=epochs) for t, epochs in zip(trial.several(7), lengths, strict=True)]
    waiting = [trial.run() for trial in trials]
    runs, stack, results = (
        list(waiting),
        Stack(StackedForward(waiting[0].model), waiting[0], 3),
        {run: [] for run in waiting},
    )
    rows = []
    while waiting or stack.runs:
        while waiting and len(stack.runs) < 3:
            stack.put(waiting.pop(0))
        if not waiting:
            stack.compact()
        rows.append(stack._rows.count)
        for run, result in zip(stack.runs, stack.train_epoch(), strict=True):
            results[run].append(result)
            if run.finished:
                stack.remove(run)
    for run, trial in zip(runs, trials, strict=True):
        assert apart(numbers(results[run]), trial.by_plain_torch()) <= EQUAL
    assert set(rows) == {4, 2}


def test_a_stack_opens_again_after_it_was_closed(splits: Splits) -> None:
    trial = Trial(splits=splits, build=noisy_mlp, optimizer=adamw, epochs=8)
    runs = [trial.run() for trial in trial.several(5)]
    stack = stack_of(runs[:1], slots=4)
    results: dict[Run, list[EpochResult]] = {run: [] for run in runs}
    for late in (runs[1:1], runs[1:2], runs[2:4], runs[4:]):
        stack.compact()
        for run in late:
            if len(stack.runs) == 4:
                stack.remove(stack.runs[0])
            stack.put(run)
        for run, result in zip(stack.runs, stack.train_epoch(), strict=True):
            results[run].append(result)
    train(stack, results)
    for one, run in zip(trial.several(5)[1:], runs[1:], strict=True):
        assert timeless(results[run]) == alone_in_a_stack(one)[0]


# --- float32 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Splits:
    return data.load(data.SOURCES["digits"](), split_seed=0, device="cpu")


@pytest.mark.parametrize(
    ("kind", "lr", "apart_by"),
    [(partial(optim.SGD, momentum=0.9), 0.02, 1e-5), (optim.AdamW, 0.003, 5e-3)],
)
def test_in_float32_rounding_is_all_that_differs(real: Splits, kind: Any, lr: float, apart_by: float) -> None:
    trial = Trial(
        splits=real,
        build=lambda: mlp((1, 8, 8), 10, widths=[64, 32]),
        optimizer=kind,
        lr=lr,
        epochs=6,
        batch_size=64,
        dtype=torch.float32,
    )
    assert trial.steps * trial.epochs >= 100
    trials = trial.several(4)
    for curve, expected in zip(together(trials), [trial.by_plain_torch() for trial in trials], strict=True):
        losses, accuracies = zip(*((one[:2], one[2]) for one in curve), strict=True)
        assert apart(losses, [one[:2] for one in expected]) <= apart_by
        assert apart([accuracies], [[one[2] for one in expected]]) <= 0.005
        assert accuracies[-1] > 0.9


def test_in_bfloat16_a_stack_comes_close_to_the_loop(real: Splits) -> None:
    build = partial(mlp, (1, 8, 8), 10, widths=[64, 32], dropout=0.1)
    trial = Trial(splits=real, build=build, optimizer=adamw, lr=0.003, epochs=3, batch_size=64, dtype=torch.float32)
    trial = replace(trial, options={"precision": "bfloat16"})
    trials = trial.several(2)
    runs = [trial.run() for trial in trials]
    results = train(stack_of(runs))
    assert {p.dtype for run in runs for p in run.model.parameters()} == {torch.float32}
    for run, one in zip(runs, trials, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(one.run()))) < 0.02


# --- bit for bit: no trace of row, neighbours and K ---------------------------------------------------------------------


def shaped_mlp() -> nn.Module:
    return mlp(
        (1, 8, 8),
        CLASSES,
        widths=[18],
        depth=2,
        residual=True,
        stochastic_depth=0.3,
        dropout=0.2,
        norm="group",
        activation="swish",
        learn_beta=True,
    )


def shaped_cnn() -> nn.Module:
    return cnn(
        (1, 8, 8), CLASSES, channels=[6, 10], residual=True, stochastic_depth=0.3, norm="group", activation="prelu"
    )


BITWISE: dict[str, dict[str, Any]] = {
    "mlp": {"build": noisy_mlp},
    "mlp, odd batch": {"build": noisy_mlp, "batch_size": 21},
    "mlp, full batch": {"build": noisy_mlp, "batch_size": 16},
    "mlp in float64": {"build": noisy_mlp, "dtype": torch.float64, "batch_size": 21},
    "mlp by torch's step": {"build": noisy_mlp, "optimizer": optim.RAdam},
    "mlp sgd": {"build": noisy_mlp, "optimizer": partial(OPTIMIZERS["sgd"], momentum=0.9, nesterov=True), "lr": 0.05},
    "mlp clipped": {"build": noisy_mlp, "options": {"clip_norm": 0.3, "clip_value": 0.1}},
    "cnn": {"build": noisy_cnn},
    "cnn in float64": {"build": noisy_cnn, "dtype": torch.float64},
    "residual": {"build": lambda: Residual(0.2)},
    "norms": {"build": first_norm, "batch_size": 21},
    "norms in float64": {"build": first_norm, "dtype": torch.float64},
    "shaped mlp": {"build": shaped_mlp, "batch_size": 21},
    "shaped cnn": {"build": shaped_cnn, "batch_size": 21},
    "bfloat16": {"build": noisy_mlp, "options": {"precision": "bfloat16"}},
}
LARGER: dict[str, dict[str, Any]] = {
    "cnn 28x28": {"build": lambda: noisy_cnn(28)},
    "mlp 28x28": {"build": lambda: mlp((1, 28, 28), CLASSES, widths=[33, 16], dropout=0.3)},
    "residual 28x28": {"build": lambda: Residual(0.2)},
}


def bitwise(splits: Splits, options: dict[str, Any]) -> Trial:
    common: dict[str, Any] = {"optimizer": adamw, "lr": 0.01, "epochs": 3, "seed": 3, "dtype": torch.float32}
    return Trial(splits=splits, schedule=schedules.cosine, **(common | options))


def check_any_place(trial: Trial, places: list[tuple[int, int]]) -> None:
    expected = alone_in_a_stack(trial)
    for count, row in places:
        others = [replace(trial, seed=100 + other, lr=0.02 + other) for other in range(count)]
        runs = [trial.run() for trial in others]
        runs[row] = trial.run()
        assert timeless(train(stack_of(runs))[runs[row]]) == expected[0]
        assert_same(state(runs[row]), expected[1])


@pytest.mark.parametrize("name", BITWISE)
def test_a_slot_is_bit_for_bit_the_same_trial_in_a_stack_of_one(splits: Splits, name: str) -> None:
    many = [(4, 0), (32, 31)] if name in ("mlp", "cnn", "norms") else []
    check_any_place(bitwise(splits, BITWISE[name]), [(2, 1), (3, 2), (4, 3), (8, 5), *many])


@pytest.mark.parametrize("name", LARGER)
def test_a_slot_of_larger_images_too(name: str) -> None:
    check_any_place(bitwise(stacks.digits(60, 28), LARGER[name] | {"epochs": 2}), [(2, 1), (4, 2), (9, 8)])


def test_a_slot_of_images_in_colour_too(splits: Splits) -> None:
    colour = replace(
        splits,
        train=data.Split(inputs=splits.train.inputs.repeat(1, 3, 1, 1), targets=splits.train.targets),
        validation=data.Split(inputs=splits.validation.inputs.repeat(1, 3, 1, 1), targets=splits.validation.targets),
        mean=splits.mean.repeat(3),
        std=splits.std.repeat(3),
    )
    check_any_place(bitwise(colour, {"build": lambda: noisy_cnn(channels=3)}), [(2, 1), (3, 1), (8, 7)])


@pytest.mark.parametrize("build", [noisy_mlp, noisy_cnn])
def test_who_comes_and_goes_leaves_no_trace(splits: Splits, build: Callable[[], nn.Module]) -> None:
    """One run stays while the others are exchanged, its row changes, and the stack shrinks and grows."""
    trial = bitwise(splits, {"build": build, "epochs": 6})
    run, guests = trial.run(), [trial.run() for trial in trial.several(8)[1:]]
    stack = stack_of([guests[0], guests[1], run], slots=4)
    results = []
    for epoch in range(trial.epochs):
        results.append(stack.train_epoch()[stack.runs.index(run)])
        for guest in [guest for guest in stack.runs if guest is not run][: 1 + epoch % 2]:
            stack.remove(guest)
        if epoch % 3 == 0:
            stack.compact()
        for guest in guests[2 + epoch : 3 + epoch]:
            stack.put(guest)
    expected = alone_in_a_stack(trial)
    assert timeless(results) == expected[0]
    assert_same(state(run), expected[1])


INFECTIONS: dict[str, Callable[[Trial], Run]] = {
    "lr is infinite": lambda trial: replace(trial, lr=math.inf).run(),
    "lr is huge": lambda trial: replace(trial, lr=1e30).run(),
    "weights are no numbers": lambda trial: _filled(trial.run(), math.nan),
    "weights are infinite": lambda trial: _filled(trial.run(), math.inf),
}


def _filled(run: Run, value: float) -> Run:
    for parameter in run.model.parameters():
        nn.init.constant_(parameter, value)
    return run


@pytest.mark.parametrize("name", INFECTIONS)
@pytest.mark.parametrize(
    "options", [{"build": noisy_mlp}, {"build": lambda: Residual(0.2)}, BITWISE["mlp clipped"], BITWISE["mlp sgd"]]
)
def test_a_run_gone_wrong_infects_nobody(splits: Splits, name: str, options: dict[str, Any]) -> None:
    trial = bitwise(splits, options)
    expected = alone_in_a_stack(trial)
    run, ill = trial.run(), INFECTIONS[name](replace(trial, seed=50, epochs=2))
    results = train(stack_of([trial.several(2)[1].run(), ill, run]))
    assert not math.isfinite(results[ill][-1].train_loss)
    assert timeless(results[run]) == expected[0]
    assert_same(state(run), expected[1])


def test_a_run_in_the_place_of_one_gone_wrong_is_well(splits: Splits) -> None:
    for options in (BITWISE["mlp clipped"], BITWISE["mlp sgd"], {"build": noisy_cnn}):
        trial = bitwise(splits, options)
        ill, run, other = _filled(trial.run(), math.nan), trial.run(), replace(trial, seed=50, epochs=9).run()
        stack = stack_of([ill, other])
        stack.train_epoch()
        stack.remove(ill)
        stack.put(run)
        results, expected = train(stack)[run], alone_in_a_stack(trial)
        assert timeless(results) == expected[0]
        assert_same(state(run), expected[1])


# --- stops amid an epoch ------------------------------------------------------------------------------------------------


LEFT = [("mlp", step) for step in (0, 1, 3, 4, 6)]
LEFT += [("cnn", 3), ("mlp by torch's step", 3), ("mlp sgd", 6), ("residual", 1)]
ALSO_LEFT = [(name, step) for name in ("cnn", "mlp by torch's step", "mlp sgd", "residual") for step in (0, 1, 3, 4, 6)]


@pytest.mark.parametrize(
    ("name", "step"),
    [*LEFT, *(pytest.param(*one, marks=pytest.mark.soak) for one in ALSO_LEFT if one not in LEFT)],
)
def test_runs_left_amid_an_epoch_go_on_anywhere(splits: Splits, tmp_path: Path, name: str, step: int) -> None:
    """All leave at a batch and are saved; one is put into a stack of another size with fresh ones."""
    trial = bitwise(splits, BITWISE[name])
    expected = alone_in_a_stack(trial)
    left = [trial.run() for trial in trial.several(3)]
    stack, results, stop = stack_of(left), [], stop_before(step)
    while ended := stack.train_epoch(stop):
        results.append(ended[0])
    digests = [checkpoint.save(tmp_path / f"{index}.pt", run.state_dict()) for index, run in enumerate(left)]
    stack.train_epoch()  # what becomes of the old stack is no matter

    runs = [trial.run() for trial in trial.several(3)]
    for index, run in enumerate(runs):
        run.load_state_dict(checkpoint.load(tmp_path / f"{index}.pt", digests[index]))
    fresh = [replace(trial, seed=70 + extra).run() for extra in range(4)]
    again = train(stack_of([*fresh[:3], runs[2], runs[0], fresh[3]]))
    results += again[runs[0]]
    assert timeless(results) == expected[0]
    assert_same(state(runs[0]), expected[1])
    assert timeless(again[fresh[0]]) == alone_in_a_stack(replace(trial, seed=70))[0]


def test_a_run_waits_for_others_to_come_to_its_batch(splits: Splits) -> None:
    """17 of 21 batches are behind it; the others begin, stop, and begin again, before they are there."""
    trial = bitwise(splits, {"build": noisy_mlp, "batch_size": 4})
    assert trial.steps == 21
    trials = [trial, replace(trial, seed=50), replace(trial, seed=60)]
    late, middle, fresh = (trial.run() for trial in trials)
    for run, batch in ((late, 17), (middle, 6)):
        stack = stack_of([run])
        assert stack.train_epoch(stop_before(batch)) == []
        stack.remove(run)
    stack = stack_of([middle, fresh, late], slots=4)
    for step in (3, 5, 10, 2):  # from batch 0: stopped at 3, 8, 18 and 20
        assert stack.train_epoch(stop_before(step)) == []
        sums = [run.state_dict()["loss_sum"].item() for run in stack.runs]
        assert all(math.isfinite(value) for value in sums)
    assert {run.batch for run in stack.runs} == {20}
    results = train(stack)
    for run, trial in zip((late, middle, fresh), trials, strict=True):
        expected = alone_in_a_stack(trial)
        assert timeless(results[run]) == expected[0]
        assert_same(state(run), expected[1])


def test_a_stopped_stack_goes_on_with_a_newcomer_beside_it(splits: Splits) -> None:
    """Nobody leaves: the runs wait in the rows, and with the loss sums, that they had."""
    trial = bitwise(splits, {"build": noisy_mlp})
    runs = [trial.run() for trial in trial.several(2)]
    stack = stack_of(runs, slots=3)
    stack.train_epoch(stop_before(2))
    newcomer = replace(trial, seed=50)
    runs.append(newcomer.run())
    stack.put(runs[2])
    results = train(stack)
    for run, one in zip(runs, [*trial.several(2), newcomer], strict=True):
        expected = alone_in_a_stack(one)
        assert timeless(results[run]) == expected[0]
        assert_same(state(run), expected[1])


def test_a_stop_before_anything_changes_nothing(splits: Splits) -> None:
    trial = bitwise(splits, {"build": noisy_mlp})
    run = trial.run()
    before = state(run)
    stack = stack_of([run])
    assert stack.train_epoch(lambda: True) == []
    after = state(run)
    del before["optimizer"], after["optimizer"]  # which has moments of zero by now
    assert_same(after, before)


def test_a_run_amid_an_epoch_moves_to_the_loop_and_back(splits: Splits) -> None:
    trial = Trial(splits=splits, build=noisy_mlp, optimizer=adamw, lr=0.01, epochs=4)
    run = trial.run()
    stack = stack_of([run, trial.several(2)[1].run()])
    assert stack.train_epoch(stop_before(1)) == []
    stack.remove(run)
    assert list(loop.train(run, stop_before(2))) == []
    stack.train_epoch()
    stack.put(run)
    results = train(stack)[run]
    assert apart(numbers(results), trial.by_plain_torch()) <= EQUAL
    assert run.executors == ["stack", "loop", "stack"]


# --- tensors ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_removed_is_its_own(splits: Splits) -> None:
    trial = bitwise(splits, {"build": noisy_cnn})
    run, other = trial.run(), trial.several(2)[1].run()
    stack = stack_of([run, other])
    stack.train_epoch(stop_before(2))
    stack.remove(run)
    before = state(run)
    stack.train_epoch()
    stack.put(trial.run())
    stack.train_epoch()
    assert_same(state(run), before)
    stack.remove(other)
    assert len(list(loop.train(run))) == len(list(loop.train(other))) + 2 == trial.epochs


def test_a_run_that_was_removed_counts_its_losses_for_itself(splits: Splits) -> None:
    """It trains on in the loop while another one trains in its row."""
    trial = Trial(splits=splits, build=noisy_mlp, optimizer=adamw, epochs=2)
    run, newcomer = trial.run(), trial.several(2)[1].run()
    stack = stack_of([run])
    stack.train_epoch()
    stack.remove(run)
    stack.put(newcomer)
    found: list[EpochResult] = []

    def train_the_other() -> bool:
        found.extend(loop.train(run, stop_before(1)))
        return False

    results = stack.train_epoch(train_the_other)
    found.extend(loop.train(run))
    assert timeless(results) == alone_in_a_stack(trial.several(2)[1])[0][:1]
    assert apart(numbers(found), trial.by_plain_torch()[1:]) <= EQUAL


def test_a_run_put_back_into_its_row_has_lost_nothing(splits: Splits) -> None:
    trial = bitwise(splits, {"build": noisy_mlp})
    run = trial.run()
    stack, results = stack_of([run, trial.several(2)[1].run()]), []
    while not run.finished:
        results.append(stack.train_epoch()[0])
        stack.remove(run)
        stack.put(run)
    assert timeless(results) == alone_in_a_stack(trial)[0]


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "rmsprop", "adamw", "radam"])
def test_a_slots_file_is_as_small_as_a_runs_alone(splits: Splits, tmp_path: Path, name: str) -> None:
    kinds = {"sgd momentum": partial(optim.SGD, momentum=0.9), "radam": optim.RAdam}
    kind = kinds.get(name) or OPTIMIZERS[name]
    trial = Trial(splits=splits, optimizer=kind, build=lambda: mlp((1, 8, 8), CLASSES, widths=[200, 100]), epochs=2)
    alone, runs = trial.run(), [trial.run() for trial in trial.several(8)]
    next(loop.train(alone))
    stack = stack_of(runs)
    stack.train_epoch()
    for index, run in enumerate((alone, runs[0], runs[5])):
        checkpoint.save(tmp_path / f"{index}.pt", run.state_dict())
    sizes = [(tmp_path / f"{index}.pt").stat().st_size for index in range(3)]
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=0.02)


def test_a_state_dict_shows_what_is_trained(splits: Splits) -> None:
    run = bitwise(splits, {"build": noisy_cnn}).run()
    before = weights(run)
    stack_of([run]).train_epoch()
    assert not any(torch.equal(before[name], tensor) for name, tensor in weights(run).items())
    assert weights(run)["1.num_batches_tracked"] == 4


# --- what cannot be stacked ---------------------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.spare(x)
        return self.layer(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, CLASSES)
        self.spare = nn.Linear(2, 2).half().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def stuck(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unused": ({"build": Unused}, r"the loss does not depend on gain, spare\.weight, spare\.bias"),
    "several types": ({"build": lambda: _mixed()}, "of several number types"),
    "micro-batches": ({"options": {"accumulation": 2}}, "micro-batches"),
    "nothing trained": ({"build": lambda: stuck(noisy_mlp())}, "no parameter is trained"),
}


def _mixed() -> nn.Module:
    model = Mixed()
    model.to = lambda *_: model  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stacked_is_told_before_a_run_is_taken(splits: Splits, name: str) -> None:
    options, message = REFUSED[name]
    run = Trial(splits=splits, dtype=torch.float32, **options).run()
    with pytest.raises(Unstackable, match=message):
        Stack(StackedForward(run.model), run, 2)


def test_unused_parameters_that_nobody_trains_do_no_harm(splits: Splits) -> None:
    def only_used(parameters: Any, lr: float) -> optim.Optimizer:
        return optim.AdamW(list(parameters)[1:3], lr=lr, weight_decay=0.1)

    trial = Trial(splits=splits, build=Unused, optimizer=only_used, lr=0.01)
    assert apart(together(trial.several()), [trial.by_plain_torch() for trial in trial.several()]) <= EQUAL


STRANGERS: dict[str, tuple[dict[str, Any], str]] = {
    "wider": ({"build": lambda: mlp((1, 8, 8), CLASSES, widths=[9, 8], dropout=0.3)}, "shapes of parameters"),
    "frozen": ({"build": lambda: frozen(noisy_mlp())}, "trained parameters"),
    "batch size": ({"batch_size": 19}, "batch size"),
    "precision": ({"options": {"precision": "bfloat16"}}, "precision"),
    "micro-batches": ({"options": {"accumulation": 2}}, "micro-batches"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_run_of_another_kind_is_refused_and_left_as_it_is(splits: Splits, name: str) -> None:
    options, message = STRANGERS[name]
    trial = bitwise(splits, {"build": noisy_mlp})
    stack = stack_of([trial.run()], slots=2)
    stranger = replace(trial, **options).run()
    with pytest.raises(Unstackable, match=f"differs from those of the stack: .*{message}"):
        stack.put(stranger)
    assert len(stack.runs) == 1
    assert stranger.executors == []


def test_a_full_stack_says_so(splits: Splits) -> None:
    trial = bitwise(splits, {})
    stack = stack_of([trial.run()])
    with pytest.raises(ValueError, match="a stack of 1 slots is full"):
        stack.put(trial.run())
