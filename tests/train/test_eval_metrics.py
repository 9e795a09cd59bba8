"""Metrics against scikit-learn, their names in a study file, and what every executor makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from hpo.errors import SpecError
from hpo.spec import metrics
from hpo.spec.study_file import StudySpec
from hpo.train import eval_metrics, loop
from hpo.train.build import registry
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


REFERENCES: dict[str, Callable[[Any, Any], float]] = {
    "macro_f1": lambda p, y: sklearn.metrics.f1_score(y, p.argmax(1), average="macro"),
    "auroc": lambda p, y: sklearn.metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
    "calibration_error": calibration_error,
    "top_2_accuracy": lambda p, y: sklearn.metrics.top_k_accuracy_score(y, p, k=2),
    "top_3_accuracy": lambda p, y: sklearn.metrics.top_k_accuracy_score(y, p, k=3),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_metric_is_scikit_learns(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(200) % 5
    logits = torch.randn(200, 5, generator=generator) + 2.0 * torch.nn.functional.one_hot(labels, 5)
    probabilities = logits.double().softmax(1).numpy()
    expected = REFERENCES[name](probabilities, labels.numpy())
    assert eval_metrics.compute([name], logits, labels)[name] == pytest.approx(expected, abs=1e-6)


def test_logits_that_look_like_probabilities_are_still_logits() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.6], [0.1, 0.7]])
    expected = calibration_error(logits.double().softmax(1).numpy(), labels.numpy())
    assert eval_metrics.compute(["calibration_error"], logits, labels)["calibration_error"] == pytest.approx(expected)


def test_a_logit_that_is_no_number_makes_every_metric_none() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [1.0, 0.0, 0.5]])
    found = eval_metrics.compute(ALL, logits, torch.tensor([0, 1]))
    assert all(map(math.isnan, found.values()))
    assert list(found) == list(ALL)


def test_a_class_that_does_not_occur_is_left_out_without_a_warning() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    found = eval_metrics.compute(["macro_f1", "auroc"], logits, torch.tensor([0, 1, 1, 0]))
    assert found == {"macro_f1": 1.0, "auroc": 1.0}
    assert math.isnan(eval_metrics.compute(["auroc"], logits, torch.tensor([1, 1, 1, 1]))["auroc"])


@pytest.mark.parametrize("name", [*metrics.ALWAYS, *metrics.FURTHER, "top_5_accuracy"])
def test_every_metric_has_a_direction_and_fills_the_study_s(name: str) -> None:
    spec = StudySpec.from_document({**BASE, "metric": name})
    assert spec.direction == ("minimize" if name in ("loss", "calibration_error") else "maximize")
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
        ({"watch": {"metrics": ["f1"]}}, "watch.metrics.0 = 'f1': there is no such metric"),
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
    eval_metrics.check(["top_2_accuracy", "auroc"], 3)
    with pytest.raises(
        SpecError, match="top_3_accuracy: is 1 for every model, since the data has 3 classes; use a K below 3"
    ):
        eval_metrics.check(["top_3_accuracy"], 3)


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
        assert last.judged(name) == pytest.approx(REFERENCES[name](probabilities, validation.targets.numpy()), abs=1e-6)
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
    assert eval_metrics.compute(["auroc"], logits, labels)["auroc"] == 1.0
