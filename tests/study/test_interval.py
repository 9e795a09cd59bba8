"""Wilson's interval of a share of images, and which values have one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpo.spec.study_file import StudySpec
from hpo.study import interval
from hpo.study.interval import IMAGES_KEY, Interval, is_too_wide, wilson

PARTS = {
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": {"low": 0.01, "high": 0.1}},
}
OWN = {"objective": "x.py:f", "direction": "maximize"}
SEVERAL = {**PARTS, "objectives": {"accuracy": "maximize", "params": "minimize"}}


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 30, 0.4878, 0.8077),  # by scipy.stats.binomtest(20, 30).proportion_ci(method="wilson")
        (30, 30, 0.8865, 1.0),
    ],
)
def test_known_intervals(right: int, images: int, low: float, high: float) -> None:
    found = wilson(right / images, images)
    assert (round(found.low, 4), round(found.high, 4), found.images) == (low, high, images)


def test_an_interval_holds_its_share_despite_rounding() -> None:
    assert [n for n in range(1, 200) for k in range(n + 1) if k / n not in wilson(k / n, n)] == []
    assert 0.0 not in wilson(0.5, 30)


@pytest.mark.parametrize(
    ("document", "value", "receipt", "low"),
    [
        (PARTS, 20 / 30, {IMAGES_KEY: 30}, 0.4878),
        ({**PARTS, "metric": "top_3_accuracy"}, 20 / 30, {IMAGES_KEY: 30}, 0.4878),
        ({**PARTS, "value": "mean of last 3"}, 20 / 30, {IMAGES_KEY: 30}, 0.4878),
        (PARTS, 20 / 30, {}, None),  # the trial of an earlier hpo
        (PARTS, math.nan, {IMAGES_KEY: 30}, None),
        ({**PARTS, "metric": "loss"}, 0.5, {IMAGES_KEY: 30}, None),
        ({**PARTS, "metric": "macro_f1"}, 0.5, {IMAGES_KEY: 30}, None),
        (SEVERAL, 0.5, {IMAGES_KEY: 30}, None),
        (OWN, 0.5, {IMAGES_KEY: 30}, None),
    ],
)
def test_which_values_have_an_interval(
    document: dict[str, Any], value: float, receipt: dict[str, Any], low: float | None
) -> None:
    found = interval.of_trial(StudySpec.from_document({"name": "s", **document}), value, receipt)
    assert (found and round(found.low, 4)) == low
    assert found is None or isinstance(found, Interval)


def test_fewer_than_93_images_are_too_few_to_compare_trials() -> None:
    assert [images for images in (1, 30, 92, 93, 270) if is_too_wide(images)] == [1, 30, 92]
