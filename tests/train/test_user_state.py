"""The state of a user's own loop: which objects have one, and which report has the best weights."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpo.errors import MismatchError
from hpo.spec.curve import Direction
from hpo.train.user_state import UserState, can_be_saved


class Odd:
    """An object that refuses to be asked, as an optimizer does whose parts are on other machines."""

    def state_dict(self) -> None:
        raise RuntimeError("gather the parts first")

    def load_state_dict(self, state: None) -> None:
        raise NotImplementedError


def test_an_object_that_refuses_to_be_asked_has_no_state_to_warn_of() -> None:
    assert can_be_saved(nn.Linear(2, 1))
    assert not can_be_saved(Odd())


def best_step(state: UserState, curve: list[float]) -> Any:
    for step, value in enumerate(curve):
        state.note_report(value, step)
    return state.best and state.best["step"]


@pytest.mark.parametrize(
    ("direction", "curve", "step"),
    [
        ("maximize", [1.0, 2.0, 2.0, 0.0], 1),
        ("minimize", [1.0, 2.0, 0.0, 0.0], 2),
        ("maximize", [math.nan, math.inf, -1.0, math.nan], 2),
        ("maximize", [math.nan], None),
        (None, [1.0], None),
    ],
)
def test_the_best_report_is_the_first_of_the_best_finite_values(
    direction: Direction | None, curve: list[float], step: int | None
) -> None:
    assert best_step(UserState({"model": nn.Linear(2, 1)}, direction), curve) == step


def test_without_a_module_there_are_no_weights_to_keep() -> None:
    state = UserState({"state": {"weight": 1.0}}, "maximize")
    assert best_step(state, [1.0]) is None
    assert "best" not in state.state_dict()


def test_the_weights_are_a_copy_in_which_tied_ones_stay_one() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    state = UserState({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, "maximize")
    state.note_report(1.0, 0)
    nn.init.zeros_(model[0].weight)
    assert state.best is not None
    assert state.best["objects"].keys() == {"model"}
    one, other = state.best["objects"]["model"].values()
    assert torch.equal(one, torch.ones(2, 2))
    assert one is other


def test_a_checkpoint_of_an_earlier_version_has_no_best_weights_and_gets_none() -> None:
    """A better report may lie before it, whose weights are lost."""
    state = UserState({"model": nn.Linear(2, 1)}, "maximize")
    earlier = {key: state.state_dict()[key] for key in ("epoch", "random", "objects")}
    state.load_state_dict(earlier)
    assert best_step(state, [1.0]) is None
    assert "best" not in state.state_dict()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            {},
            "the checkpoint holds model, optimizer, but the loop has model; give hpo.epochs the same objects as before",
        ),
        ({"optimizer": None, "other": nn.Linear(2, 1)}, "holds model, optimizer, but the loop has model, other;"),
        (
            {"model": nn.Linear(2, 1, bias=False)},
            'does not fit model: .* Unexpected key.* "bias".*; undo the change of model$',
        ),
        ({"optimizer": torch.optim.Adam([nn.Parameter(torch.zeros(1))])}, "does not fit optimizer: .*parameter group"),
    ],
)
def test_what_a_checkpoint_does_not_fit_is_named(now: dict[str, Any], said: str) -> None:
    model = nn.Linear(2, 1)
    saved = UserState({"model": model, "optimizer": torch.optim.Adam(model.parameters())}).state_dict()
    given = {"model": model, **({"optimizer": torch.optim.Adam(model.parameters())} if "model" in now else {}), **now}
    with pytest.raises(MismatchError, match=said):
        UserState(given).load_state_dict(saved)


def test_asking_for_a_state_draws_no_random_number() -> None:
    class Drawing:
        def state_dict(self) -> dict[str, Any]:
            return {"number": [torch.rand(()).item(), random.random(), float(np.random.rand())]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    state = UserState({"drawing": Drawing()})
    assert state.state_dict()["objects"] == state.state_dict()["objects"]
