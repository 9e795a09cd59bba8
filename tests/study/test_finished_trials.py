from __future__ import annotations

import math
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.queue.models import Checkpoint
from hpo.spec.failures import Kind
from hpo.storage.connect import Storage
from hpo.study.status import Past, read
from hpo.study.study import Study
from hpo.study.trial_history import FinishedTrial, finished
from tests.support.trials import START, begin, end_trial, run, set_times, with_a_list_chosen


class Teller:
    """Tells of a study what has finished since it last did, as `hpo run` does."""

    def __init__(self, demo: Study, past: Past | None = None) -> None:
        self.demo = demo
        self.past = past

    def __call__(self) -> list[FinishedTrial]:
        reading = read(self.demo, self.past)
        self.past = reading.past
        return finished(self.demo, reading.ended, total=reading.summary.finished)


def test_each_finished_trial_is_told_once(demo: Study) -> None:
    tell = Teller(demo)
    run(demo, 0.5, 0.6)
    run(demo, 0.1, kind=Kind.EXCEPTION)
    told = tell()
    assert [(trial.number, trial.state, trial.value, trial.outcome, trial.epochs) for trial in told] == [
        (0, "complete", 0.6, "complete", 2),
        (1, "fail", None, "exception", 1),
    ]
    assert tell() == []


@pytest.mark.both
def test_a_trial_that_ends_late_is_told_although_later_ones_were(demo: Study) -> None:
    tell = Teller(demo)
    _, _, slow = begin(demo)
    run(demo, 0.5)
    run(demo, 0.6)
    assert [trial.number for trial in tell()] == [1, 2]
    assert tell() == []
    end_trial(slow, TrialState.COMPLETE, 0.9)
    run(demo, 0.7)
    set_times(demo, 0, START, START + 1)  # by a clock that is behind all others
    assert [trial.number for trial in tell()] == [0, 3]
    assert tell() == []


@pytest.mark.both
def test_a_trial_ended_elsewhere_is_told_once(demo: Study) -> None:
    """A trial that another program ended is told once although our row is closed later."""
    tell = Teller(demo)
    ledger, claim, _ = begin(demo)
    demo.optuna.tell(0, state=TrialState.FAIL)
    assert [(trial.number, trial.outcome) for trial in tell()] == [(0, "fail")]
    assert tell() == []
    ledger.drop(claim, "in other hands")
    assert tell() == []


def test_what_could_not_be_told_is_told_by_the_next_look(demo: Study) -> None:
    """What could not be told is told by the next look that goes on from the same."""
    tell = Teller(demo)
    tell()
    run(demo, 0.5)
    read(demo, tell.past)  # whose lines the storage, gone meanwhile, could not give
    assert [trial.number for trial in tell()] == [0]


def test_a_finished_trial_shows_its_seconds_and_its_parameters_in_order(demo: Study) -> None:
    _, _, trial = begin(demo)
    x = trial.suggest_float("x", 1e-3, 1.0, log=True)
    kind = trial.suggest_categorical("kind", ["sgd", "adamw"])
    width = trial.suggest_int("width", 8, 64)
    end_trial(trial, TrialState.COMPLETE, 0.9)
    set_times(demo, 0, START, START + 1.5)
    (told,) = Teller(demo)()
    assert told.seconds == 1.5
    assert list(told.params.items()) == [("x", x), ("kind", kind), ("width", width)]
    assert isinstance(told.params["width"], int)


def test_a_trials_seconds_are_those_in_training_if_its_epochs_were_timed(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    trial.write(trial.reporting(1, 0.5, {"seconds": 1.25}))
    trial.client.flush()
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="p", digest="d"))
    ledger.park(claim)
    _, _, trial = begin(demo)
    trial.write(trial.reporting(2, 0.6, {"seconds": 0.5}))
    end_trial(trial, TrialState.COMPLETE, 0.6)
    set_times(demo, 0, START, START + 593)
    (told,) = Teller(demo)()
    assert told.seconds == 1.75


def test_a_foreign_trial_is_told_too(demo: Study) -> None:
    demo.optuna.tell(demo.optuna.ask(), math.inf)
    (told,) = Teller(demo)()
    assert (told.value, told.outcome, told.epochs, told.params) == (math.inf, "complete", 0, {})


def test_trials_are_counted_up_one_by_one(demo: Study) -> None:
    tell = Teller(demo)
    run(demo, 0.5)
    assert [trial.count for trial in tell()] == [1]
    run(demo, 0.5)
    run(demo, 0.5)
    assert [trial.count for trial in tell()] == [2, 3]


def test_a_look_goes_on_from_another(demo: Study) -> None:
    """A look that goes on from another tells nothing of before and counts on from there."""
    _, _, slow = begin(demo)
    run(demo, 0.5)
    run(demo, 0.5)
    tell = Teller(demo, read(demo).past)
    assert tell() == []
    end_trial(slow, TrialState.COMPLETE, 0.9)
    run(demo, 0.5)
    assert [(trial.number, trial.count) for trial in tell()] == [(0, 3), (3, 4)]


def test_lists_among_the_choices_are_shown_as_the_study_file_has_them(place: Storage, tmp_path: Path) -> None:
    demo = with_a_list_chosen(place, tmp_path)
    assert Teller(demo)()[0].params["model.widths"] in ([32], [64, 32])
