"""A pinned tree becomes one checked config."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from hpo.errors import SpecError
from hpo.spec.training import Part, TrainConfig, Training, training_defaults, with_sections

TREE: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8]},
    "optimizer": {"name": "sgd", "lr": 0.1, "sgd": {"momentum": 0.9}},
    "schedule": {"name": "constant"},
    "training": {"epochs": 3},
}


def test_a_branch_and_its_part_are_one_set_of_options() -> None:
    """A branch and its part become one set of options that remember where they stood."""
    config = TrainConfig.from_tree(TREE)
    assert config.optimizer == Part(
        name="sgd",
        options={"lr": 0.1, "momentum": 0.9},
        paths={"lr": "optimizer.lr", "momentum": "optimizer.sgd.momentum"},
    )
    assert config.training == Training(epochs=3, batch_size=32, precision="float32", threads=1)
    assert config.training.schedule_epochs is None


def test_a_config_and_its_training_are_frozen() -> None:
    config = TrainConfig.from_tree(TREE)
    for change in (lambda: setattr(config, "model", None), lambda: setattr(config.training, "epochs", 4)):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            change()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"widths": [8]}, 'model.name: missing; write name = "..."'),
        ("model", {"name": ["mlp"]}, "model.name: ['mlp'] is not the name of a model; write name = \"...\""),
        (
            "optimizer",
            {"name": "sgd", "lr": 1, "sgd": {"lr": 2}},
            "optimizer.sgd.lr: optimizer.lr is given too; keep one of the two",
        ),
        ("training", {"epochs": 0}, "training.epochs = 0: input should be greater than or equal to 1"),
        ("training", {"epochs": True}, "training.epochs = true: input should be a valid integer"),
        (
            "training",
            {"batchsize": 3},
            "training.batchsize: training takes no 'batchsize' (did you mean 'batch_size'?)",
        ),
        ("training", {"threads": 0}, "training.threads = 0: input should be greater than or equal to 1"),
        (
            "training",
            {"schedule_epochs": 0},
            "training.schedule_epochs = 0: input should be greater than or equal to 1",
        ),
    ],
)
def test_a_wrong_section_is_refused(section: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        TrainConfig.from_tree(TREE | {section: change})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("optimizer", "cycle", "owner"),
    [
        ({"name": "sgd", "momentum": 0.0}, True, "optimizer.momentum = 0.0"),
        ({"name": "sgd", "sgd": {"momentum": 0.9}}, True, "optimizer.sgd.momentum = 0.9"),
        ({"name": "adam", "beta1": 0.9}, True, "optimizer.beta1 = 0.9"),
        ({"name": "adam", "beta2": 0.9}, True, None),
        ({"name": "sgd", "momentum": 0.9}, False, None),
        ({"name": "sgd"}, True, None),
    ],
)
def test_momentum_has_one_owner(optimizer: dict[str, Any], cycle: bool, owner: str | None) -> None:
    tree = TREE | {"optimizer": optimizer, "schedule": {"name": "onecycle", "onecycle": {"cycle_momentum": cycle}}}
    if owner is None:
        assert TrainConfig.from_tree(tree).schedule.options == {"cycle_momentum": cycle}
        return
    with pytest.raises(SpecError) as caught:
        TrainConfig.from_tree(tree)
    assert str(caught.value) == (
        f"{owner}: would be overwritten by schedule.onecycle.cycle_momentum = true; remove one of the two"
    )


def test_schedule_and_training_may_be_left_out() -> None:
    three = {key: TREE[key] for key in ("data", "model", "optimizer")}
    assert with_sections(three | {"seed": 3}) == three | {"schedule": {"name": "constant"}, "training": {}}
    assert with_sections(TREE) == TREE
    assert training_defaults() == {"epochs": 20, "batch_size": 32, "precision": "float32", "threads": 1}
