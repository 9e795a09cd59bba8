"""The 95 % interval of a value that is a share of validation examples.

A share of n examples has a standard error; the interval is Wilson's score interval (Wilson, 1927). Other metrics have no interval
here: their standard errors need the values of the single examples, and these are not recorded. Nor has the share of right labels
where an example has several, since these are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from hpo.spec import metrics
from hpo.spec.study_file import StudySpec

IMAGES_KEY = "validation_images"  # of a receipt: the number of examples in the validation part, images or not
TEST_IMAGES_KEY = "test_images"  # likewise, in the test part
TASK_KEY = "task"  # of a receipt: the task of the data; without it classification
MULTILABEL = "multilabel"
Z = NormalDist().inv_cdf(0.975)
WIDEST = 0.2  # a wider interval of the share 0.5 is too wide to compare trials; fewer than 93 examples have one


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The 95 % interval of a share of examples."""

    low: float
    high: float
    images: int

    def __contains__(self, share: float) -> bool:
        return self.low <= share <= self.high


def wilson(share: float, images: int) -> Interval:
    """Return Wilson's score interval of a share, 0..1, of `images` examples, at least 1.

    The share may be a mean over epochs. The interval is then too wide rather than too narrow.
    """
    middle = share + Z**2 / (2 * images)
    reach = Z * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    scale = 1 + Z**2 / images
    low, high = (middle - reach) / scale, (middle + reach) / scale
    return Interval(low=min(share, max(0.0, low)), high=max(share, min(1.0, high)), images=images)  # despite rounding


def metric_of(spec: StudySpec) -> str | None:
    """Return the metric that is a study's only objective; None for several objectives and for an objective of the user's own."""
    return spec.metric if spec.is_declared and not spec.objectives else None


def of_trial(spec: StudySpec, value: float, receipt: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a trial's value. None for a metric that is no share, and if the number of examples is unknown."""
    metric = metric_of(spec)
    return None if metric is None else of_metric(metric, value, counted(receipt))


def counted(receipt: Mapping[str, Any], key: str = IMAGES_KEY) -> int | None:
    """Return of how many examples an accuracy is the share. None if that is unknown, and if they have several labels."""
    return None if receipt.get(TASK_KEY) == MULTILABEL else receipt.get(key)


def of_metric(metric: str, value: float, images: int | None) -> Interval | None:
    """Return the interval of a metric's value, likewise."""
    return wilson(value, images) if images and metrics.is_share(metric) and 0 <= value <= 1 else None


def is_too_wide(images: int) -> bool:
    """Return whether a validation part of so many examples is too small to compare trials by accuracy."""
    found = wilson(0.5, images)
    return found.high - found.low > WIDEST
