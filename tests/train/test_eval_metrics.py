"""Metrics against scikit-learn, their names in a study file, and what every executor makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from hpo.data import Splits, Task
from hpo.errors import SpecError
from hpo.spec import metrics
from hpo.spec.study_file import StudySpec
from hpo.train import eval_metrics, loop
from hpo.train.build import registry
from hpo.train.inputs import in_units
from hpo.train.monitors import Watch
from hpo.train.run import Run
from hpo.train.stack.stack import Stack
from hpo.train.stack.vmap_forward import VmapForward
from hpo.train.validation import assess
from tests.support.stacks import Trial, digits, stack_of, train
from tests.train.test_early_stopping import BASE

ALL = ("macro_f1", "auroc", "calibration_error", "top_2_accuracy")


def calibration_error(probabilities: Any, labels: Any) -> float:
    """Return the expected calibration error in 15 bins, as Guo et al. (2017) write it."""
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def sklearn_by_value(function: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
    """Return scikit-learn's function with its arguments in the order of ours."""
    return lambda judged, targets: function(targets, judged)


def of(task: Task) -> Splits:
    """Return splits of a task. Targets of a regression have been standardised from other units."""
    found = replace(digits(), task=task, num_classes=5)
    if task != "regression":
        return found
    units = torch.tensor([2000.0, -3.0, 0.1]), torch.tensor([12.0, 0.5, 400.0])
    return replace(found, target_mean=units[0], target_std=units[1])


def measured(names: Sequence[str], outputs: Tensor, targets: Tensor, splits: Splits) -> dict[str, float]:
    return eval_metrics.compute(names, in_units(outputs, splits), in_units(targets, splits), splits.task)


OF_CLASSES: dict[str, Callable[[Any, Any], float]] = {
    "macro_f1": lambda p, y: sklearn.metrics.f1_score(y, p.argmax(1), average="macro"),
    "micro_f1": lambda p, y: sklearn.metrics.f1_score(y, p.argmax(1), average="micro"),
    "balanced_accuracy": lambda p, y: sklearn.metrics.balanced_accuracy_score(y, p.argmax(1)),
    "auroc": lambda p, y: sklearn.metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
    "average_precision": lambda p, y: sklearn.metrics.average_precision_score(y, p, average="macro"),
    "log_loss": lambda p, y: sklearn.metrics.log_loss(y, p),
    "calibration_error": calibration_error,
    "top_2_accuracy": lambda p, y: sklearn.metrics.top_k_accuracy_score(y, p, k=2),
    "top_3_accuracy": lambda p, y: sklearn.metrics.top_k_accuracy_score(y, p, k=3),
}
OF_BINARY: dict[str, Callable[[Any, Any], float]] = {
    "f1": lambda p, y: sklearn.metrics.f1_score(y, p > 0.5),
    "macro_f1": lambda p, y: sklearn.metrics.f1_score(y, p > 0.5, average="macro"),
    "balanced_accuracy": lambda p, y: sklearn.metrics.balanced_accuracy_score(y, p > 0.5),
    "auroc": sklearn_by_value(sklearn.metrics.roc_auc_score),
    "average_precision": sklearn_by_value(sklearn.metrics.average_precision_score),
    "log_loss": sklearn_by_value(sklearn.metrics.log_loss),
    "calibration_error": lambda p, y: calibration_error(np.hstack([1 - p, p]), y[:, 0]),
}
OF_LABELS: dict[str, Callable[[Any, Any], float]] = {
    "macro_f1": lambda p, y: sklearn.metrics.f1_score(y, p > 0.5, average="macro"),
    "micro_f1": lambda p, y: sklearn.metrics.f1_score(y, p > 0.5, average="micro"),
    "auroc": lambda p, y: sklearn.metrics.roc_auc_score(y, p, average="macro"),
    "average_precision": lambda p, y: sklearn.metrics.average_precision_score(y, p, average="macro"),
    "log_loss": lambda p, y: np.mean([sklearn.metrics.log_loss(y[:, i], p[:, i]) for i in range(y.shape[1])]),
}
OF_NUMBERS: dict[str, Callable[[Any, Any], float]] = {
    "mae": sklearn_by_value(sklearn.metrics.mean_absolute_error),
    "rmse": sklearn_by_value(sklearn.metrics.root_mean_squared_error),
    "r2": sklearn_by_value(sklearn.metrics.r2_score),
    "pearson": lambda p, y: np.mean([np.corrcoef(p[:, i], y[:, i])[0, 1] for i in range(y.shape[1])]),
}
REFERENCES: dict[Task, dict[str, Callable[[Any, Any], float]]] = {
    "classification": OF_CLASSES,
    "binary": OF_BINARY,
    "multilabel": OF_LABELS,
    "regression": OF_NUMBERS,
}


def drawn(task: Task) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of 200 rows."""
    generator = torch.Generator().manual_seed(3)
    if task == "classification":
        targets = torch.arange(200) % 5
        return torch.randn(200, 5, generator=generator) + 2.0 * torch.nn.functional.one_hot(targets, 5), targets
    columns = 1 if task == "binary" else 3
    targets = torch.randn(200, columns, generator=generator)
    outputs = targets + torch.randn(200, columns, generator=generator)
    return outputs, targets if task == "regression" else targets > 0.3


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, found in REFERENCES.items() for name in found])
def test_a_metric_is_scikit_learns(task: Task, name: str) -> None:
    (outputs, targets), splits = drawn(task), of(task)
    judged, wanted = in_units(outputs.double(), splits), in_units(targets, splits)
    if task != "regression":
        judged = judged.softmax(1) if task == "classification" else judged.sigmoid()
    expected = REFERENCES[task][name](judged.numpy(), wanted.numpy())
    assert measured([name], outputs, targets, splits)[name] == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert metrics.goes_with(name, task)


def test_every_metric_has_a_reference_for_every_task_it_goes_with() -> None:
    for task, found in REFERENCES.items():
        named = {"top_K_accuracy" if name.startswith("top_") else name for name in found}
        assert named == set(metrics.for_task(task)) - {*metrics.ALWAYS}


def test_a_regression_s_first_outputs_are_its_predictions() -> None:
    outputs, targets = drawn("regression")
    both = torch.cat([outputs, torch.full_like(outputs, 1e9)], 1)
    names = [*OF_NUMBERS]
    found = [measured(names, one, targets, of("regression")) for one in (outputs, both)]
    assert found[0] == found[1]


def test_targets_far_from_0_have_a_coefficient_of_determination() -> None:
    far = replace(of("regression"), target_mean=torch.tensor([1e6] * 3), target_std=torch.ones(3))
    outputs, targets = drawn("regression")
    near = replace(far, target_mean=torch.zeros(3))
    found = [measured(["r2", "pearson"], outputs, targets, splits) for splits in (near, far)]
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_constant_prediction_correlates_with_nothing() -> None:
    _, targets = drawn("regression")
    found = measured(["pearson", "rmse"], torch.zeros_like(targets), targets, of("regression"))
    assert math.isnan(found["pearson"])
    assert found["rmse"] > 0


def test_a_single_row_has_no_spread() -> None:
    one = torch.zeros(1, 3)
    found = measured(["r2", "pearson", "mae"], one, one, of("regression"))
    assert found["mae"] == 0
    assert all(math.isnan(found[name]) for name in ("r2", "pearson"))


def test_a_probability_too_small_for_its_logarithm_has_a_finite_log_loss() -> None:
    far = torch.tensor([[2000.0, 0.0], [0.0, 0.0]])
    assert measured(["log_loss"], far, torch.tensor([1, 0]), of("classification")) == {
        "log_loss": pytest.approx(1000 + math.log(2) / 2)
    }


def test_logits_that_look_like_probabilities_are_still_logits() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.6], [0.1, 0.7]])
    expected = calibration_error(logits.double().softmax(1).numpy(), labels.numpy())
    found = measured(["calibration_error"], logits, labels, of("classification"))
    assert found["calibration_error"] == pytest.approx(expected)


@pytest.mark.parametrize("task", REFERENCES)
def test_an_output_that_is_no_number_makes_every_metric_none(task: Task) -> None:
    outputs, targets = drawn(task)
    outputs[7, 0] = math.nan
    found = measured([*REFERENCES[task]], outputs, targets, of(task))
    assert all(map(math.isnan, found.values()))
    assert list(found) == list(REFERENCES[task])


def test_a_class_that_does_not_occur_is_left_out_without_a_warning() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    names, splits = ["macro_f1", "auroc", "balanced_accuracy", "average_precision"], of("classification")
    assert measured(names, logits, torch.tensor([0, 1, 1, 0]), splits) == dict.fromkeys(names, 1.0)
    assert math.isnan(measured(["auroc"], logits, torch.tensor([1, 1, 1, 1]), splits)["auroc"])


def test_a_label_that_is_never_set_is_left_out_without_a_warning() -> None:
    outputs, targets = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[True, False], [False, False]])
    names = ["auroc", "average_precision"]
    assert measured(names, outputs, targets, of("multilabel")) == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize("name", [*metrics.ALWAYS, *metrics.FURTHER, "top_5_accuracy"])
def test_every_metric_has_a_direction_and_fills_the_study_s(name: str) -> None:
    spec = StudySpec.from_document({**BASE, "metric": name})
    minimized = ("loss", "log_loss", "calibration_error", "mae", "rmse")
    assert spec.direction == ("minimize" if name in minimized else "maximize")
    assert spec.watch == ({} if name in metrics.ALWAYS else {"metrics": [name]})
    with pytest.raises(SpecError, match=rf"{name} must be"):
        StudySpec.from_document(
            {**BASE, "metric": name, "direction": "minimize" if spec.direction == "maximize" else "maximize"}
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"metric": "auc"},
            "metric = 'auc': there is no such metric (did you mean 'auroc'?); top_K_accuracy takes any K",
        ),
        ({"metric": "top_0_accuracy"}, "there is no such metric (did you mean 'top_3_accuracy'?)"),
        ({"watch": {"metrics": ["f2"]}}, "watch.metrics.0 = 'f2': there is no such metric"),
        ({"watch": {"metrics": "auroc"}}, "watch.metrics = 'auroc': input should be a list"),
        ({"watch": {"norm": True}}, "watch.norm: watch takes no 'norm' (did you mean 'norms'?)"),
        ({"watch": {"norms": {"choices": [True, False]}}}, "what is watched changes no training; give one value"),
    ],
)
def test_what_a_file_says_wrongly_of_metrics_is_told_with_the_mend(
    changes: dict[str, Any], said: str, tmp_path: Any
) -> None:
    with pytest.raises(SpecError) as error:
        registry.resolve(StudySpec.from_document({**BASE, **changes}), tmp_path)
    assert said in str(error.value)


def test_a_k_that_every_model_reaches_is_refused() -> None:
    eval_metrics.check("watch.metrics", ["top_2_accuracy", "auroc"], "classification", 3)
    with pytest.raises(
        SpecError,
        match=r'watch.metrics = "top_3_accuracy": is 1 for every model, since the data has 3 classes; use a K below 3',
    ):
        eval_metrics.check("watch.metrics", ["top_3_accuracy"], "classification", 3)


@pytest.mark.parametrize(
    ("task", "name", "instead"),
    [
        ("regression", "accuracy", "loss, mae, rmse, r2, pearson"),
        ("regression", "top_3_accuracy", "loss, mae, rmse, r2, pearson"),
        ("multilabel", "f1", "accuracy, loss, macro_f1, micro_f1, auroc, average_precision, log_loss"),
        (
            "classification",
            "rmse",
            "accuracy, loss, balanced_accuracy, macro_f1, micro_f1, auroc, average_precision, log_loss, "
            "calibration_error, top_K_accuracy",
        ),
    ],
)
def test_a_metric_that_does_not_go_with_the_task_is_refused_with_those_that_do(
    task: Task, name: str, instead: str
) -> None:
    with pytest.raises(SpecError) as error:
        eval_metrics.check("metric", ["loss", name], task, 5)
    assert error.value.lines == [
        f'metric = "{name}": does not go with the task of the data, {task}; take one of {instead}'
    ]


TRIAL = Trial(splits=digits(), epochs=3, options={"watch": Watch(metrics=ALL)})


def test_measures_are_scikit_learn_s() -> None:
    """The loop measures what scikit-learn does and the last epoch's values come again."""
    run = TRIAL.run()
    *_, last = loop.train(run)
    validation = run.splits.validation
    with torch.no_grad():
        logits = run.model(next(run.validation_inputs.split(1000)))
    probabilities = logits.softmax(1).numpy()
    for name in ALL:
        assert last.judged(name) == pytest.approx(OF_CLASSES[name](probabilities, validation.targets.numpy()), abs=1e-6)
    again = assess(run.model, validation, splits=run.splits, metrics=ALL)
    assert again == {name: last.judged(name) for name in ("loss", "accuracy", *ALL)}


def test_metrics_change_nothing_of_a_training() -> None:
    plain = replace(TRIAL, options={}).run()
    assert [replace(one, seconds=0.0) for one in loop.train(plain)] == [
        replace(one, seconds=0.0, watched={}) for one in loop.train(TRIAL.run())
    ]


def by_vmap(runs: list[Run]) -> Stack:
    stack = Stack(VmapForward(runs[0].model, next(runs[0].validation_inputs.split(2))), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return stack


@pytest.mark.parametrize("count", [117, 160])  # validation parts that a stack fills up, and that it does not
@pytest.mark.parametrize("make", [stack_of, by_vmap])
def test_a_stack_measures_each_run_as_the_loop_does(make: Callable[[list[Run]], Stack], count: int) -> None:
    trials = replace(TRIAL, splits=digits(count)).several(3)
    runs = [trial.run() for trial in trials]
    stacked = train(make(runs))
    for run, trial in zip(runs, trials, strict=True):
        for one, other in zip(stacked[run], loop.train(trial.run()), strict=True):
            assert one.watched.keys() == other.watched.keys() == {f"validation_{name}" for name in ALL}
            assert np.allclose(list(one.watched.values()), list(other.watched.values()), rtol=0, atol=1e-9)


def test_logits_are_measured_in_float64_whatever_the_model_computes_in() -> None:
    logits: Tensor = torch.tensor([[20.0, 0.0], [19.0, 0.0], [0.0, 1.0], [18.0, 0.0]])  # saturated in float32
    labels = torch.tensor([0, 1, 1, 1])
    assert measured(["auroc"], logits, labels, of("classification"))["auroc"] == 1.0
