from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import results, storage, study
from hpo.errors import StudyError
from hpo.ledger import Checkpoint, Claim, Ledger
from hpo.results import Best, Cursor, Failure, ParkedTrial
from hpo.spec import StudySpec
from hpo.storage import Storage
from hpo.study import Study
from hpo.tables import hpo_studies, hpo_trials, trials
from hpo.trial import Desk, LeasedTrial

START = 1_700_000_000.0  # seconds since 1970; when the first trial starts, in tests that look at times


def make(place: Storage, tmp_path: Path, **document: Any) -> Study:
    base = {"name": "demo", "objective": "x.py:f", "direction": "maximize", "budget": {"trials": 10}}
    spec = StudySpec.from_document({**base, "checkpoints": str(tmp_path / "checkpoints"), **document})
    return study.create_or_join(place, spec, code_folder=tmp_path, code_digest="")


@pytest.fixture
def demo(place: Storage, tmp_path: Path) -> Study:
    return make(place, tmp_path)


def begin(demo: Study, worker: str = "w") -> tuple[Ledger, Claim, LeasedTrial]:
    ledger = demo.ledger(worker)
    claim = ledger.claim()
    assert isinstance(claim, Claim)
    demo.optuna.get_trials(deepcopy=False)
    desk = Desk(ledger=ledger, claim=claim, rule=None, stopping=lambda: False)
    return ledger, claim, LeasedTrial(demo.optuna, desk)


def run(
    demo: Study, *curve: float, state: TrialState = TrialState.COMPLETE, outcome: str = "", reason: str = ""
) -> None:
    _, _, trial = begin(demo)
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    told = None if state == TrialState.FAIL else curve[-1]
    trial.settle(state, told, outcome=outcome or state.name.lower(), reason=reason or None)


def set_times(demo: Study, number: int, start: float, end: float | None = None) -> None:
    def utc(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)

    with storage.writing(demo.storage.engine) as connection:
        connection.execute(
            trials.update()
            .where(trials.c.number == number, trials.c.study_id == demo.study_id)
            .values(datetime_start=utc(start), datetime_complete=utc(end))
        )


def expire(demo: Study, number: int) -> None:
    trial_id = demo.optuna.get_trials(deepcopy=False)[number]._trial_id
    with storage.writing(demo.storage.engine) as connection:
        connection.execute(hpo_trials.update().where(hpo_trials.c.trial_id == trial_id).values(lease_until=1.0))


# --- summarize --------------------------------------------------------------------------------------------------------


def test_a_new_study_has_nothing_to_show(demo: Study) -> None:
    summary = results.summarize(demo)
    assert (summary.name, summary.direction, summary.sampler, summary.pruner) == ("demo", "maximize", "tpe", "median")
    assert set(summary.counts.values()) == {0}
    assert (summary.budget, summary.spent, summary.finished) == (10, 0, 0)
    assert (summary.best, summary.running, summary.parked, summary.failures) == (None, [], [], [])
    assert (summary.seconds, summary.seconds_left, summary.stop_reason) == (0.0, None, None)


def test_every_trial_is_counted_in_exactly_one_state(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.4, state=TrialState.PRUNED)
    run(demo, 0.3, state=TrialState.FAIL, outcome="exception", reason="Traceback\n  File\nValueError: no\n")
    ledger, parked, trial = begin(demo)
    trial.report(0.1, 1)
    begin(demo, "alive")  # before the other is parked, else this would take it over
    ledger.park(parked)
    demo.optuna.ask()
    demo.optuna.enqueue_trial({"x": 1})
    counts = results.summarize(demo).counts
    assert counts == {
        "complete": 1, "pruned": 1, "fail": 1, "running": 1, "parked": 1, "foreign": 1, "waiting": 1,
    }  # fmt: skip
    assert results.summarize(demo).spent == 6


def test_a_trial_whose_lease_ran_out_is_parked(demo: Study) -> None:
    begin(demo)
    assert results.summarize(demo).counts["running"] == 1
    expire(demo, 0)
    summary = results.summarize(demo)
    assert (summary.counts["running"], summary.counts["parked"]) == (0, 1)
    assert summary.parked == [ParkedTrial(number=0, epoch=0)]


def test_a_parked_trial_goes_on_from_its_checkpoint(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    for step in (1, 2, 3):
        trial.report(0.1, step)
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="p", digest="d"))
    ledger.park(claim)
    assert results.summarize(demo).parked == [ParkedTrial(number=0, epoch=2)]


def test_a_running_trial_shows_its_worker_attempt_and_curve(demo: Study) -> None:
    ledger, claim, _ = begin(demo, "first")
    ledger.park(claim)
    _, _, trial = begin(demo, "second")
    trial.report(0.25, 1)
    trial.report(math.nan, 2)
    trial.report(math.inf, 3)
    trial.report(0.75, 5)
    set_times(demo, 0, START)
    (running,) = results.summarize(demo, clock=lambda: START + 7.5).running
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
    assert results.summarize(demo).best == Best(number=1, value=0.7)


def test_the_best_trial_of_a_study_that_minimizes_is_the_lowest(place: Storage, tmp_path: Path) -> None:
    demo = make(place, tmp_path, direction="minimize")
    run(demo, 0.5)
    run(demo, 0.2)
    assert results.summarize(demo).best == Best(number=1, value=0.2)


def test_failures_are_told_by_kind_with_the_last_line_of_the_last_reason(demo: Study) -> None:
    run(demo, 0.1, state=TrialState.FAIL, outcome="exception", reason="Traceback\nValueError: first")
    run(demo, 0.1, state=TrialState.PRUNED, outcome="diverged", reason="loss is nan")
    run(demo, 0.1, state=TrialState.FAIL, outcome="exception", reason="Traceback\nValueError: second\n\n")
    run(demo, 0.1, state=TrialState.PRUNED, reason="the pruner said so")
    foreign = demo.optuna.ask()
    demo.optuna.tell(foreign, state=TrialState.FAIL)
    assert results.summarize(demo).failures == [
        Failure(outcome="exception", count=2, reason="ValueError: second"),
        Failure(outcome="diverged", count=1, reason="loss is nan"),
        Failure(outcome="foreign", count=1, reason=""),
    ]


def test_a_raised_budget_and_a_stop_are_seen_by_a_study_opened_before(demo: Study) -> None:
    with storage.writing(demo.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(trials=20, imported=3))
    demo.ledger("w").stop("enough")
    summary = results.summarize(demo)
    assert (summary.budget, summary.stop_reason) == (23, "enough")


def test_time_passes_while_something_runs_and_stands_still_after_the_last_end(demo: Study) -> None:
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert results.summarize(demo, clock=lambda: START + 999).seconds == 10
    begin(demo)
    assert results.summarize(demo, clock=lambda: START + 999).seconds == 999


def test_the_time_left_is_unknown_until_two_trials_have_finished(demo: Study) -> None:
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert results.summarize(demo).seconds_left is None
    run(demo, 0.5)
    set_times(demo, 1, START + 10, START + 20)
    assert results.summarize(demo).seconds_left == 80  # 8 of 10 to go, one after the other


def test_the_time_left_counts_trials_side_by_side_and_no_hours_in_which_nobody_worked(demo: Study) -> None:
    for number, start in enumerate([START, START, START + 36_000, START + 36_000]):
        run(demo, 0.5)
        set_times(demo, number, start, start + 10)
    assert results.summarize(demo).seconds_left == 30  # 6 to go, two in 10 s
    begin(demo)
    assert results.summarize(demo).seconds_left == 27.5  # a running one is half done


def test_nothing_is_left_of_a_stopped_study_but_what_has_begun(demo: Study) -> None:
    for number in range(2):
        run(demo, 0.5)
        set_times(demo, number, START + 10 * number, START + 10 * number + 10)
    demo.ledger("w").stop("enough")
    assert results.summarize(demo).seconds_left == 0


def test_a_summary_made_from_the_previous_one_is_the_same_as_a_fresh_one(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.1, state=TrialState.FAIL, outcome="exception", reason="no")
    before = results.summarize(demo)
    begin(demo)
    demo.optuna.enqueue_trial({"x": 1})
    frozen = lambda: START  # noqa: E731
    assert results.summarize(demo, before, clock=frozen) == results.summarize(demo, clock=frozen)
    run(demo, 0.9)
    assert results.summarize(demo, before, clock=frozen) == results.summarize(demo, clock=frozen)


def test_a_summary_takes_a_fixed_number_of_statements(place: Storage, tmp_path: Path) -> None:
    def count() -> int:
        seen: list[str] = []
        listener = lambda *arguments: seen.append(arguments[2])  # noqa: E731
        sa.event.listen(demo.storage.engine, "before_cursor_execute", listener)
        results.summarize(demo)
        sa.event.remove(demo.storage.engine, "before_cursor_execute", listener)
        return len(seen)

    demo = make(place, tmp_path, budget={"trials": 20})
    run(demo, 0.5)
    begin(demo)
    few = count()
    for _ in range(5):
        run(demo, 0.5, 0.6)
        begin(demo)
    assert count() == few <= 8


def test_another_studys_trials_are_not_counted(place: Storage, tmp_path: Path, demo: Study) -> None:
    other = make(place, tmp_path, name="other")
    run(other, 0.9)
    begin(other)
    run(demo, 0.5)
    summary = results.summarize(demo)
    assert (summary.spent, summary.best) == (1, Best(number=0, value=0.5))
    assert [one.name for one in results.statuses(place)] == ["demo", "other"]


def test_a_deleted_study_has_no_summary(place: Storage, demo: Study) -> None:
    optuna.delete_study(study_name="demo", storage=place.optuna)
    with pytest.raises(StudyError, match="study 'demo' was deleted"):
        results.summarize(demo)


# --- finished ---------------------------------------------------------------------------------------------------------


def test_each_finished_trial_is_told_once(demo: Study) -> None:
    cursor = Cursor()
    run(demo, 0.5, 0.6)
    run(demo, 0.1, state=TrialState.FAIL, outcome="exception")
    told = results.finished(demo, cursor)
    assert [(trial.number, trial.state, trial.value, trial.outcome, trial.epochs) for trial in told] == [
        (0, "complete", 0.6, "complete", 2),
        (1, "fail", None, "exception", 1),
    ]
    assert results.finished(demo, cursor) == []


def test_a_trial_that_ends_late_is_told_although_later_ones_were(demo: Study) -> None:
    cursor = Cursor()
    _, _, slow = begin(demo)
    run(demo, 0.5)
    run(demo, 0.6)
    assert [trial.number for trial in results.finished(demo, cursor)] == [1, 2]
    assert results.finished(demo, cursor) == []
    slow.settle(TrialState.COMPLETE, 0.9, outcome="complete")
    run(demo, 0.7)
    set_times(demo, 0, START, START + 1)  # by a clock that is behind all others
    assert [trial.number for trial in results.finished(demo, cursor)] == [0, 3]
    assert results.finished(demo, cursor) == []


def test_the_cursor_forgets_single_trials_once_all_before_them_are_finished(demo: Study) -> None:
    cursor = Cursor()
    _, _, slow = begin(demo)
    run(demo, 0.5)
    results.finished(demo, cursor)
    assert len(cursor.seen) == 1
    slow.settle(TrialState.COMPLETE, 0.9, outcome="complete")
    results.finished(demo, cursor)
    assert cursor.seen == set()


def test_a_finished_trial_shows_its_seconds_and_its_parameters_in_order(demo: Study) -> None:
    _, _, trial = begin(demo)
    x = trial.suggest_float("x", 1e-3, 1.0, log=True)
    kind = trial.suggest_categorical("kind", ["sgd", "adamw"])
    width = trial.suggest_int("width", 8, 64)
    trial.settle(TrialState.COMPLETE, 0.9, outcome="complete")
    set_times(demo, 0, START, START + 1.5)
    (told,) = results.finished(demo, Cursor())
    assert told.seconds == 1.5
    assert list(told.params.items()) == [("x", x), ("kind", kind), ("width", width)]
    assert isinstance(told.params["width"], int)


# --- best -------------------------------------------------------------------------------------------------------------


def test_the_best_ones_come_first_and_ties_go_to_the_lower_number(demo: Study) -> None:
    for value in (0.5, 0.9, 0.9, 0.7):
        run(demo, value)
    assert [trial.number for trial in results.best(demo, 3)] == [1, 2, 3]
    assert [trial.number for trial in results.best(demo, 99)] == [1, 2, 3, 0]


def test_a_result_carries_curves_receipt_and_attempt(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    trial.report_epoch(1, 0.5, {"accuracy": 0.5, "loss": math.nan})
    trial.report_epoch(2, 0.7, {"accuracy": 0.7, "loss": 1.25})
    ledger.record_receipt(claim, {"seed": 3})
    trial.settle(TrialState.COMPLETE, 0.7, outcome="complete")
    (result,) = results.best(demo)
    assert (result.number, result.state, result.value, result.attempt) == (0, "complete", 0.7, 1)
    assert result.curves["accuracy"] == [0.5, 0.7]
    assert math.isnan(result.curves["loss"][0])
    assert result.curves["loss"][1] == 1.25
    assert result.receipt == {"seed": 3}


def test_choices_that_are_lists_or_tables_come_back_as_such(place: Storage, tmp_path: Path) -> None:
    demo = make(
        place,
        tmp_path,
        objective=None,
        direction=None,
        data={"name": "digits"},
        model={"name": "mlp", "widths": {"choices": [[32], [64, 32]]}},
        optimizer={"name": "sgd", "lr": 0.1},
    )
    _, _, trial = begin(demo)
    trial.suggest_categorical("model.widths", ["[32]", "[64,32]"])
    trial.settle(TrialState.COMPLETE, 0.5, outcome="complete")
    assert results.best(demo)[0].params["model.widths"] in ([32], [64, 32])


def test_a_foreign_trial_has_a_result_without_a_receipt(demo: Study) -> None:
    foreign = demo.optuna.ask()
    foreign.suggest_float("x", 0, 1)
    demo.optuna.tell(foreign, 0.5)
    (result,) = results.best(demo)
    assert (result.value, result.curves, result.receipt, result.attempt) == (0.5, {}, {}, 0)


def test_a_pruned_trial_is_given_when_asked_for_by_number(demo: Study) -> None:
    run(demo, 0.5)
    run(demo, 0.9, state=TrialState.PRUNED)
    (result,) = results.best(demo, number=1)
    assert (result.number, result.state, result.value) == (1, "pruned", 0.9)


def test_a_study_without_a_finished_trial_has_no_best(demo: Study) -> None:
    run(demo, 0.5, state=TrialState.PRUNED)
    begin(demo)
    with pytest.raises(StudyError) as raised:
        results.best(demo)
    assert str(raised.value) == (
        "study 'demo' has no finished trial yet (1 RUNNING, 1 PRUNED); "
        "let `hpo run` finish one, `hpo status demo` shows how far it is"
    )


def test_a_number_that_is_no_finished_trial_is_refused(demo: Study) -> None:
    with pytest.raises(StudyError, match="has no trial 3; it has none yet"):
        results.best(demo, number=3)
    run(demo, 0.5, state=TrialState.FAIL)
    with pytest.raises(StudyError, match="has no trial 3; its trials are 0 to 0"):
        results.best(demo, number=3)
    with pytest.raises(StudyError, match="trial 0 of study 'demo' is FAIL and has no result"):
        results.best(demo, number=0)
