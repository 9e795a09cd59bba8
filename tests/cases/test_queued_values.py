"""A trial that was queued with a value that its parameter cannot have says which it can have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.spec import space
from hpo.spec.space import Choices, Range
from hpo.storage.connect import Storage
from hpo.study.study import Study
from tests.support.trials import begin, make, suggested

WIDTHS = Choices(options=([32], [64, 32], "auto"))


@pytest.fixture
def study(place: Storage, tmp_path: Path) -> Study:
    model = {"name": "mlp", "widths": {"choices": [[32], [64, 32]]}, "dropout": {"low": 0.0, "high": 0.5}}
    optimizer = {"name": "sgd", "lr": 0.1}
    return make(
        place, tmp_path, objective=None, direction=None, data={"name": "digits"}, model=model, optimizer=optimizer
    )


@pytest.mark.parametrize("value", [[64, 32], "[64,32]", "[64, 32]"])
def test_a_list_may_be_queued_as_the_study_file_writes_it(value: Any, study: Study) -> None:
    study.optuna.enqueue_trial({"model.widths": value, "model.dropout": 0.25})
    _, _, trial = begin(study)
    trial.read_queued(study.spec.tree)
    pinned = suggested(trial, lambda one: space.suggest(study.spec.tree, one))
    assert (pinned["model"]["widths"], pinned["model"]["dropout"]) == ([64, 32], 0.25)
    assert study.optuna.get_trials(states=[TrialState.RUNNING])[0].params == {
        "model.widths": "[64,32]",
        "model.dropout": 0.25,
    }


def test_another_value_is_refused_with_the_legal_ones(study: Study) -> None:
    study.optuna.enqueue_trial({"model.widths": [16]})
    _, _, trial = begin(study)
    with pytest.raises(ValueError) as refused:
        trial.read_queued(study.spec.tree)
    assert str(refused.value) == (
        "model.widths = [16]: this enqueued value is not allowed; enqueue a value of { choices = [[32], [64, 32]] }"
    )


def test_a_parameter_that_is_not_searched_is_told(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    study.optuna.enqueue_trial({"model.width": [32]})
    _, _, trial = begin(study)
    with caplog.at_level(logging.WARNING):
        trial.read_queued(study.spec.tree)
    assert caplog.messages == [
        "trial 0: was queued with model.width, which the study does not search (did you mean 'model.widths'?)"
    ]


@pytest.mark.parametrize("value", [16, [16], None, {"a": 1}, "16", "[" * 5000, True, [[32]], "[32"])
def test_whatever_was_queued_the_message_is_one(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^p = .*: this enqueued value is not allowed; enqueue a value of \{ choices = "
    ):
        space.queued(WIDTHS, "p", value)
    if value != 16:
        with pytest.raises(
            ValueError, match=r"this enqueued value is not allowed; enqueue a value of \{ low = 1, high = 20 \}$"
        ):
            space.queued(Range(low=1, high=20), "p", value)
