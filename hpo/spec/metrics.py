"""The names of metrics, and the direction in which each improves.

`train/eval_metrics.py` computes them. The names are kept here so that they can be checked without torch.
"""

from __future__ import annotations

import re
from typing import Annotated

import pydantic
from pydantic_core import PydanticCustomError

from hpo.errors import nearest
from hpo.spec.curve import Direction

ALWAYS: dict[str, Direction] = {"accuracy": "maximize", "loss": "minimize"}  # every epoch has these
FURTHER: dict[str, Direction] = {"macro_f1": "maximize", "auroc": "maximize", "calibration_error": "minimize"}
TOP_K = re.compile(r"top_([1-9]\d{0,8})_accuracy")  # for any K; higher is better
OWN_METRIC = "value"  # the name of the curve of a user's own training
UNREPEATABLE = {"seconds", "images_per_second", "peak_memory_mb"}  # these differ between two equal runs


def is_known(name: str) -> bool:
    """Return whether a metric of this name exists."""
    return name in ALWAYS or name in FURTHER or TOP_K.fullmatch(name) is not None


def direction(name: str) -> Direction:
    """Return the direction in which a known metric improves."""
    return (ALWAYS | FURTHER).get(name, "maximize")


def is_share(name: str) -> bool:
    """Return whether a known metric is the share of images that are right."""
    return name == "accuracy" or TOP_K.fullmatch(name) is not None


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
    mend = nearest(name, [*ALWAYS, *FURTHER, "top_3_accuracy"])
    raise PydanticCustomError("metric", "there is no such metric{mend}; top_K_accuracy takes any K", {"mend": mend})


Metric = Annotated[str, pydantic.AfterValidator(checked)]
