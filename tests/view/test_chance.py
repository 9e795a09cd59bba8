"""What is said of a value chosen as the best of many, of its test, and of a validation part with few images."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.data import Overview
from hpo.spec.study_file import StudySpec
from hpo.study.interval import wilson
from hpo.study.status import Best, Summary
from hpo.view import pages
from hpo.view.chance import choice_lines, outcome_lines, seeds_lines
from hpo.view.checked import moved_image_warnings, small_part_warnings
from tests.study.test_interval import PARTS
from tests.view.test_live import drawn, summary

BEST = Best(number=21, value=20 / 30, interval=wilson(20 / 30, 30), rivals=11)
SHOWN = "0.6667 (0.4878 to 0.8077, n = 30)"


def searched(**changes: Any) -> Summary:
    known: dict[str, Any] = {"counts": {"complete": 13, "pruned": 17}, "metric": "accuracy", "value_rule": "last"}
    return summary(**({"best": BEST} | known | changes))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {},
            [
                "chance   the best of 30 trials is partly luck",
                "         11 other complete trials lie within its interval, of 30 examples",
            ],
        ),
        (
            {"value_rule": "best", "best": Best(number=1, value=1.0, interval=wilson(1.0, 30), rivals=1)},
            [
                "chance   the best of 30 trials, each at its best epoch, is partly luck",
                "         1 other complete trial lies within its interval, of 30 examples",
            ],
        ),
        (
            {"best": Best(number=1, value=1.0, interval=wilson(1.0, 30), rivals=0)},
            [
                "chance   the best of 30 trials is partly luck",
                "         no other complete trial lies within its interval",
            ],
        ),
        (
            {"best": Best(number=1, value=0.5)},
            [
                "chance   the best of 30 trials is partly luck",
                "         no interval: the trial does not name its number of examples",
            ],
        ),
        (
            {"best": Best(number=1, value=0.5), "metric": "loss"},
            [
                "chance   the best of 30 trials is partly luck",
                "         no interval for loss: values of single examples are not kept",
            ],
        ),
        (
            {"best": Best(number=1, value=0.9, task="multilabel")},
            [
                "chance   the best of 30 trials is partly luck",
                "         no interval for accuracy: the labels of an example are not independent",
            ],
        ),
        (
            {"best": Best(number=1, value=53.2), "metric": "rmse"},
            [
                "chance   the best of 30 trials is partly luck",
                "         no interval for rmse: values of single examples are not kept",
            ],
        ),
        ({"metric": None}, []),  # several objectives, or one of the user's own, which may be exact
        ({"counts": {"complete": 1, "pruned": 0}}, []),
        ({"best": None}, []),
    ],
)
def test_what_the_best_of_many_is_worth(changes: dict[str, Any], lines: list[str]) -> None:
    assert choice_lines(searched(**changes)) == lines


def test_the_best_value_is_shown_with_its_interval() -> None:
    one = searched()
    assert f"best     {SHOWN} by trial 21" in pages.status_text(one).splitlines()
    assert f"best {SHOWN} by trial 21" in [line.rstrip() for line in drawn(one, 80)]
    assert "  0.6667 (0.4878 to 0.8077)  " in pages.status_table([one])
    assert pages.to_json(one)["best"]["interval"] == {
        "low": BEST.interval.low,
        "high": BEST.interval.high,
        "images": 30,
    }


def trained(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "value": 20 / 30,
        "epoch": 2,
        "history": [{"validation_accuracy": 0.5}, {"validation_accuracy": 20 / 30}],
        "overfits_since": None,
        "test_accuracy": 15 / 30,
        "test_images": 30,
        "validation_images": 30,
    }
    return found | changes


VALIDATED = f"validation accuracy {SHOWN}, with the weights of epoch 2"
OUTSIDE = "lies outside the interval of validation accuracy, 0.4878 to 0.8077"


@pytest.mark.parametrize(
    ("changes", "tried", "lines"),
    [
        ({}, 30, [VALIDATED, "test accuracy 0.5000 (0.3315 to 0.6685, n = 30)"]),
        (
            {"test_accuracy": 9 / 30, "overfits_since": 4},
            30,
            [
                VALIDATED,
                "overfits since epoch 4: the validation loss rose while the training loss fell",
                "test accuracy 0.3000 (0.1666 to 0.4788, n = 30)",
                f"test accuracy 0.3000 {OUTSIDE}: the best of 30 trials was partly luck, or the two parts differ; "
                "expect the test value",
            ],
        ),
        (
            {"test_accuracy": 0.3},
            0,
            [
                VALIDATED,
                "test accuracy 0.3000 (0.1666 to 0.4788, n = 30)",
                f"test accuracy 0.3000 {OUTSIDE}: by chance, or the two parts differ; expect the test value",
            ],
        ),
        (
            {"test_accuracy": 0.9},
            30,
            [
                VALIDATED,
                "test accuracy 0.9000 (0.7438 to 0.9654, n = 30)",
                f"test accuracy 0.9000 {OUTSIDE}: by chance, or because the two parts differ",
            ],
        ),
    ],
)
def test_what_a_test_says_of_the_validation(changes: dict[str, Any], tried: int, lines: list[str]) -> None:
    assert outcome_lines(trained(**changes), "accuracy", tried=tried) == lines


def test_a_loss_has_no_interval_and_its_accuracy_is_compared() -> None:
    assert outcome_lines(trained(value=1.25, test_accuracy=0.3), "loss", tried=1) == [
        "validation loss 1.2500, with the weights of epoch 2",
        "test accuracy 0.3000 (0.1666 to 0.4788, n = 30)",
        f"test accuracy 0.3000 {OUTSIDE}: by chance, or the two parts differ; expect the test value",
    ]


def test_a_training_of_an_earlier_hpo_does_not_know_its_validation_images() -> None:
    found = {key: value for key, value in trained(test_accuracy=0.3).items() if key != "validation_images"}
    assert outcome_lines(found, "accuracy", tried=30) == [
        "validation accuracy 0.6667, with the weights of epoch 2",
        "test accuracy 0.3000 (0.1666 to 0.4788, n = 30)",
    ]


REGRESSION = {
    "task": "regression",
    "value": 53.25,
    "test_rmse": 61.5,
    "test_loss": 0.75,
    "epoch": 2,
    "overfits_since": None,
}
COUNTED = {"test_images": 30, "validation_images": 30}


def test_a_regression_is_told_by_its_own_metric() -> None:
    found = {**REGRESSION, **COUNTED, "history": [{"validation_rmse": 60.0}, {"validation_rmse": 53.25}]}
    validated = "validation {} 53.2500, with the weights of epoch 2"
    assert outcome_lines(found, "rmse", tried=30) == [validated.format("rmse"), "test rmse 61.5000"]
    assert outcome_lines(found, "loss", tried=30) == [validated.format("loss"), "test loss 0.7500"]


def test_several_labels_have_no_interval() -> None:
    assert outcome_lines(trained(task="multilabel", test_accuracy=0.3), "accuracy", tried=30) == [
        "validation accuracy 0.6667, with the weights of epoch 2",
        "test accuracy 0.3000",
    ]


def test_another_metric_than_accuracy_is_told_of_the_test_too() -> None:
    assert outcome_lines(trained(value=0.9, test_auroc=0.75, test_loss=0.5), "auroc", tried=30)[1:] == [
        "test accuracy 0.5000 (0.3315 to 0.6685, n = 30)",
        "test auroc 0.7500",
    ]


def test_seeds_of_a_regression_are_told_by_its_own_metric() -> None:
    mean = {"value": 2.0, "low": 1.0, "high": 3.0, "deviation": 0.5}
    one = {"folder": "seed-1", "value": 2.0, "test_rmse": 2.5, "test_loss": 0.5}
    found = {
        "trainings": [one],
        "means": dict.fromkeys(["value", "test_rmse", "test_loss"], mean),
        "task": "regression",
    }
    assert seeds_lines({**found, **COUNTED}, "rmse") == [
        "        validation rmse  test rmse  test loss",
        "seed-1           2.0000     2.5000     0.5000",
        "test rmse 2.0000 (1.0000 to 3.0000), standard deviation 0.5000",
        "test loss 2.0000 (1.0000 to 3.0000), standard deviation 0.5000",
        "validation rmse 2.0000 (1.0000 to 3.0000), standard deviation 0.5000",
        "means of 1 seeds with 95 % intervals by Student's t, for this test part",
    ]


# --- hpo check --------------------------------------------------------------------------------------------------------


def overview(train: int, validation: int, **changes: Any) -> Overview:
    found: dict[str, Any] = {
        "inputs": "images [1, 8, 8] as [channels, height, width]",
        "targets": "2 classes",
        "rows": {"train": train, "validation": validation, "test": 2},
        "classes": ["a", "b"],
        "counts": {"train": [train - 1, 1], "validation": [validation - 1, 1], "test": [1, 1]},
        "shipped": [],
        "notes": [],
        "padding": 0.0,
        "unit": "image",
        "split": "stratified",
        "leaks": [],
        "examples": [],
    }
    return Overview(**(found | changes))


@pytest.mark.parametrize(
    ("data", "value", "shipped", "mend"),
    [
        (
            {},
            "best",
            [],
            'add images, or use folds = 2 and fold = 0 in [data] (about 85 images), or use value = "mean of last 3"',
        ),
        ({}, "mean of last 2", [], "add images, or use folds = 2 and fold = 0 in [data] (about 85 images)"),
        ({"folds": 5, "fold": 0}, "last", [], 'add images, or use value = "mean of last 3"'),
        ({}, "mean of last 3", ["validation"], "add images"),
    ],
)
def test_few_validation_images_are_warned_of(data: dict[str, Any], value: str, shipped: list[str], mend: str) -> None:
    spec = StudySpec.from_document({"name": "s", **PARTS, "data": {"name": "digits", **data}, "value": value})
    assert small_part_warnings(spec, overview(140, 30, shipped=shipped)) == [
        "data: 30 validation images are few: an accuracy of 0.5 on them may be 0.3315 to 0.6685 (95 %), so small differences "
        f"between trials are chance; {mend}"
    ]
    assert small_part_warnings(spec, overview(140, 93, shipped=shipped)) == []


def test_moves_of_images_whose_targets_may_be_places_are_warned_of() -> None:
    moving = {"augment": {"erasing": 0.5, "rotation": {"low": 0.0, "high": 9.0}}}
    spec = StudySpec.from_document({"name": "s", **PARTS, **moving})
    [line] = moved_image_warnings(spec, overview(140, 93, classes=[], targets="2 numbers to predict"))
    assert line.startswith("augment.rotation: moves what an image shows, but not its targets; ")
    assert moved_image_warnings(spec, overview(140, 93)) == []
    still = StudySpec.from_document({"name": "s", **PARTS, "augment": {"erasing": 0.5, "crop": 0}})
    assert moved_image_warnings(still, overview(140, 93, classes=[])) == []
