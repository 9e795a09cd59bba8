from __future__ import annotations

import math
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.failures import Kind
from hpo.finished import Cursor, finished
from hpo.ledger import Checkpoint
from hpo.storage import Storage
from hpo.study import Study
from tests.trials import START, begin, make, run, set_times, with_a_list_chosen


@pytest.fixture
def demo(place: Storage, tmp_path: Path) -> Study:
    return make(place, tmp_path)


def test_each_finished_trial_is_told_once(demo: Study) -> None:
    cursor = Cursor()
    run(demo, 0.5, 0.6)
    run(demo, 0.1, kind=Kind.EXCEPTION)
    told = finished(demo, cursor)
    assert [(trial.number, trial.state, trial.value, trial.outcome, trial.epochs) for trial in told] == [
        (0, "complete", 0.6, "complete", 2),
        (1, "fail", None, "exception", 1),
    ]
    assert finished(demo, cursor) == []


def test_a_trial_that_ends_late_is_told_although_later_ones_were(demo: Study) -> None:
    cursor = Cursor()
    _, _, slow = begin(demo)
    run(demo, 0.5)
    run(demo, 0.6)
    assert [trial.number for trial in finished(demo, cursor)] == [1, 2]
    assert finished(demo, cursor) == []
    slow.finish(TrialState.COMPLETE, 0.9)
    run(demo, 0.7)
    set_times(demo, 0, START, START + 1)  # by a clock that is behind all others
    assert [trial.number for trial in finished(demo, cursor)] == [0, 3]
    assert finished(demo, cursor) == []


def test_the_cursor_forgets_single_trials_once_all_before_them_are_finished(demo: Study) -> None:
    cursor = Cursor()
    _, _, slow = begin(demo)
    run(demo, 0.5)
    finished(demo, cursor)
    assert len(cursor.seen) == 1
    slow.finish(TrialState.COMPLETE, 0.9)
    finished(demo, cursor)
    assert cursor.seen == set()


def test_a_finished_trial_shows_its_seconds_and_its_parameters_in_order(demo: Study) -> None:
    _, _, trial = begin(demo)
    x = trial.suggest_float("x", 1e-3, 1.0, log=True)
    kind = trial.suggest_categorical("kind", ["sgd", "adamw"])
    width = trial.suggest_int("width", 8, 64)
    trial.finish(TrialState.COMPLETE, 0.9)
    set_times(demo, 0, START, START + 1.5)
    (told,) = finished(demo, Cursor())
    assert told.seconds == 1.5
    assert list(told.params.items()) == [("x", x), ("kind", kind), ("width", width)]
    assert isinstance(told.params["width"], int)


def test_a_trials_seconds_are_those_in_training_if_its_epochs_were_timed(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    trial.report_epoch(1, 0.5, {"seconds": 1.25})
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="p", digest="d"))
    ledger.park(claim)
    _, _, trial = begin(demo)
    trial.report_epoch(2, 0.6, {"seconds": 0.5})
    trial.finish(TrialState.COMPLETE, 0.6)
    set_times(demo, 0, START, START + 593)
    (told,) = finished(demo, Cursor())
    assert told.seconds == 1.75


def test_a_foreign_trial_is_told_too(demo: Study) -> None:
    demo.optuna.tell(demo.optuna.ask(), math.inf)
    (told,) = finished(demo, Cursor())
    assert (told.value, told.outcome, told.epochs, told.params) == (math.inf, "complete", 0, {})


def test_trials_are_counted_up_one_by_one(demo: Study) -> None:
    cursor = Cursor.at_now(demo)
    run(demo, 0.5)
    assert [trial.count for trial in finished(demo, cursor)] == [1]
    run(demo, 0.5)
    run(demo, 0.5)
    assert [trial.count for trial in finished(demo, cursor)] == [2, 3]


def test_a_cursor_at_now_tells_nothing_of_before_and_counts_on_from_there(demo: Study) -> None:
    _, _, slow = begin(demo)
    run(demo, 0.5)
    run(demo, 0.5)
    cursor = Cursor.at_now(demo)
    assert finished(demo, cursor) == []
    slow.finish(TrialState.COMPLETE, 0.9)
    run(demo, 0.5)
    assert [(trial.number, trial.count) for trial in finished(demo, cursor)] == [(0, 3), (3, 4)]


def test_lists_among_the_choices_are_shown_as_the_study_file_has_them(place: Storage, tmp_path: Path) -> None:
    demo = with_a_list_chosen(place, tmp_path)
    assert finished(demo, Cursor())[0].params["model.widths"] in ([32], [64, 32])
