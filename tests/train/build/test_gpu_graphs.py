"""A step that CUDA captures computes what the step computes. `make gpu` runs this on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train.build import graph_check
from tests.support.declared import DOCUMENT

MODELS: list[dict[str, Any]] = [
    {"name": "mlp", "widths": [64], "dropout": 0.2},
    {"name": "cnn", "channels": [8, 16], "dropout": 0.2},
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("executor", "slots"), [("loop", 1), ("stack", 8)])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_three_replayed_steps_equal_those_without(
    executor: str, slots: int, model: dict[str, Any], tmp_path: Path
) -> None:
    spec = StudySpec.from_document({**DOCUMENT, "model": model})
    config = TrainConfig.from_tree(space.middle(spec.tree, {}))
    request = graph_check.Request(
        config=config.model_dump(mode="json"), folder=str(tmp_path), split_seed=0, device="cuda", executor=executor, slots=slots
    )  # fmt: skip
    assert graph_check.tried(request).why.startswith(f"{graph_check.STEPS} replayed steps equal")
