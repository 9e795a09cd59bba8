"""What a model costs: counted by hand where it can be, and measured in the same way twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.spec.training import TrainConfig
from hpo.train import loop
from hpo.train.build import assemble, costs, measurement_cache
from hpo.train.run import Run

CPU = torch.device("cpu")
FLOAT = 4


def run_of(**model: Any) -> Run:
    tree = {
        "data": {"name": "digits"},
        "model": {"name": "mlp", "norm": "none", **model},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
        "training": {"epochs": 1, "batch_size": 512},
    }
    config = TrainConfig.from_tree(tree)
    return assemble.build_run(config, assemble.load_splits(config, 0, Path(), CPU), 1, Path(), CPU)


def measure(run: Run, *names: str) -> dict[str, float]:
    return costs.measure(names, run, threads=1, device="cpu", code="")


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ({"widths": [8]}, 64 * 8 + 8 + 8 * 10 + 10),
        ({"widths": [8, 4]}, 64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10),
        ({"widths": [8], "norm": "batch"}, 64 * 8 + 8 + 8 + 8 * 10 + 10),  # no bias before a norm
    ],
)
def test_parameters_are_counted_and_buffers_not(model: dict[str, Any], parameters: int) -> None:
    assert measure(run_of(**model), "params") == {"params": parameters}


def peak(model: nn.Module, image: torch.Tensor) -> float:
    with torch.no_grad():
        return costs.memory_mb(model, lambda: model(image)) * costs.MEGABYTE


def test_what_memory_is() -> None:
    """Memory is that of the weights and of the most that lives at once."""
    image = torch.zeros(1, 10)
    wide = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 50), nn.Linear(50, 1000, bias=False))
    weights = 10 * 100 + 100 + 100 * 50 + 50 + 50 * 1000
    # Each layer's result lives until the next one has taken it: 100 beside 50, then 50 beside 1000.
    assert peak(wide, image) == FLOAT * (weights + 50 + 1000)

    class Residual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = x + 1.0
            other = torch.cat([kept] * 7, dim=1)
            return other.sum() + kept

    assert peak(Residual(), image) == FLOAT * (10 + 70 + 1 + 10)  # kept, other, its sum, and what is returned
    assert peak(nn.ReLU(inplace=True), image) == 0.0  # an image that is given counts for nobody


def test_a_view_of_a_weight_takes_nothing() -> None:
    linear = nn.Linear(10, 10, bias=False)
    assert peak(linear, torch.zeros(1, 10)) == FLOAT * (100 + 10)


def test_what_is_timed_is_timed_once_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    real = costs.MEASURES["latency_ms"]

    def latency(model: nn.Module, forward: Callable[[], object]) -> float:
        timed.append(model)
        return real(model, forward)

    monkeypatch.setitem(costs.MEASURES, "latency_ms", latency)
    first = measure(run_of(widths=[8]), "latency_ms")
    assert 0 < first["latency_ms"] < 1000
    assert measure(run_of(widths=[8]), "latency_ms") == first
    assert len(timed) == 1  # from the file, as any other process on this machine has it
    measure(run_of(widths=[9]), "latency_ms")
    assert len(timed) == 2
    assert measurement_cache.home().exists()


def test_measuring_leaves_a_run_as_it_was() -> None:
    run, other = run_of(widths=[8], norm="batch", dropout=0.2), run_of(widths=[8], norm="batch", dropout=0.2)
    threads = torch.get_num_threads()
    measure(run, "params", "latency_ms", "memory_mb")
    assert torch.get_num_threads() == threads
    assert run.model.training
    assert next(iter(loop.train(run))).validation_loss == next(iter(loop.train(other))).validation_loss
