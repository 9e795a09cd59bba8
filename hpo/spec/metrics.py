"""What a study may be judged by, and what it may watch beside that: the names of metrics, and which way each is better.

How they are computed stands in `train/eval_metrics.py`: whoever only writes to a study needs no torch to know them.
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
TOP_K = re.compile(r"top_([1-9]\d{0,8})_accuracy")  # for any K: higher is better
UNREPEATABLE = {"seconds", "images_per_second", "peak_memory_mb"}  # another run of the same training has others


def is_known(name: str) -> bool:
    """Say whether there is a metric of this name."""
    return name in ALWAYS or name in FURTHER or TOP_K.fullmatch(name) is not None


def direction(name: str) -> Direction:
    """Return which way a known metric is better."""
    return (ALWAYS | FURTHER).get(name, "maximize")


def further(names: list[str]) -> list[str]:
    """Return those of the names that not every epoch has, each once."""
    return [name for name in dict.fromkeys(names) if name not in ALWAYS]


def column(name: str) -> str:
    """Return what the validation part's curve of a metric is called in the ledger."""
    return f"validation_{name}"


def _checked(name: str) -> str:
    if is_known(name):
        return name
    mend = nearest(name, [*ALWAYS, *FURTHER, "top_3_accuracy"])
    raise PydanticCustomError("metric", "there is no such metric{mend}; top_K_accuracy goes with any K", {"mend": mend})


Metric = Annotated[str, pydantic.AfterValidator(_checked)]
