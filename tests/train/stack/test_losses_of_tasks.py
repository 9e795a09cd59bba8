"""Every loss on every task: the loop and a stack of runs with different losses train to the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo import data
from hpo.data import Source, Splits, Task
from hpo.models import mlp
from hpo.train import loop
from hpo.train.epoch import EpochResult
from hpo.train.monitors import Watch
from hpo.train.optim import losses
from hpo.train.optim.losses import LOSSES, Loss
from tests.support.stacks import Trial, apart, digits, stack_of, train

OUTPUTS: dict[Task, int] = {"classification": 3, "binary": 1, "multilabel": 4, "regression": 2}
WATCHED = {
    "classification": ("macro_f1", "log_loss"),
    "binary": ("f1", "auroc"),
    "multilabel": ("micro_f1", "average_precision"),
    "regression": ("rmse", "mae", "r2"),
}


def splits_of(task: Task) -> Splits:
    found = digits(120)
    if task == "classification":
        return found
    assert isinstance(found.train.inputs, Tensor)
    assert isinstance(found.validation.inputs, Tensor)
    images = torch.cat([found.train.inputs, found.validation.inputs])
    targets: Tensor = 1000 + 50 * images.double().flatten(2).std(2).float() + torch.arange(OUTPUTS[task]) * 7.0
    targets = targets + images[:, 0, 0, : OUTPUTS[task]].float()
    if task != "regression":
        targets = targets > targets.median(0).values
    return data.load(Source(inputs=images, targets=targets, task=task), split_seed=0, device="cpu")


#: Losses that share a stack, by task.
TOGETHER: dict[str, tuple[Task, list[tuple[str, dict[str, Any]]]]] = {
    "classes": (
        "classification",
        [
            ("cross_entropy", {"class_weights": "balanced"}),
            ("cross_entropy", {"class_weights": [1.0, 0.5, 2.0], "label_smoothing": 0.1}),
            ("bce_with_logits", {"pos_weight": "balanced"}),
            ("mse", {}),
        ],
    ),
    "one label": ("binary", [("bce_with_logits", {}), ("bce_with_logits", {"pos_weight": 3.0}), ("mse", {})]),
    "labels": ("multilabel", [("bce_with_logits", {"pos_weight": "balanced"}), ("mse", {"label_smoothing": 0.1})]),
    "numbers": (
        "regression",
        [("mse", {}), ("l1", {}), ("smooth_l1", {"beta": 0.3}), ("huber", {}), ("huber", {"delta": 0.1})],
    ),
    "variances": ("regression", [("gaussian_nll", {})] * 2),
}


def trials_of(name: str) -> list[Trial]:
    task, wanted = TOGETHER[name]
    splits = splits_of(task)
    found = []
    for row, (kind, options) in enumerate(wanted):
        loss: Loss = losses.weighted(LOSSES[kind](**options), splits.train.targets, splits.outputs)
        outputs = OUTPUTS[task] * losses.outputs_per_target(loss)
        settings = {"loss": loss, "watch": Watch(metrics=WATCHED[task])}
        build = partial(mlp, (1, 8, 8), outputs, widths=[7, 5])
        found.append(Trial(splits=splits, build=build, seed=row, lr=0.1, epochs=4, options=settings))
    return found


def numbers(results: list[EpochResult]) -> list[list[float]]:
    names = [name for name in results[0].numbers if name not in ("seconds", "learning_rate")]
    return [[one.numbers[name] for name in names] for one in results]


@pytest.mark.parametrize("name", TOGETHER)
def test_a_stack_trains_each_run_as_the_loop_does(name: str) -> None:
    trials = trials_of(name)
    runs = [trial.run() for trial in trials]
    stacked = train(stack_of(runs))
    for run, trial in zip(runs, trials, strict=True):
        alone = list(loop.train(trial.run()))
        assert apart(numbers(stacked[run]), numbers(alone)) < 1e-9
        assert alone[-1].train_loss < alone[0].train_loss
        assert all(map(math.isfinite, alone[-1].numbers.values()))


def test_a_run_is_the_same_bit_for_bit_in_every_company() -> None:
    trials = trials_of("numbers")
    runs = [trial.run() for trial in trials]
    with_others = train(stack_of(runs))
    for run, trial in zip(runs, trials, strict=True):
        again = trial.run()
        assert numbers(train(stack_of([again]))[again]) == numbers(with_others[run])


def test_a_regression_has_no_accuracy_and_its_metrics_are_in_the_data_s_units() -> None:
    trial = replace(trials_of("numbers")[0], epochs=1)
    run = trial.run()
    [result] = loop.train(run)
    assert result.validation_accuracy is None
    assert "validation_accuracy" not in result.numbers
    with torch.no_grad():
        outputs = run.model(next(run.validation_inputs.split(1000)))
    errors = (outputs - run.splits.validation.targets).square().mean(0).sqrt() * run.splits.target_std
    assert result.judged("rmse") == pytest.approx(float(errors.mean()), rel=1e-6)
    assert result.validation_loss == pytest.approx(float((outputs - run.splits.validation.targets).square().mean()))
