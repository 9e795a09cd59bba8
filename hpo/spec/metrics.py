"""The names of metrics, the direction in which each improves, and the tasks that it goes with.

`train/eval_metrics.py` computes them. The names are kept here so that they can be checked without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Annotated

import pydantic
from pydantic_core import PydanticCustomError

from hpo.errors import nearest
from hpo.spec.curve import Direction

CLASSES = ("classification", "binary", "multilabel")  # tasks with classes or labels
TASKS = (*CLASSES, "regression")
SHARES, FREE = (0.0, 1.0), (-math.inf, math.inf)


@dataclass(frozen=True)
class KnownMetric:
    """What is known of a metric without computing it."""

    direction: Direction
    tasks: tuple[str, ...]
    bounds: tuple[float, float] = SHARES  # no value lies outside


METRICS: dict[str, KnownMetric] = {
    "accuracy": KnownMetric("maximize", CLASSES),
    "loss": KnownMetric("minimize", TASKS, FREE),
    "balanced_accuracy": KnownMetric("maximize", ("classification", "binary")),
    "f1": KnownMetric("maximize", ("binary",)),
    "macro_f1": KnownMetric("maximize", CLASSES),
    "micro_f1": KnownMetric("maximize", ("classification", "multilabel")),
    "auroc": KnownMetric("maximize", CLASSES),
    "average_precision": KnownMetric("maximize", CLASSES),
    "log_loss": KnownMetric("minimize", CLASSES, (0.0, math.inf)),
    "calibration_error": KnownMetric("minimize", ("classification", "binary")),
    "mae": KnownMetric("minimize", ("regression",), (0.0, math.inf)),
    "rmse": KnownMetric("minimize", ("regression",), (0.0, math.inf)),
    "r2": KnownMetric("maximize", ("regression",), (-math.inf, 1.0)),
    "pearson": KnownMetric("maximize", ("regression",), (-1.0, 1.0)),
}
ALWAYS = ("accuracy", "loss")  # measured in every epoch, if they go with the task
FURTHER = tuple(name for name in METRICS if name not in ALWAYS)
TOP_K = re.compile(r"top_([1-9]\d{0,8})_accuracy")  # for any K
OF_TOP_K = KnownMetric("maximize", ("classification",))
OWN_METRIC = "value"  # the name of the curve of a user's own training
#: These differ between two equal runs. Trials of before December 2026 have the examples as images, whatever they are.
UNREPEATABLE = {"seconds", "examples_per_second", "images_per_second", "peak_memory_mb"}


def is_known(name: str) -> bool:
    """Return whether a metric of this name exists."""
    return name in METRICS or TOP_K.fullmatch(name) is not None


def direction(name: str) -> Direction:
    """Return the direction in which a known metric improves."""
    return METRICS.get(name, OF_TOP_K).direction


def bounds(name: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a metric can have; infinite ones for an unknown metric."""
    return METRICS.get(name, OF_TOP_K).bounds if is_known(name) else FREE


def goes_with(name: str, task: str) -> bool:
    """Return whether a known metric can be computed for a task."""
    return task in METRICS.get(name, OF_TOP_K).tasks


def for_task(task: str) -> list[str]:
    """Return the names of the metrics that go with a task."""
    top_k = ["top_K_accuracy"] if task in OF_TOP_K.tasks else []
    return [name for name, known in METRICS.items() if task in known.tasks] + top_k


def is_of_numbers(name: str) -> bool:
    """Return whether a known metric goes with regressions alone."""
    return METRICS.get(name, OF_TOP_K).tasks == ("regression",)


def is_share(name: str) -> bool:
    """Return whether a known metric is the share of examples that are right."""
    return name == "accuracy" or TOP_K.fullmatch(name) is not None


def of_test(found: Container[str], metric: str) -> list[str]:
    """Return which metrics of a test part are shown: accuracy, the study's metric and loss, if they were measured.

    Args:
        found: names of measured values, such as test_loss.
        metric: the study's metric.
    """
    return [name for name in dict.fromkeys(["accuracy", metric, "loss"]) if f"test_{name}" in found]


def further(names: list[str]) -> list[str]:
    """Return the names, each once, of metrics that must be asked for: all but accuracy and loss."""
    return [name for name in dict.fromkeys(names) if name not in ALWAYS]


def column(name: str) -> str:
    """Return the name of a metric's validation curve in the ledger."""
    return f"validation_{name}"


def checked(name: str) -> str:
    """Return the name of a known metric, for pydantic. Raises PydanticCustomError for another name."""
    if is_known(name):
        return name
    mend = nearest(name, [*METRICS, "top_3_accuracy"])
    raise PydanticCustomError("metric", "there is no such metric{mend}; top_K_accuracy takes any K", {"mend": mend})


Metric = Annotated[str, pydantic.AfterValidator(checked)]
