"""Metrics, losses and sampling go with the task of the data, or are refused before a trial, with those that do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.data import Splits, Task
from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train.build import assemble, check, registry
from hpo.train.optim import losses
from hpo.train.optim.losses import KnownLoss
from hpo.train.run import Run
from tests.support.inputs import splits_of as inputs_of
from tests.train.stack.test_losses_of_tasks import splits_of

CPU = torch.device("cpu")
BASE = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [4]},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
LOSS = {"metric": "loss"}


def resolved(folder: Path, **changes: Any) -> StudySpec:
    return registry.resolve(StudySpec.from_document({**BASE, **changes}), folder)


def built(splits: Splits, folder: Path, **changes: Any) -> Run:
    config = TrainConfig.from_tree(resolved(folder, **changes).tree)
    return assemble.build_run(config, splits, 0, folder, CPU)


OF_NUMBERS = "mse, l1, smooth_l1, huber, gaussian_nll, or leave [loss] out for mse"
WRONG: dict[str, tuple[Task, dict[str, Any], str]] = {
    "the default metric": (
        "regression",
        {},
        'metric = "accuracy": does not go with the task of the data, regression; take one of loss, mae, rmse, r2, pearson',
    ),
    "the first objective": (
        "classification",
        {"objectives": {"rmse": "minimize", "params": "minimize"}},
        'the first of [objectives] = "rmse": does not go with the task of the data, classification; take one of accuracy, ',
    ),
    "a metric watched": (
        "multilabel",
        {**LOSS, "watch": {"metrics": ["f1"]}},
        'watch.metrics = "f1": does not go with the task of the data, multilabel; take one of accuracy, loss, macro_f1, ',
    ),
    "a metric monitored": (
        "binary",
        {**LOSS, "stopping": {"patience": 3, "monitor": {"choices": ["f1", "mae"]}}},
        'stopping.monitor = "mae": does not go with the task of the data, binary; take one of accuracy, loss, ',
    ),
    "one of the losses": (
        "regression",
        {"metric": "rmse", "loss": {"name": {"choices": ["mse", "cross_entropy"]}}},
        f'loss.name = "cross_entropy": does not go with the task of the data, regression; take one of {OF_NUMBERS}',
    ),
    "labels of numbers": (
        "regression",
        {"metric": "rmse", "loss": {"name": "mse", "label_smoothing": {"low": 0.0, "high": 0.1}}},
        "loss.label_smoothing = 0.05: the data has no labels but numbers, which are not smoothed; remove it",
    ),
    "weights": (
        "classification",
        {**LOSS, "loss": {"name": "cross_entropy", "class_weights": [1.0, 2.0]}},
        "loss cross_entropy: 2 weights for 3 classes or labels; give one for each",
    ),
    "balance of numbers": (
        "regression",
        {"metric": "r2", "training": {"sampling": {"choices": ["shuffled", "balanced"]}}},
        'training.sampling = "balanced": needs one class for each image, but the task of the data is regression; remove it',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_with_the_task_is_refused_with_what_does(name: str, tmp_path: Path) -> None:
    task, changes, said = WRONG[name]
    with pytest.raises(SpecError) as error:
        assemble.try_out(resolved(tmp_path, **changes), splits_of(task), tmp_path, CPU)
    assert str(error.value).startswith(said)


def test_ratios_of_a_loss_that_may_be_negative_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"stopping\.gl = 5: divides by the loss, which gaussian_nll lets become negative"
    ):
        resolved(tmp_path, metric="rmse", loss={"name": "gaussian_nll"}, stopping={"gl": 5.0})


@pytest.mark.parametrize("task", losses.BY_TASK)
def test_the_task_decides_the_loss_and_the_outputs(task: Task, tmp_path: Path) -> None:
    splits = splits_of(task)
    run = built(splits, tmp_path, **LOSS)
    expected = losses.LOSSES[losses.BY_TASK[task]]()
    assert isinstance(run.loss, KnownLoss)
    assert run.loss == expected
    assert run.model(next(run.inputs.split(2))).shape == (2, splits.outputs)


def test_a_gaussian_has_a_mean_and_a_variance_for_each_target(tmp_path: Path) -> None:
    run = built(splits_of("regression"), tmp_path, metric="rmse", loss={"name": "gaussian_nll"})
    assert run.model(next(run.inputs.split(2))).shape == (2, 4)


def test_weights_come_from_the_training_part_alone(tmp_path: Path) -> None:
    splits = splits_of("classification")
    rare = replace(splits, train=replace(splits.train, targets=splits.train.targets.clamp(max=1)))
    run = built(rare, tmp_path, **LOSS, loss={"name": "cross_entropy", "class_weights": "balanced"})
    assert isinstance(run.loss, KnownLoss)
    assert run.loss.weights is not None
    counts = torch.bincount(rare.train.targets, minlength=3)
    assert run.loss.weights.tolist() == pytest.approx(
        [len(rare.train.targets) / (2 * n) if n else 0 for n in counts.tolist()]
    )


class Flat(nn.Module):
    """It forgets the dimension of targets, so that torch would compare each prediction with every target."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.one(x.flatten(1)).squeeze(1)
        return found


def test_a_model_without_the_dimension_of_targets_is_refused(tmp_path: Path) -> None:
    run = built(splits_of("regression"), tmp_path, **LOSS)
    run.model = Flat()
    with pytest.raises(SpecError, match=r"returns a tensor \[2\] for 2 images, on which the loss fails.*\[2, 2\]"):
        assemble.try_own_model(run, "mine.py:Flat")


@pytest.mark.parametrize("model", ["gru", "lstm"])
def test_pre_training_on_what_has_no_numbers_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=f'model {model}: pretrain = "autoencoder" restores numbers, but the inputs have'
    ):
        built(inputs_of("tokens"), tmp_path, **LOSS, model={"name": model, "pretrain": "autoencoder"})


def test_balanced_weights_have_a_use_on_rows_that_are_sorted_by_class(tmp_path: Path) -> None:
    splits = splits_of("binary")
    targets, order = splits.train.targets[:, 0].sort(stable=True)
    assert isinstance(splits.train.inputs, torch.Tensor)
    rows = replace(splits.train, inputs=splits.train.inputs[order], targets=targets[:, None])
    loss = {"name": "bce_with_logits", "pos_weight": {"choices": [1.0, "balanced"]}}
    spec = resolved(tmp_path, **LOSS, loss=loss, training={"batch_size": 8})
    few = replace(rows, inputs=rows.inputs[16:], targets=rows.targets[16:])
    assert list(check.unused(spec.tree, replace(splits, train=few), 0, tmp_path, CPU)) == []


def test_options_of_labels_are_left_out_where_the_metric_is_of_numbers(tmp_path: Path) -> None:
    assert resolved(tmp_path, metric="rmse", loss={"name": "mse"}).tree["loss"] == {"name": "mse"}
    assert resolved(tmp_path, **LOSS, loss={"name": "mse"}).tree["loss"].keys() == {"name", "of", "label_smoothing"}


def test_classes_and_weights_may_be_searched_by_the_loss(tmp_path: Path) -> None:
    """Validation does without weights, so trials can be compared by the loss. Another kind of loss is refused."""
    weights = {"name": "cross_entropy", "class_weights": {"choices": ["none", "balanced"]}}
    assemble.try_out(resolved(tmp_path, **LOSS, loss=weights), splits_of("classification"), tmp_path, CPU)
    with pytest.raises(SpecError, match="losses of several kinds cannot be compared"):
        resolved(tmp_path, **LOSS, loss={"name": "huber", "delta": {"low": 0.1, "high": 1.0}})
