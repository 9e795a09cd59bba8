from __future__ import annotations

import math
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.study.results import best
from hpo.study.study import Study
from tests.support.trials import begin, end_trial, make, record_receipt, run, with_a_list_chosen


@pytest.mark.both
def test_the_best_ones_come_first_and_ties_go_to_the_lower_number(demo: Study) -> None:
    for value in (0.5, 0.9, 0.9, 0.7):
        run(demo, value)
    assert [trial.number for trial in best(demo, 3)] == [1, 2, 3]
    assert [trial.number for trial in best(demo, 99)] == [1, 2, 3, 0]
    assert [trial.number for trial in best(demo, None)] == [1, 2, 3, 0]


def test_a_result_carries_curves_receipt_and_attempt(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    trial.write(trial.reporting(1, 0.5, {"accuracy": 0.5, "loss": math.nan}))
    trial.write(trial.reporting(2, 0.7, {"accuracy": 0.7, "loss": 1.25}))
    record_receipt(ledger, claim, {"seed": 3})
    end_trial(trial, TrialState.COMPLETE, 0.7)
    (result,) = best(demo)
    assert (result.number, result.state, result.value, result.attempt) == (0, "complete", 0.7, 1)
    assert result.curves["accuracy"] == [0.5, 0.7]
    assert math.isnan(result.curves["loss"][0])
    assert result.curves["loss"][1] == 1.25
    assert result.receipt == {"seed": 3}


def test_choices_that_are_lists_come_back_as_such(place: Storage, tmp_path: Path) -> None:
    demo = with_a_list_chosen(place, tmp_path)
    assert best(demo)[0].params["model.widths"] in ([32], [64, 32])


def test_a_foreign_trial_has_a_result_without_a_receipt(demo: Study) -> None:
    foreign = demo.optuna.ask()
    foreign.suggest_float("x", 0, 1)
    demo.optuna.tell(foreign, 0.5)
    (result,) = best(demo)
    assert (result.value, result.curves, result.receipt, result.attempt) == (0.5, {}, {}, 0)


def test_a_pruned_trial_is_given_when_asked_for_by_number(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.9, state=TrialState.PRUNED)
    (result,) = best(demo, number=1)
    assert (result.number, result.state, result.value) == (1, "pruned", 0.9)


def test_a_study_without_a_finished_trial_has_no_best(demo: Study) -> None:
    run(demo, 0.5, state=TrialState.PRUNED)
    ledger, claim, _ = begin(demo)
    begin(demo)
    ledger.park(claim)
    with pytest.raises(StudyError) as raised:
        best(demo)
    assert str(raised.value) == (
        "study 'demo' has no finished trial yet (1 pruned, 1 running, 1 parked); "
        "let `hpo run` finish one, `hpo status demo` shows how far it is"
    )


def test_a_study_that_is_over_without_a_complete_trial_says_so(place: Storage, tmp_path: Path) -> None:
    demo = make(place, tmp_path, budget={"trials": 1})
    run(demo, 0.5, state=TrialState.FAIL)
    with pytest.raises(StudyError) as raised:
        best(demo)
    assert str(raised.value) == (
        "study 'demo' has no result: none of its trials is complete (1 failed), and none is left to train; "
        "`hpo status demo` says why, `hpo run FILE --trials N` adds trials"
    )


@pytest.mark.both
def test_a_number_that_is_no_finished_trial_is_refused(demo: Study) -> None:
    with pytest.raises(StudyError, match="has no trial 3; it has none yet"):
        best(demo, number=3)
    run(demo, 0.5, state=TrialState.FAIL)
    with pytest.raises(StudyError, match="has no trial 3; its trials are 0 to 0"):
        best(demo, number=3)
    with pytest.raises(StudyError, match="trial 0 of study 'demo' is failed and has no result"):
        best(demo, number=0)
    begin(demo)
    with pytest.raises(StudyError, match="trial 1 of study 'demo' is unfinished and has no result"):
        best(demo, number=1)


@pytest.mark.both
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_infinite_values_of_foreign_trials_are_ranked_too(place: Storage, tmp_path: Path, direction: str) -> None:
    demo = make(place, tmp_path, direction=direction)
    for value in (0.5, -math.inf, math.inf):
        demo.optuna.tell(demo.optuna.ask(), value)
    order = [math.inf, 0.5, -math.inf]
    assert [result.value for result in best(demo, 3)] == (order if direction == "maximize" else order[::-1])


@pytest.mark.both
def test_more_trials_than_fit_into_one_statement_are_read_in_pieces(
    demo: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0.1, 0.2, 0.3):
        _, _, trial = begin(demo)
        trial.suggest_float("x", value, value)
        trial.write(trial.reporting(1, value, {"accuracy": value}))
        end_trial(trial, TrialState.COMPLETE, value)
    monkeypatch.setattr(sql, "CHUNK", 2)
    assert [result.params for result in best(demo, 3)] == [{"x": 0.3}, {"x": 0.2}, {"x": 0.1}]
    assert [result.curves for result in best(demo, 3)] == [{"accuracy": [value]} for value in (0.3, 0.2, 0.1)]
