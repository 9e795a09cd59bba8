"""Warm-ups before schedules: torch's values, the length that a file says, own ones, and what cannot be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from hpo import data
from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train.build import assemble, registry
from hpo.train.optim import schedules, warmup
from hpo.train.optim.warmup import Lengths
from tests.train.optim.test_schedules import LR, RELATIVE, optimizer, torchs_rates

LENGTH, WARMING = 60, 12
AFTER: dict[str, tuple[Any, Any]] = {  # ours, torch's, both over what is left
    "constant": (schedules.constant, partial(lr_scheduler.ConstantLR, factor=1.0, total_iters=0)),
    "cosine": (schedules.cosine, partial(lr_scheduler.CosineAnnealingLR, T_max=LENGTH - WARMING)),
    "polynomial": (schedules.polynomial, partial(lr_scheduler.PolynomialLR, total_iters=LENGTH - WARMING)),
    "warm restarts": (
        partial(schedules.warm_restarts, cycles=2, t_mult=2),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=16, T_mult=2),
    ),
    "exponential": (
        partial(schedules.exponential, final_factor=0.5 ** (LENGTH - WARMING)),
        partial(lr_scheduler.ExponentialLR, gamma=0.5),
    ),
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch's own, from within SequentialLR
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_linear_warm_up_before_a_schedule_is_torchs_sequence(name: str) -> None:
    ours, theirs = AFTER[name]
    given = optimizer()
    first = lr_scheduler.LinearLR(given, start_factor=0.1, total_iters=WARMING)
    sequence = lr_scheduler.SequentialLR(given, [first, theirs(given)], milestones=[WARMING])
    expected = [rate.factor for rate in torchs_rates(given, sequence, LENGTH)]
    both = warmup.before(ours(LENGTH - WARMING), WARMING, warmup.linear(WARMING, start_factor=0.1))
    assert [both(step).factor for step in range(LENGTH)] == pytest.approx(expected, rel=RELATIVE, abs=1e-15)


def test_it_rises_to_where_the_schedule_begins_and_leaves_momentum_to_it() -> None:
    after = schedules.onecycle(50, div_factor=4, cycle_momentum=True)
    both = warmup.before(after, 10, warmup.linear(10, start_factor=0.5))
    assert both(0) == (pytest.approx(0.125), 0.95)
    assert [both(10 + step) for step in range(60)] == [after(step) for step in range(60)]


def test_a_schedule_by_the_curve_stays_one() -> None:
    both = warmup.before(schedules.plateau(50, patience=0), 10, warmup.linear(10, start_factor=0.5))
    stuck = schedules.after(both, [1.0, 1.0])
    assert [both(0).factor, both(5).factor, both(10).factor] == pytest.approx([0.5, 0.75, 1.0])
    assert [stuck(0).factor, stuck(10).factor] == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        ({}, 5),
        ({"share": 0.25}, 25),
        ({"share": 0.0}, 0),
        ({"epochs": 2}, 20),
        ({"epochs": 0.5}, 5),
        ({"epochs": 0}, 0),
    ],
)
def test_its_length_is_a_share_or_epochs(said: dict[str, float], steps: int) -> None:
    assert warmup.steps(Lengths(schedule=100, epoch=10), **said) == steps


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"epochs": 10}, "100 warm-up steps leave nothing of a schedule of 100 steps"),
        ({"epochs": 2, "share": 0.1}, "share = 0.1 and epochs = 2; keep one of the two"),
    ],
)
def test_a_length_that_cannot_be_is_refused(said: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup.steps(Lengths(schedule=100, epoch=10), **said)


DOCUMENT: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [4]},
    "optimizer": {"name": "sgd", "lr": LR},
    "schedule": {"name": "cosine"},
    "training": {"epochs": 4, "batch_size": 100},
}


def rates(folder: Path, **section: Any) -> list[float]:
    """Return a run's learning rates by step, of a file with this section of warm-up."""
    changes = {"warmup": section} if section else {}
    config = TrainConfig.from_tree(registry.resolve(StudySpec.from_document(DOCUMENT | changes), folder).tree)
    splits = data.load(data.SOURCES["digits"](), split_seed=0, device="cpu")
    run = assemble.build_run(config, splits, 0, folder, torch.device("cpu"))
    run.enter_epoch()
    found = []
    for batch in range(config.training.epochs * run.steps_per_epoch):
        run.set_rate(batch)
        found.append(float(run.optimizer.param_groups[0]["lr"]))
    return found


def test_a_file_s_warm_up_is_ours_or_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def square(length, *, low: float = 0.5):\n    return lambda step: max(low, (step / length) ** 2)\n"
    )
    plain, linear, none, own = (
        rates(tmp_path, **section)
        for section in (
            {},
            {"name": "linear", "epochs": 1, "start_factor": 0.5},
            {"name": "linear", "share": 0.0},
            {"name": "mine.py:square", "share": 0.25, "low": 0.125},
        )
    )
    steps = len(plain) // 4
    assert none == plain
    assert linear[:steps] == pytest.approx([LR * (0.5 + 0.5 * step / steps) for step in range(steps)])
    assert linear[steps:] == pytest.approx([LR * schedules.cosine(3 * steps)(step).factor for step in range(3 * steps)])
    assert own[: steps + 1] == pytest.approx([LR * max(0.125, (step / steps) ** 2) for step in range(steps + 1)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "linaer"}, "warmup.name: there is no warmup 'linaer' (did you mean 'linear'?)"),
        ({"name": "linear", "share": 1.0}, "warmup.share = 1.0: input should be less than 1"),
        (
            {"name": "linear", "epochs": {"low": 0, "high": 4}},
            "warmup.epochs = { low = 0, high = 4 }: may be as long as the whole schedule, training.epochs = 4; "
            "shorten it or write warmup.share",
        ),
    ],
)
def test_what_cannot_be_is_told_when_the_file_is_read(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        registry.resolve(StudySpec.from_document(DOCUMENT | {"warmup": section}), tmp_path)
    assert message in str(caught.value)


def test_a_file_without_a_warm_up_says_nothing_of_one(tmp_path: Path) -> None:
    spec = registry.resolve(StudySpec.from_document(DOCUMENT), tmp_path)
    assert not {"warmup", "sam"} & spec.identity.keys()
