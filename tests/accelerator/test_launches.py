"""Launches, waits and copies of training on a device, counted on the twin device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from hpo.data import Strength
from hpo.train.monitors import Watch
from hpo.train.optim.penalties import Penalties
from tests.support import launches, twin
from tests.support.launches import Epoch, of_plain_torch, of_stack

MOST_BESIDE_THE_LOOP = 1.5  # launches of a stack, as a multiple of the loop's
MOST_FOR_A_KIND = 25  # launches a step for each further kind of optimizer
KINDS = ("adamw", "sgd", "nadam", "rmsprop", "radam")
COPIES = 2  # an epoch's batches, and its rates
#: The tasks of the benchmark with fewer and smaller steps.
TASKS = {
    **{name: replace(launches.TASKS[name], batch=8, steps=7) for name in ("mlp", "cnn")},
    "resnet18": replace(launches.TASKS["resnet18"], shape=(3, 8, 8), batch=20, steps=3),
}


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    with twin.plugged_in():
        yield


@cache
def of_loop(name: str) -> Epoch:
    return launches.of_loop(TASKS[name])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_loop_launches_no_more_than_plain_torch(name: str) -> None:
    plain, loop = of_plain_torch(TASKS[name]), of_loop(name)
    assert loop.launches <= plain.launches
    assert (loop.waits, loop.copies, loop.blocking) == (1, COPIES - 1, 0)


def test_a_step_of_the_loop_launches_no_more_than_plain_torch_s() -> None:
    task = TASKS["resnet18"]
    assert launches.step_of_loop(task) <= launches.step_of_plain_torch(task)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_stack_launches_the_same_for_any_number_of_trials(name: str) -> None:
    loop = of_loop(name)
    one, few, many = (of_stack(TASKS[name], trials) for trials in (1, 4, 64))
    assert one == few == many
    assert many.launches <= MOST_BESIDE_THE_LOOP * loop.launches
    assert (many.waits, many.copies, many.blocking) == (1, COPIES, 0)


def test_a_step_of_resnets_in_a_stack_launches_at_most_half_as_much_again_as_the_loop_s() -> None:
    task = TASKS["resnet18"]
    assert launches.step_of_stack(task, 2) <= MOST_BESIDE_THE_LOOP * launches.step_of_loop(task)


def test_further_kinds_of_optimizers_cost_few_launches() -> None:
    task, before = TASKS["mlp"], of_stack(TASKS["mlp"], 10)
    for number in range(2, len(KINDS) + 1):
        mixed = of_stack(task, 10, KINDS[:number])
        assert mixed.launches_a_step <= before.launches_a_step + MOST_FOR_A_KIND
        before = mixed
    assert of_stack(task, 30, KINDS) == before


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        (
            {
                "augment": Strength(crop=1, rotation=10, brightness=0.1, erasing=0.2, mixup=0.2),
                "watch": Watch(metrics=("macro_f1", "auroc"), norms=True, noise=True),
            },
            COPIES + 1,
        ),
        ({"clip_norm": 1.0, "clip_value": 0.5, "penalised": Penalties(l1=0.001, l2=0.01, max_norm=3.0)}, COPIES),
    ],
    ids=["augmented and watched", "clipped and penalised"],
)
def test_what_else_a_trial_asks_for_neither_waits_nor_grows(options: dict[str, Any], copies: int) -> None:
    few, many = (of_stack(TASKS["mlp"], trials, **options) for trials in (2, 6))
    assert few == many
    assert (many.waits, many.copies, many.blocking) == (1, copies, 0)
    assert launches.of_loop(TASKS["mlp"], **options).waits == 1
    assert many.steps == TASKS["mlp"].steps
