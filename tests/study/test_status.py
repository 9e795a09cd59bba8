from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease, StudyError
from hpo.queue import reaper, workers
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.storage.tables import FINISHED, hpo_studies, hpo_trials, hpo_workers, trials
from hpo.study import control, status
from hpo.study.interval import IMAGES_KEY, wilson
from hpo.study.plain import statuses
from hpo.study.query import ranking, trial_columns
from hpo.study.status import Best, FailureCount, ParkedTrial, read, summarize
from hpo.study.study import Study, store_of
from hpo.view.pages import status_text
from hpo.worker import attempt
from hpo.worker.trial import LeasedTrial
from tests.support.trials import START, begin, end_trial, finish_claim, make, record_receipt, run, set_times

DECLARED: dict[str, Any] = {
    "objective": None,
    "direction": None,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": {"choices": [[32], [64, 32]]}},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def expire(demo: Study, number: int) -> None:
    trial_id = demo.optuna.get_trials(deepcopy=False)[number]._trial_id
    with sql.writing(demo.storage.engine) as connection:
        connection.execute(hpo_trials.update().where(hpo_trials.c.trial_id == trial_id).values(lease_until=1.0))


def test_a_new_study_has_nothing_to_show(demo: Study) -> None:
    summary = summarize(demo)
    assert (summary.name, summary.direction, summary.sampler, summary.pruner) == ("demo", "maximize", "tpe", "median")
    assert set(summary.counts.values()) == {0}
    assert (summary.budget, summary.spent, summary.finished) == (10, 0, 0)
    assert (summary.best, summary.running, summary.parked, summary.failures) == (None, [], [], [])
    assert (summary.seconds, summary.seconds_left, summary.stop_reason) == (0.0, None, None)


@pytest.mark.parametrize(
    ("sampler", "trials", "is_grid"), [("auto", 2, True), ("auto", 1, False), ("grid", 1, True), ("random", 2, False)]
)
def test_a_grid_is_known_by_its_name_and_by_what_auto_stands_for(
    place: Storage, tmp_path: Path, sampler: str, trials: int, is_grid: bool
) -> None:
    study = make(place, tmp_path, **DECLARED, sampler={"name": sampler}, budget={"trials": trials})
    assert summarize(study).is_grid is is_grid


def test_a_bucket_of_checkpoints_is_shown_and_a_folder_is_not(demo: Study) -> None:
    url = "s3://bucket/studies/demo"
    with_bucket = replace(demo, store=store_of(demo.storage, url, demo.spec))
    assert [summarize(study).bucket for study in (demo, with_bucket)] == [None, url]
    assert f"bucket   {url}" in status_text(summarize(with_bucket)).splitlines()


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
    assert summary.parked == [ParkedTrial(number=0, epoch=0, unit="step")]


def test_a_parked_trial_goes_on_from_its_checkpoint(demo: Study) -> None:
    ledger, claim, trial = begin(demo)
    for step in (1, 2, 3):
        trial.report(0.1, step)
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="p", digest="d"))
    ledger.park(claim)
    assert summarize(demo).parked == [ParkedTrial(number=0, epoch=2, unit="step", has_checkpoint=True)]


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


def test_which_trial_is_the_best(demo: Study) -> None:
    """The best trial is the highest complete one and of equals the first."""
    run(demo, 0.5)
    run(demo, 0.7)
    run(demo, 0.7)
    run(demo, 0.9, state=TrialState.PRUNED)
    assert summarize(demo).best == Best(number=1, value=0.7)


def validated(study: Study, right: int, images: int | None = 30, state: TrialState = TrialState.COMPLETE) -> None:
    """Run a trial whose value is the share of so many images."""
    ledger, claim, trial = begin(study)
    record_receipt(ledger, claim, {IMAGES_KEY: images} if images else {})
    end_trial(trial, state, right / 30)


def test_the_best_share_has_an_interval_and_rivals(place: Storage, tmp_path: Path) -> None:
    """14 of 30 images are below the interval of 20 of 30, 0.4878 to 0.8077; 15 of 30 are in it."""
    study = make(place, tmp_path, **DECLARED)
    validated(study, 15)
    validated(study, 14)
    first = read(study)
    assert first.summary.best == Best(number=0, value=0.5, interval=wilson(0.5, 30), rivals=1)
    validated(study, 20)
    validated(study, 20)
    validated(study, 19, state=TrialState.PRUNED)
    again = read(study, first.past)
    assert again.summary.best == Best(number=2, value=20 / 30, interval=wilson(20 / 30, 30), rivals=2)
    assert (again.summary.metric, again.summary.value_rule) == ("accuracy", "best")
    assert again == read(study, first.past)
    assert again.summary == summarize(study)
    validated(study, 21, images=None)  # by an earlier hpo
    assert summarize(study).best == Best(number=5, value=0.7)


@pytest.mark.parametrize(
    ("document", "metric"), [({**DECLARED, "metric": "loss"}, "loss"), ({"direction": "maximize"}, None)]
)
def test_a_value_that_is_no_share_has_no_interval(
    place: Storage, tmp_path: Path, document: dict[str, Any], metric: str | None
) -> None:
    study = make(place, tmp_path, **document)
    validated(study, 20)
    assert (summarize(study).best, summarize(study).metric) == (Best(number=0, value=20 / 30), metric)


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
    finish_claim(ledger, begin(demo)[1], TrialState.COMPLETE, 0.1, outcome="complete")
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
    with sql.writing(demo.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(trials=20, imported=3))
    demo.ledger("w").stop("enough")
    summary = summarize(demo)
    assert (summary.budget, summary.own_budget, summary.stop_reason) == (23, 20, "enough")


def test_when_a_study_s_time_passes(demo: Study) -> None:
    """Time passes while something runs and stands still after the last end."""
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert summarize(demo, clock=lambda: START + 999).seconds == 10
    begin(demo)
    assert summarize(demo, clock=lambda: START + 999).seconds == 999


def live(demo: Study, worker: str, *times: float | None, clock: str | None = "another") -> None:
    """Write down a process that started, was seen last and left at these times, by the clock of this name."""
    workers.register(demo.ledger(worker))
    with sql.writing(demo.storage.engine) as connection:
        of_worker = hpo_workers.update().where(hpo_workers.c.worker == worker)
        told = zip(("started_at", "seen_at", "left_at"), times, strict=True)
        connection.execute(of_worker.values(**dict(told), clock=clock))


def test_pauses_between_runs_do_not_count_as_time(demo: Study) -> None:
    """Time is what the workers' lives cover; launchers train nothing."""
    run(demo, 0.5)
    set_times(demo, 0, START, START + 9000)  # it was parked over the pause
    live(demo, "a", 100.0, 110.0, 110.0)
    live(demo, "b", 105.0, 120.0, 120.0)
    live(demo, "c", 9000.0, 9010.0, 9010.0)
    live(demo, "d", 100.0, 103.0, None, clock="of a machine that is gone")  # killed
    live(demo, "launcher:e", 0.0, 9999.0, 9999.0)
    assert summarize(demo).seconds == 20 + 10 + 3


@pytest.mark.both
def test_time_does_not_run_backwards_when_workers_leave(demo: Study) -> None:
    """Time goes on while a worker lives, and stands still once it has left or is overdue."""
    ledger, claim, _ = begin(demo)
    workers.register(ledger)
    shown = [summarize(demo).seconds, summarize(demo).seconds]
    ledger.park(claim)
    shown.append(summarize(demo).seconds)
    workers.unregister(ledger)
    shown += [summarize(demo).seconds, summarize(demo).seconds]
    assert shown == sorted(shown)
    assert 0 < shown[0] < shown[1] < shown[2] < shown[3] == shown[4]
    with sql.writing(demo.storage.engine) as connection:
        connection.execute(
            hpo_workers.update().values(started_at=hpo_workers.c.seen_at - 600, seen_at=hpo_workers.c.seen_at - 500)
        )
        connection.execute(hpo_workers.update().values(left_at=None))
    assert summarize(demo).seconds == pytest.approx(100 + 10)  # killed: up to its next stamp, a sixth of a lease later


def test_the_time_left_is_unknown_until_two_trials_have_finished(demo: Study) -> None:
    run(demo, 0.5)
    set_times(demo, 0, START, START + 10)
    assert summarize(demo).seconds_left is None
    run(demo, 0.5)
    set_times(demo, 1, START + 10, START + 20)
    assert summarize(demo).seconds_left == 80  # 8 of 10 to go, one after the other


def test_what_the_time_left_counts(demo: Study) -> None:
    """The time left counts trials side by side and no hours in which nobody worked."""
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


def frozen() -> float:
    return START


def test_a_reading_goes_on_from_another(demo: Study) -> None:
    """A reading that goes on from another shows the same as a fresh one."""
    run(demo, 0.5)
    run(demo, 0.1, kind=Kind.EXCEPTION, reason="no")
    past = read(demo).past
    begin(demo)
    demo.optuna.enqueue_trial({"x": 1})
    assert read(demo, past, clock=frozen).summary == summarize(demo, clock=frozen)
    run(demo, 0.9)
    assert read(demo, past, clock=frozen).summary == summarize(demo, clock=frozen)


def test_a_failure_that_turns_out_to_be_ours(demo: Study) -> None:
    """A foreign failure that turns out to be ours is not foreign any more."""
    ledger, claim, _ = begin(demo)
    demo.optuna.tell(0, state=TrialState.FAIL)  # by the dashboard
    reading = read(demo)
    assert [failure.kind for failure in reading.summary.failures] == ["foreign"]
    ledger.drop(claim, "in other hands")  # its worker sees it only now, and closes our row
    reading = read(demo, reading.past)
    assert [failure.kind for failure in reading.summary.failures] == ["lease_lost"]
    assert reading.past.cursor.unsettled == frozenset()


def test_the_pace_is_of_the_last_trials_by_number_however_late_one_ended(
    demo: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "WINDOW", 2)
    _, _, slow = begin(demo)
    for number in (1, 2):
        run(demo, 0.5)
        set_times(demo, number, START, START + 10)
    reading = read(demo)
    assert reading.summary.seconds_per_trial == 5
    end_trial(slow, TrialState.COMPLETE, 0.5)
    assert read(demo, reading.past).summary.seconds_per_trial == 5


@contextmanager
def traffic(demo: Study) -> Iterator[list[int]]:
    """Collect, for each statement that is executed meanwhile, how many rows it returned."""
    seen: list[tuple[str, Any]] = []
    counts: list[int] = []
    listener = lambda *arguments: seen.append((arguments[2], arguments[3]))  # noqa: E731
    sa.event.listen(demo.storage.engine, "before_cursor_execute", listener)
    yield counts
    sa.event.remove(demo.storage.engine, "before_cursor_execute", listener)
    with demo.storage.engine.connect() as connection:
        counts += [len(connection.exec_driver_sql(*statement).fetchall()) for statement in seen]


def test_a_refresh_reads_what_is_new_or_open_however_much_has_finished(place: Storage, tmp_path: Path) -> None:
    demo = make(place, tmp_path, budget={"trials": 100})
    _, _, alive = begin(demo)
    alive.report(0.5, 1)
    demo.optuna.tell(demo.optuna.ask(), state=TrialState.FAIL)
    run(demo, 0.5, kind=Kind.EXCEPTION)
    for finished in (3, 30):
        while summarize(demo).finished < finished:
            run(demo, 0.5, 0.6, 0.7)
        past = read(demo).past
        run(demo, 0.5, 0.6, 0.7)
        # our row; the open trial, the new one; what the new one says of constraints, as an objective of the user's own may;
        # the open one's curve and its seconds; the workers; how many failures there are
        with traffic(demo) as refresh:
            read(demo, past)
        assert refresh == [1, 1, 1, 0, 1, 1, 1, 1]
        with traffic(demo) as first:
            read(demo)
        assert first == [1, finished + 2, 0, 1, 1, 1, 1, 1]


def test_failures_are_read_again_only_when_there_is_another(demo: Study) -> None:
    for kind in (Kind.EXCEPTION, Kind.EXCEPTION, Kind.DIVERGED):
        run(demo, 0.5, kind=kind)
    past = read(demo).past
    with traffic(demo) as idle:
        read(demo, past)
    assert idle == [1, 0, 1, 1]
    run(demo, 0.5, kind=Kind.EXCEPTION)
    with traffic(demo) as another:
        read(demo, past)
    assert another == [1, 1, 1, 1, 2]  # one row a kind


class History:
    """All that can befall a study, in an order that a seed decides."""

    def __init__(self, demo: Study, other: Study, seed: int) -> None:
        self.demo, self.other = demo, other
        self.random = Random(seed)
        self.steps = itertools.count(1)
        self.held: list[tuple[Ledger, Claim, LeasedTrial]] = []  # by workers that have not seen yet that they lost it
        self.foreign: list[int] = []

    def step(self) -> None:
        happen = self.random.choice(
            [
                self.begin, self.begin, self.begin, self.report, self.finish, self.finish, self.fail, self.park,
                self.expire, self.reap, self.ask, self.tell, self.tell_ours, self.enqueue, self.end_queued, self.add,
                self.drop, self.elsewhere,
            ]
        )  # fmt: skip
        with suppress(
            LostLease, IndexError, ValueError
        ):  # of what cannot happen now: nothing held, an end for the second time
            happen()

    def value(self) -> float:
        return self.random.choice([0.0, -0.0, 0.25, 0.5, 0.75, -1.0])  # few, so that there are ties

    def any_value(self) -> float:
        return self.random.choice([self.value(), math.inf, -math.inf])

    def any_held(self) -> tuple[Ledger, Claim, LeasedTrial]:
        return self.random.choice(self.held)

    def number(self, state: TrialState) -> int:
        return self.random.choice([t.number for t in self.demo.optuna.get_trials(deepcopy=False, states=[state])])

    def begin(self) -> None:
        begun = begin(self.demo, f"w{self.random.randrange(3)}")
        self.held.append(begun)
        set_times(self.demo, begun[1].number, START + self.random.randrange(1000))

    def report(self) -> None:
        self.any_held()[2].report(self.random.choice([self.value(), math.nan, math.inf]), next(self.steps))

    def finish(self) -> None:
        state = self.random.choice([TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED])
        end_trial(self.any_held()[2], state, self.value())

    def fail(self) -> None:
        kind = self.random.choice([Kind.EXCEPTION, Kind.DIVERGED, Kind.CUDA_ERROR])
        attempt.fail(self.any_held()[2], Failure(kind=kind, message=f"number {self.random.random()}"))

    def park(self) -> None:
        ledger, claim, _ = self.any_held()
        ledger.park(claim)

    def expire(self) -> None:
        expire(self.demo, self.any_held()[1].number)

    def reap(self) -> None:
        with sql.writing(self.demo.storage.engine) as connection:
            reaper.reap(connection, self.demo.ledger("reaper"))

    def drop(self) -> None:
        ledger, claim, _ = self.held.pop(self.random.randrange(len(self.held)))
        ledger.drop(claim, f"lost by {claim.attempt}")

    def ask(self) -> None:
        self.foreign.append(self.demo.optuna.ask().number)

    def tell(self) -> None:
        number = self.random.choice(self.foreign)
        state = self.random.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        self.demo.optuna.tell(number, self.any_value() if state == TrialState.COMPLETE else None, state=state)

    def tell_ours(self) -> None:
        number = self.any_held()[1].number
        state = self.random.choice([TrialState.COMPLETE, TrialState.FAIL])
        self.demo.optuna.tell(number, self.value() if state == TrialState.COMPLETE else None, state=state)

    def enqueue(self) -> None:
        self.demo.optuna.enqueue_trial({"x": self.random.random()})

    def end_queued(self) -> None:
        control.stop_trial(self.demo, self.number(TrialState.WAITING))

    def add(self) -> None:
        state = self.random.choice([TrialState.COMPLETE, TrialState.PRUNED])
        self.demo.optuna.add_trial(optuna.trial.create_trial(state=state, value=self.any_value()))

    def elsewhere(self) -> None:
        run(self.other, self.value(), kind=self.random.choice([None, Kind.EXCEPTION]))


@pytest.mark.both
@pytest.mark.parametrize(("direction", "seed"), [("maximize", 0), ("minimize", 1), ("minimize", 2)])
def test_a_reading_shows_what_a_fresh_one_shows(
    place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, seed: int
) -> None:
    """Whatever happens a reading that goes on shows what a fresh one shows."""
    monkeypatch.setattr(status, "WINDOW", 3)
    document = {"direction": direction, "budget": {"trials": 1000}, "failures": {"in_a_row": 1000}}
    demo, other = make(place, tmp_path, **document), make(place, tmp_path, name="other", **document)
    history, past, told = History(demo, other, seed), None, Counter[int]()
    for _ in range(40):
        history.step()
        if history.random.random() < 0.3:
            continue  # several things happen between two looks
        reading = read(demo, past, clock=frozen)
        past = reading.past
        told.update(reading.ended)
        assert reading.summary == summarize(demo, clock=frozen)
        with place.engine.connect() as connection:
            ranked = ranking.ranked(connection, demo, 1)
            ended = connection.execute(
                sa.select(trials.c.trial_id).where(trials.c.study_id == demo.study_id, trials.c.state.in_(FINISHED))
            ).scalars()
            assert told == Counter(ended)
        best = Best(number=ranked[0].number, value=trial_columns.value_of(ranked[0])) if ranked else None
        assert reading.summary.best == best


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


def test_a_reading_does_not_go_on_in_a_study_made_again(place: Storage, tmp_path: Path, demo: Study) -> None:
    """A reading does not go on in a study that took the place of a deleted one."""
    run(demo, 0.5)
    past = read(demo).past
    optuna.delete_study(study_name="demo", storage=place.optuna)
    again = make(place, tmp_path)  # with the same ids, on SQLite
    run(again, 0.5)
    with pytest.raises(StudyError, match="study 'demo' was deleted"):
        read(demo, past)


def test_a_running_trial_s_seconds_are_those_in_training(demo: Study) -> None:
    """A running trial's seconds are those in training if its epochs were timed."""
    _, _, trial = begin(demo)
    set_times(demo, 0, START)
    trial.write(trial.reporting(1, 0.5, {"seconds": 1.25}))
    trial.write(trial.reporting(2, 0.5, {"seconds": 0.5}))
    trial.client.flush()  # raw metrics wait for more of them for a second
    (running,) = summarize(demo, clock=lambda: START + 593).running
    assert running.seconds == 1.75


def add_finished(demo: Study, times: int) -> None:
    """Add trials as a fork does."""
    with sql.writing(demo.storage.engine) as connection:
        connection.execute(hpo_studies.update().where(hpo_studies.c.uid == demo.uid).values(imported=times))
    for _ in range(times):
        demo.optuna.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.5))


def test_trials_that_a_fork_brought_along_took_no_time(demo: Study) -> None:
    add_finished(demo, 3)
    summary = summarize(demo)
    assert (summary.finished, summary.budget, summary.is_over) == (3, 13, False)
    assert (summary.own_finished, summary.own_budget, summary.imported) == (0, 10, 3)
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
    end_trial(trial, TrialState.COMPLETE, 0.9)
    assert summarize(demo).is_over


def test_a_stopped_study_is_over_when_nothing_is_open(demo: Study) -> None:
    _, _, trial = begin(demo)
    demo.ledger("w").stop("enough")
    assert not summarize(demo).is_over
    end_trial(trial, TrialState.COMPLETE, 0.9)
    assert summarize(demo).is_over
