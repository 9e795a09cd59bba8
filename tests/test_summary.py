from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import storage
from hpo.errors import StudyError
from hpo.failures import Failure, Kind
from hpo.ledger import Checkpoint
from hpo.storage import Storage
from hpo.study import Study
from hpo.summary import Best, FailureCount, ParkedTrial, statuses, summarize
from hpo.tables import hpo_studies, hpo_trials
from tests.trials import START, begin, make, run, set_times


@pytest.fixture
def demo(place: Storage, tmp_path: Path) -> Study:
    return make(place, tmp_path)


def expire(demo: Study, number: int) -> None:
    trial_id = demo.optuna.get_trials(deepcopy=False)[number]._trial_id
    with storage.writing(demo.storage.engine) as connection:
        connection.execute(hpo_trials.update().where(hpo_trials.c.trial_id == trial_id).values(lease_until=1.0))


def test_a_new_study_has_nothing_to_show(demo: Study) -> None:
    summary = summarize(demo)
    assert (summary.name, summary.direction, summary.sampler, summary.pruner) == ("demo", "maximize", "tpe", "median")
    assert set(summary.counts.values()) == {0}
    assert (summary.budget, summary.spent, summary.finished) == (10, 0, 0)
    assert (summary.best, summary.running, summary.parked, summary.failures) == (None, [], [], [])
    assert (summary.seconds, summary.seconds_left, summary.stop_reason) == (0.0, None, None)


def test_every_trial_is_counted_in_exactly_one_state(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.4, state=TrialState.PRUNED)
    run(demo, 0.3, kind=Kind.EXCEPTION, reason="ValueError: no")
    ledger, parked, trial = begin(demo)
    trial.report(0.1, 1)
    begin(demo, "alive")  # before the other is parked, else this would take it over
    ledger.park(parked)
    demo.optuna.ask()
    demo.optuna.enqueue_trial({"x": 1})
    counts = summarize(demo).counts
    assert counts == {
        "complete": 1, "pruned": 1, "fail": 1, "running": 1, "parked": 1, "foreign": 1, "waiting": 1,
    }  # fmt: skip
    assert summarize(demo).spent == 6


def test_a_trial_whose_lease_ran_out_is_parked(demo: Study) -> None:
    begin(demo)
    assert summarize(demo).counts["running"] == 1
    expire(demo, 0)
    summary = summarize(demo)
    assert (summary.counts["running"], summary.counts["parked"]) == (0, 1)
    assert summary.parked == [ParkedTrial(number=0, epoch=0)]


def test_a_parked_trial_goes_on_from_its_checkpoint(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    for step in (1, 2, 3):
        trial.report(0.1, step)
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="p", digest="d"))
    ledger.park(claim)
    assert summarize(demo).parked == [ParkedTrial(number=0, epoch=2)]


def test_a_running_trial_shows_its_worker_attempt_and_curve(demo: Study) -> None:
    ledger, claim, _ = begin(demo, "first")
    ledger.park(claim)
    _, _, trial = begin(demo, "second")
    trial.report(0.25, 1)
    trial.report(math.nan, 2)
    trial.report(math.inf, 3)
    trial.report(0.75, 5)
    set_times(demo, 0, START)
    (running,) = summarize(demo, clock=lambda: START + 7.5).running
    assert (running.number, running.epochs, running.worker, running.attempt) == (0, 5, "second", 2)
    assert running.curve[0] == 0.25
    assert math.isnan(running.curve[1])
    assert running.curve[2:] == [math.inf, 0.75]
    assert running.seconds == 7.5


def test_the_best_trial_is_the_highest_complete_one_and_of_equals_the_first(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.7)
    run(demo, 0.7)
    run(demo, 0.9, state=TrialState.PRUNED)
    assert summarize(demo).best == Best(number=1, value=0.7)


def test_the_best_trial_of_a_study_that_minimizes_is_the_lowest(place: Storage, tmp_path: Path) -> None:
    demo = make(place, tmp_path, direction="minimize")
    run(demo, 0.5)
    run(demo, 0.2)
    assert summarize(demo).best == Best(number=1, value=0.2)


def test_failures_are_told_by_kind_with_the_last_one_s_message(demo: Study) -> None:
    run(demo, 0.1, kind=Kind.EXCEPTION, reason="ValueError: first")
    run(demo, 0.1, kind=Kind.DIVERGED, reason="loss is nan")
    run(demo, 0.1, kind=Kind.EXCEPTION, reason="ValueError: second")
    ledger, claim, _ = begin(demo)
    ledger.fail(claim, Failure(kind=Kind.LOST_WORKER, message="killed"))
    ledger.finish(begin(demo)[1], TrialState.COMPLETE, 0.1, outcome="complete")
    run(demo, 0.1, state=TrialState.PRUNED, reason="the pruner said so")
    foreign = demo.optuna.ask()
    demo.optuna.tell(foreign, state=TrialState.FAIL)
    assert summarize(demo).failures == [
        FailureCount(kind="exception", count=2, retried=0, message="ValueError: second"),
        FailureCount(kind="diverged", count=1, retried=0, message="loss is nan"),
        FailureCount(kind="foreign", count=1, retried=0, message=""),
        FailureCount(kind="lost_worker", count=1, retried=1, message="killed"),
    ]


def test_a_raised_budget_and_a_stop_are_seen_by_a_study_opened_before(demo: Study) -> None:
    with storage.writing(demo.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(trials=20, imported=3))
    demo.ledger("w").stop("enough")
    summary = summarize(demo)
    assert (summary.budget, summary.stop_reason) == (23, "enough")


def test_time_passes_while_something_runs_and_stands_still_after_the_last_end(demo: Study) -> None:
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert summarize(demo, clock=lambda: START + 999).seconds == 10
    begin(demo)
    assert summarize(demo, clock=lambda: START + 999).seconds == 999


def test_the_time_left_is_unknown_until_two_trials_have_finished(demo: Study) -> None:
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert summarize(demo).seconds_left is None
    run(demo, 0.5)
    set_times(demo, 1, START + 10, START + 20)
    assert summarize(demo).seconds_left == 80  # 8 of 10 to go, one after the other


def test_the_time_left_counts_trials_side_by_side_and_no_hours_in_which_nobody_worked(demo: Study) -> None:
    for number, start in enumerate([START, START, START + 36_000, START + 36_000]):
        run(demo, 0.5)
        set_times(demo, number, start, start + 10)
    assert summarize(demo).seconds_left == 30  # 6 to go, two in 10 s
    begin(demo)
    assert summarize(demo).seconds_left == 27.5  # a running one is half done


def test_nothing_is_left_of_a_stopped_study_but_what_has_begun(demo: Study) -> None:
    for number in range(2):
        run(demo, 0.5)
        set_times(demo, number, START + 10 * number, START + 10 * number + 10)
    demo.ledger("w").stop("enough")
    assert summarize(demo).seconds_left == 0


def test_a_summary_made_from_the_previous_one_is_the_same_as_a_fresh_one(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.1, kind=Kind.EXCEPTION, reason="no")
    before = summarize(demo)
    begin(demo)
    demo.optuna.enqueue_trial({"x": 1})
    frozen = lambda: START  # noqa: E731
    assert summarize(demo, before, clock=frozen) == summarize(demo, clock=frozen)
    run(demo, 0.9)
    assert summarize(demo, before, clock=frozen) == summarize(demo, clock=frozen)


def test_a_summary_takes_a_fixed_number_of_statements(place: Storage, tmp_path: Path) -> None:
    def count() -> int:
        seen: list[str] = []
        listener = lambda *arguments: seen.append(arguments[2])  # noqa: E731
        sa.event.listen(demo.storage.engine, "before_cursor_execute", listener)
        summarize(demo)
        sa.event.remove(demo.storage.engine, "before_cursor_execute", listener)
        return len(seen)

    demo = make(place, tmp_path, budget={"trials": 20})
    run(demo, 0.5)
    begin(demo)
    few = count()
    for _ in range(5):
        run(demo, 0.5, 0.6)
        begin(demo)
    assert count() == few <= 9


def test_another_studys_trials_are_not_counted(place: Storage, tmp_path: Path, demo: Study) -> None:
    other = make(place, tmp_path, name="other")
    run(other, 0.9)
    begin(other)
    run(demo, 0.5)
    summary = summarize(demo)
    assert (summary.spent, summary.best) == (1, Best(number=0, value=0.5))
    assert [one.name for one in statuses(place)] == ["demo", "other"]


def test_a_deleted_study_has_no_summary(place: Storage, demo: Study) -> None:
    optuna.delete_study(study_name="demo", storage=place.optuna)
    with pytest.raises(StudyError, match="study 'demo' was deleted"):
        summarize(demo)


def test_a_running_trials_seconds_are_those_in_training_if_its_epochs_were_timed(demo: Study) -> None:
    _, _, trial = begin(demo)
    set_times(demo, 0, START)
    trial.report_epoch(1, 0.5, {"seconds": 1.25})
    trial.report_epoch(2, 0.5, {"seconds": 0.5})
    (running,) = summarize(demo, clock=lambda: START + 593).running
    assert running.seconds == 1.75


def add_finished(demo: Study, times: int) -> None:
    """Add trials as a fork does."""
    with storage.writing(demo.storage.engine) as connection:
        connection.execute(hpo_studies.update().where(hpo_studies.c.uid == demo.uid).values(imported=times))
    for _ in range(times):
        demo.optuna.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.5))


def test_trials_that_a_fork_brought_along_took_no_time(demo: Study) -> None:
    add_finished(demo, 3)
    summary = summarize(demo)
    assert (summary.finished, summary.budget, summary.is_over) == (3, 13, False)
    assert (summary.seconds, summary.seconds_per_trial, summary.seconds_left) == (0.0, None, None)
    for number in (3, 4):
        run(demo, 0.5)
        set_times(demo, number, START + 10 * number, START + 10 * number + 10)
    summary = summarize(demo)
    assert (summary.seconds, summary.seconds_per_trial, summary.seconds_left) == (20, 10, 80)


def test_a_study_is_over_when_nothing_is_open_and_nothing_may_begin(place: Storage, tmp_path: Path) -> None:
    demo = make(place, tmp_path, budget={"trials": 2})
    run(demo, 0.5)
    assert not summarize(demo).is_over
    ledger, claim, trial = begin(demo)
    assert not summarize(demo).is_over
    ledger.park(claim)
    assert not summarize(demo).is_over
    _, _, trial = begin(demo)
    trial.finish(TrialState.COMPLETE, 0.9)
    assert summarize(demo).is_over


def test_a_stopped_study_is_over_when_nothing_is_open(demo: Study) -> None:
    _, _, trial = begin(demo)
    demo.ledger("w").stop("enough")
    assert not summarize(demo).is_over
    trial.finish(TrialState.COMPLETE, 0.9)
    assert summarize(demo).is_over
