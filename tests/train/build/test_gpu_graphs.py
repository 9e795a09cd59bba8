"""A step that CUDA captures computes what the step computes. `make gpu` runs this on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import graphs
from hpo.train.build import graph_check
from tests.support.declared import DOCUMENT

MODELS: list[dict[str, Any]] = [
    {"name": "mlp", "widths": [64], "dropout": 0.2},
    {"name": "cnn", "channels": [8, 16], "dropout": 0.2},
]


NEEDED = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "failures", [])


@pytest.mark.gpu
@NEEDED
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
    try_it = (
        graph_check.tried if model == MODELS[0] and slots > 1 else graph_check.examine
    )  # a child takes long to start
    assert try_it(request).why.startswith(f"{graph_check.STEPS} replayed steps equal")


@pytest.mark.gpu
@NEEDED
def test_a_capture_that_fails_leaves_the_stream_and_the_generator_usable() -> None:
    """Of itself torch leaves the capture's stream as the current one, and a generator that refuses to draw."""
    device, before = torch.device("cuda"), torch.cuda.current_stream()
    total = torch.zeros((), device=device)

    def waits() -> None:
        total.add_(torch.rand((), device=device).item())

    with pytest.raises(RuntimeError):
        graphs.CAPTURES["cuda"](device, waits)
    assert torch.cuda.current_stream() == before
    assert 0 <= torch.rand((), device=device).item() < 1
    total.zero_()
    replay = graphs.CAPTURES["cuda"](device, lambda: total.add_(1))
    total.zero_()
    replay()
    replay()
    assert total.item() == 2
