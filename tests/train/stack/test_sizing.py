"""How much memory a stack takes is known before it is made, and what does not fit is not tried."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpo.data import Splits
from hpo.models import cnn, mlp
from hpo.train import devices, memory
from hpo.train.build import executor, measurement_cache
from hpo.train.build.executor import Choice
from hpo.train.memory import PeakBytes
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.run import Run
from hpo.train.stack import sizing
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.sizing import Need
from tests.support.stacks import CLASSES, Trial
from tests.train.build.test_executor import CPU, prepared

MODELS = {
    "mlp": lambda: mlp((1, 8, 8), CLASSES, widths=[9], dropout=0.3),
    "cnn": lambda: cnn((1, 8, 8), CLASSES, channels=[4], dropout=0.3),
}
FLOAT = 4


def make(model: str, optimizer: str, seed: int, splits: Splits, _dtype: torch.dtype | None) -> Run:
    kind = partial(OPTIMIZERS[optimizer], weight_decay=0.1)
    options = {"build": MODELS[model], "optimizer": kind, "dtype": torch.float32, "seed": seed}
    return Trial(splits=splits, **options).run()


@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "muon"), ("cnn", "adamw")])
def test_the_memory_of_a_stack_is_predicted_exactly(model: str, optimizer: str, splits: Splits) -> None:
    """A stack of two and one of four say what one of ten takes, to the byte."""
    of = partial(make, model, optimizer)
    forward = StackedForward(of(0, splits, None).model)
    need = sizing.need_of(forward, of, splits)
    assert need.of(10) == sizing._counted(forward, of, splits, 10)
    weights = sum(parameter.numel() for parameter in of(0, splits, None).model.parameters())
    assert need.each > 4 * FLOAT * weights  # values, gradients and two moments lie in rows, and activations beside


def test_activations_count_until_the_backward_pass_has_used_them() -> None:
    """Two layers' inputs are kept for the backward pass. A pass without gradients keeps neither."""
    model = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Sigmoid(), nn.Linear(100, 1, bias=False))
    batch = torch.zeros(50, 10)

    def peak(*, trains: bool) -> int:
        with PeakBytes() as found, torch.set_grad_enabled(trains):
            loss: Tensor = model(batch).sum()
            if trains:
                torch.autograd.grad(loss, list(model.parameters()))
        return found.most

    layer = 50 * 100 * FLOAT
    assert peak(trains=False) == 2 * layer  # the linear layer's output beside the sigmoid's
    assert peak(trains=True) > 2 * layer


@pytest.mark.parametrize(("free", "most"), [(10_000, 8), (2_000, 1), (500, 1), (3_400, 2)])
def test_a_tenth_of_the_free_memory_is_left(free: int, most: int) -> None:
    assert Need(fixed=1_000, each=1_000).most(free) == most


def test_a_stack_that_does_not_fit_is_not_tried(
    tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(sizing, "_stacked_step", lambda _forward, runs: tried.append(len(runs)) or 0.01)
    monkeypatch.setattr(devices, "free_bytes", lambda _device, sharers: 20_000 // sharers)
    of = partial(make, "mlp", "sgd")
    found = sizing.measure(None, lambda seed: of(seed, splits, None), 0.01, need=Need(fixed=0, each=1_000), sharers=2)
    assert tried == [2, 4, 8]  # nine would fit
    assert found.slots == 8


def test_a_remembered_choice_is_limited_by_what_is_free_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was measured on an empty device. Now another process takes most of it."""
    free = [100 * memory.GIBIBYTE, 3 * memory.GIBIBYTE // 2]
    monkeypatch.setattr(devices, "free_bytes", lambda _device, sharers=1: free[0] // sharers)
    monkeypatch.setattr(sizing, "need_of", lambda *arguments: Need(fixed=0, each=memory.GIBIBYTE // 4))
    question = prepared(tmp_path, executor="stack", slots=64)
    first = executor.choose(*question, tmp_path, CPU)
    assert (first.executor, first.slots) == ("stack", 64)
    del free[0]
    limited = executor.choose(*question, tmp_path, CPU)
    assert (limited.executor, limited.slots) == ("stack", 5)
    assert limited.why == (
        "no more than 5 fit into 90% of the device's free memory (16.00 GiB for 64, 1.50 GiB free); "
        "without this limit: the study says slots = 64"
    )
    (kept,) = measurement_cache._read().values()
    assert Choice.from_dict(kept) == first  # the limit of the moment is not remembered
    shared = executor.choose(*question, tmp_path, CPU, sharers=2)
    assert (shared.slots, len(measurement_cache._read())) == (
        2,
        2,
    )  # measured with the memory of a share, and so another answer
    assert "(16.00 GiB for 64, 0.75 GiB free for each of 2 workers)" in shared.why
    assert dataclasses.asdict(first)["need"] == {"fixed": 0, "each": memory.GIBIBYTE // 4}


def test_a_step_on_one_thread_is_measured_by_its_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that takes the core makes no step slower."""
    seconds = {"cpu": count(), "wall": count(step=10)}
    monkeypatch.setattr(time, "thread_time", lambda: next(seconds["cpu"]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds["wall"]))

    def train_epoch(stop: Callable[[], bool]) -> None:
        while not stop():
            pass

    threads = torch.get_num_threads()
    try:
        for used, expected in ((1, 1), (2, 10)):
            torch.set_num_threads(used)
            assert sizing.step_seconds(train_epoch, CPU) == expected
    finally:
        torch.set_num_threads(threads)
