"""Warnings where a study file corrects the imbalance of classes twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hpo.spec import space
from hpo.spec.space import Choices
from hpo.spec.study_file import StudySpec

BALANCED = "balanced"
WEIGHTS = ("class_weights", "pos_weight")  # options of losses


def corrected_twice(spec: StudySpec) -> Iterator[str]:
    """Yield a line for each loss with balanced weights beside balanced batches, in all trials or in some."""
    sampling = spec.tree["training"].get("sampling") if spec.is_declared else None
    if BALANCED not in space.ends_of(sampling):
        return
    part = spec.tree.get("loss", {})
    for path, table in [("loss", part), *((f"loss.{name}", branch) for name, branch in space.branches(part).items())]:
        for key in WEIGHTS:
            weights = table.get(key)
            if BALANCED in space.ends_of(weights):
                yield (
                    f"{path}.{key} = {_said(weights)} and training.sampling = {_said(sampling)}: both at once correct the "
                    f"imbalance twice, so rare classes count more than frequent ones; {key} alone makes their losses "
                    "larger, sampling alone draws their rows more often; keep balanced in one of the two"
                )


def _said(value: Any) -> str:
    return str(value) if isinstance(value, Choices) else json.dumps(value)
