"""What is legal in a study file and still likely a mistake."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.spec.study_file import StudySpec
from hpo.strategy import pruners, samplers
from hpo.strategy.lint import lint

LOG = {"low": 1e-4, "high": 1e-1, "log": True}
TRAINING = {"epochs": 9}


def found(**changes: Any) -> list[str]:
    document: dict[str, Any] = {
        "name": "s",
        "data": {"name": "d"},
        "model": {"name": "m"},
        "optimizer": {"name": "o", "lr": LOG},
        "schedule": {"name": "c"},
        "training": TRAINING,
    }
    spec = StudySpec.from_document(document | changes)
    return lint(pruners.resolve(samplers.resolve(spec)))


def test_a_sound_file_has_no_warning() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("lr", "warned"),
    [
        ({"low": 1e-4, "high": 1e-1}, True),
        ({"low": 0.0, "high": 1e-1}, True),
        ({"low": 0.01, "high": 0.1}, False),
        ({"low": 0.01, "high": 0.1001}, True),
        ({"low": 0.1, "high": 2.1, "step": 0.5}, False),
        ({"choices": [1e-4, 1e-1]}, False),
        (LOG, False),
        (0.1, False),
    ],
)
def test_a_learning_rate_over_more_than_a_decade_belongs_on_a_log_scale(lr: Any, warned: bool) -> None:
    lines = found(optimizer={"name": {"choices": ["o", "p"]}, "o": {"lr": lr}, "p": {"lr": 0.1}})
    assert [line.split(" = ")[0] for line in lines] == (["optimizer.o.lr"] if warned else [])
    assert all(line.endswith("searched on a linear scale; add log = true") for line in lines)


@pytest.mark.parametrize(
    ("training", "warned"),
    [
        ({"epochs": 9, "schedule_epochs": 9}, False),
        ({"epochs": 9, "schedule_epochs": 10}, True),
        ({"epochs": {"low": 5, "high": 20}, "schedule_epochs": 10}, True),
        ({"epochs": {"low": 10, "high": 20}, "schedule_epochs": 10}, False),
        ({"epochs": 9, "schedule_epochs": {"choices": [3, 12]}}, True),
    ],
)
def test_a_schedule_longer_than_the_shortest_training_never_ends(training: Any, warned: bool) -> None:
    lines = found(training=training)
    assert [line.split(" = ")[0] for line in lines] == (["training.schedule_epochs"] if warned else [])


@pytest.mark.parametrize(
    ("schedule", "warned"),
    [
        ({"name": "plateau", "patience": 6}, False),  # of nine epochs the last has a lower rate
        ({"name": "plateau", "patience": 7}, True),
        ({"name": {"choices": ["plateau", "c"]}, "plateau": {"patience": {"low": 7, "high": 9}}}, True),
        ({"name": {"choices": ["plateau", "c"]}, "plateau": {"patience": {"low": 6, "high": 9}}}, False),
        ({"name": "c", "patience": 7}, False),
    ],
)
def test_a_patience_that_outlasts_the_training_never_lowers_the_rate(schedule: Any, warned: bool) -> None:
    lines = found(schedule=schedule)
    assert [line.split(" = ")[0] for line in lines] == (["schedule plateau: patience"] if warned else [])


@pytest.mark.parametrize(
    ("pruner", "warned"),
    [
        ({"name": "none"}, False),
        ({"name": "median"}, False),
        ({"name": "median", "n_warmup_steps": 7}, False),
        ({"name": "median", "n_warmup_steps": 8}, True),  # only the ninth and last epoch is left
        ({"name": "median", "n_startup_trials": 64}, True),
        ({"name": "percentile", "n_warmup_steps": 20}, True),
        ({"name": "successive_halving"}, False),
        ({"name": "successive_halving", "min_resource": 9}, True),
        ({"name": "hyperband"}, False),
        ({"name": "hyperband", "min_resource": 9}, True),
        ({"name": "threshold", "lower": 0.2}, False),
        ({"name": "patient", "patience": 3}, False),
        ({"name": "patient", "patience": 8}, True),
        ({"name": "patient", "patience": 3, "wrapped": "median"}, False),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_pruner_that_can_never_prune_is_told(pruner: Any, warned: bool, metric: str) -> None:
    pruner = {"upper" if key == "lower" and metric == "loss" else key: value for key, value in pruner.items()}
    lines = found(pruner=pruner, metric=metric)
    assert [line.split()[0] in ("pruner", "pruner.n_startup_trials") for line in lines] == [True] * warned


def test_the_whole_warning_about_a_pruner_says_what_to_do() -> None:
    assert found(pruner={"name": "median", "n_warmup_steps": 8}) == [
        "pruner median: cannot prune any trial in the first 8 of 9 epochs; lower its warm-up or rungs"
    ]
    assert found(pruner={"name": "median", "n_startup_trials": 5}, budget={"trials": 5}) == [
        "pruner.n_startup_trials = 5: never prunes, since the budget is 5 trials; lower it"
    ]


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        ({"activation": "selu", "norm": "batch"}, "batch"),
        (
            {"activation": {"choices": ["relu", "selu"]}, "norm": {"choices": ["none", "batch", "group"]}},
            "batch or group",
        ),
        ({"activation": "selu", "norm": "none"}, ""),
        ({"activation": "relu", "norm": "batch"}, ""),
        ({}, ""),
    ],
)
def test_selu_under_a_norm_is_allowed_and_told(model: Any, norms: str) -> None:
    lines = found(model={"name": "m", **model})
    expected = f"model.activation = selu: normalises by itself, and norm = {norms} undoes this; "
    assert [line.removesuffix('use norm = "none" and init = "lecun_normal"') for line in lines] == (
        [expected] if norms else []
    )
    branch = found(model={"name": {"choices": ["m", "n"]}, "m": model})
    assert [line.split(" = ")[0] for line in branch] == (["model.m.activation"] if norms else [])


def test_a_momentum_that_some_trials_leave_to_chance_is_told() -> None:
    schedule = {"name": "onecycle", "cycle_momentum": {"choices": [True, False]}}
    assert found(schedule=schedule) == [
        "schedule.cycle_momentum = { choices = [true, false] }: in some trials the schedule sets the momentum, "
        "in others the optimizer's default holds; write true or false"
    ]
    assert found(schedule=schedule | {"cycle_momentum": True}) == []


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        ({"name": "mlp", "keep": 1}, ["model.keep = 1: has no effect without weights = ...; add it or remove keep"]),
        ({"name": "mlp", "keep": 1, "weights": {"choices": ["none", "a.pt"]}}, []),
        ({"name": "mlp", "unfreeze_every": 2, "freeze": 0}, ["model.unfreeze_every = 2: has no effect without freeze"]),
        ({"name": "mlp", "unfreeze_every": 2, "freeze": {"choices": ["none", 1]}}, []),
        (
            {"name": "cnn", "groups": 4, "norm": {"choices": ["batch", "layer"]}},
            ['model.groups = 4: has no effect without norm = "group"'],
        ),
        (
            {
                "name": {"choices": ["mlp", "resnet18"]},
                "mlp": {"stochastic_depth": 0.1},
                "resnet18": {"stochastic_depth": 0.1},
            },
            ["model.mlp.stochastic_depth = 0.1: has no effect without residual = true"],
        ),
        ({"name": "cnn", "stochastic_depth": 0.1, "residual": True}, []),
        ({"name": "mine:model", "beta": 0.1}, []),
    ],
)
def test_an_option_of_the_model_that_no_other_one_asks_for_is_told(model: dict[str, Any], warned: list[str]) -> None:
    told = found(model=model)
    assert len(told) == len(warned)
    assert all(line.startswith(start) for line, start in zip(told, warned, strict=True))


@pytest.mark.parametrize(
    ("augment", "warned"),
    [
        ({"fill": "edge"}, ['augment.fill = "edge": has no effect without crop, ']),
        ({"fill": "edge", "crop": 0, "rotation": {"low": 0.0, "high": 5.0}}, []),
        ({"erasing_area": 0.2, "erasing": {"choices": [0.0, 0.5]}}, []),
        (
            {"erasing_area": 0.2, "erasing": 0.0},
            ["augment.erasing_area = 0.2: has no effect without erasing; remove it"],
        ),
        ({"mix_probability": 0.5, "mixup": 0.1}, []),
        ({"mix_probability": 0.5}, ["augment.mix_probability = 0.5: has no effect without mixup, cutmix; remove it"]),
    ],
)
def test_an_augmentation_that_has_nothing_to_act_on_is_told(augment: Any, warned: list[str]) -> None:
    lines = found(augment=augment)
    assert len(lines) == len(warned)
    assert all(line.startswith(start) for line, start in zip(lines, warned, strict=True))
