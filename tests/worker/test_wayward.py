"""Trials that end at an odd moment, objectives that misbehave as they let go, and answers of the storage that are lost."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import StorageError
from hpo.queue import claiming, reaper
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report
from hpo.storage.tables import hpo_failures, hpo_studies, hpo_trials
from hpo.strategy import samplers
from hpo.study import control
from hpo.study.study import Study
from hpo.study.study import join as join_study
from hpo.worker import attempt
from hpo.worker import loop as worker_loop
from hpo.worker.client import QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.lease import Lease
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.trials import MakeStudy, claim_one, client_of, finish_claim
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


def work(study: Study, objective: worker_loop.Objective, stopping: StopSignal | None = None) -> int:
    return worker_loop.work(study, objective, study.ledger("w"), stopping or StopSignal())


def trials(study: Study) -> list[FrozenTrial]:
    return study.optuna.get_trials(deepcopy=False)


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in trials(study)]


def rows(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_trials).order_by(hpo_trials.c.trial_id)))


def outcomes(study: Study) -> list[str | None]:
    return [row.outcome for row in rows(study)]


def failures(study: Study) -> list[tuple[int, str, str]]:
    """Return what is written down of failures: attempt, kind, verdict."""
    key = hpo_failures.c.trial_id, hpo_failures.c.attempt, hpo_failures.c.kind
    with study.storage.engine.connect() as connection:
        return [
            (row.attempt, row.kind, row.verdict) for row in connection.execute(sa.select(hpo_failures).order_by(*key))
        ]


def one(trial: LeasedTrial) -> float:
    return 1.0


# --- ended before they began ------------------------------------------------------------------------------------------


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[LeasedTrial], object]], None]:
    """Do something with a trial that was opened, before its objective starts."""
    open_trial = attempt.open_trial

    def let(act: Callable[[LeasedTrial], object]) -> None:
        def opened(study: Study, client: QueueClient, lease: Lease) -> LeasedTrial:
            trial = open_trial(study, client, lease)
            act(trial)
            return trial

        monkeypatch.setattr(attempt, "open_trial", opened)

    return let


def test_a_trial_ended_before_its_objective_starts(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that a person ended before its objective started ends and the worker goes on."""
    study = make_study(trials=3)
    begun: list[int] = []

    def stop_the_second(trial: LeasedTrial) -> None:
        if trial.number == 1:
            assert not control.stop_trial(study, 1)
            wait_for(lambda: trial.client.must_end(trial.lease))

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        return 1.0

    opening(stop_the_second)
    assert work(study, objective) == 0
    assert begun == [0, 2]
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert outcomes(study) == ["complete", "stopped", "complete"]
    assert failures(study) == []


def test_a_trial_ended_while_its_sampler_works(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that a person ends while its sampler works ends at its next look."""
    study = make_study(trials=2)

    class Slow(optuna.samplers.RandomSampler):
        def sample_independent(self, of: optuna.Study, trial: FrozenTrial, *others: Any) -> Any:
            if trial.number == 0:
                assert not control.stop_trial(study, 0)
            return super().sample_independent(of, trial, *others)

    def objective(trial: LeasedTrial) -> float:
        trial.report(0.5, 1)
        x = trial.suggest_float("x", 0, 1)
        wait_for(lambda: trial.number > 0 or trial.client.must_end(trial.lease))
        trial.should_prune()
        return x

    monkeypatch.setitem(samplers.SAMPLERS, "random", lambda draw: Slow(seed=draw.trial_seed))
    assert work(study, objective) == 0
    assert states(study) == ["PRUNED", "COMPLETE"]
    assert (trials(study)[0].value, outcomes(study)[0]) == (0.5, "stopped")


def test_a_trial_ended_by_a_person_keeps_its_last_value(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that went on after it was ended by a person keeps its last value."""
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    ledger.report([Report(claim=claim, step=1, value=0.5, metrics={"value": 0.5})])
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="/c.pt", digest="d"))
    ledger.park(claim)

    def stop(trial: LeasedTrial) -> None:
        assert not control.stop_trial(study, 0)
        wait_for(lambda: trial.client.must_end(trial.lease))

    opening(stop)
    assert work(study, one) == 0
    assert (states(study), trials(study)[0].value) == (["PRUNED"], 0.5)


@pytest.mark.parametrize("then", ["prune", "fail"])
def test_a_trial_without_time_left_is_ended_first(then: str, make_study: MakeStudy) -> None:
    """A trial whose time was spent before is ended before its objective starts."""
    study = make_study(trials=2, budget={"trials": 2, "trial_timeout": "10s"}, failures={"time_limit": {"then": then}})
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    for step in (1, 2):
        metrics = {"value": 0.5, "seconds": 6.0}
        ledger.report([Report(claim=claim, step=step, value=0.5 / step, metrics=metrics)])
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="/c.pt", digest="d"))
    ledger.park(claim)
    begun: list[int] = []

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        return 1.0

    assert work(study, objective) == 0
    assert begun == [1]
    assert states(study) == ["PRUNED" if then == "prune" else "FAIL", "COMPLETE"]
    assert trials(study)[0].value == (0.25 if then == "prune" else None)
    assert failures(study) == [(2, "time_limit", then)]


def test_a_trial_claimed_at_a_stop_keeps_its_place(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that was claimed as the worker was asked to stop keeps its place."""
    study = make_study(trials=1)
    stopping = StopSignal()
    opening(lambda trial: stopping.request())
    assert work(study, lambda trial: pytest.fail("it must not start"), stopping) == 143
    assert states(study) == ["RUNNING"]
    assert rows(study)[0].lease_until is None
    assert failures(study) == []


def test_a_trial_that_was_lost_before_its_objective_started_is_dropped(
    make_study: MakeStudy, opening: Callable[..., None]
) -> None:
    study = make_study(trials=2)
    thief = study.ledger("thief")
    stolen: list[Claim] = []

    def steal(trial: LeasedTrial) -> None:
        if stolen:
            return
        reaper.release_leases_of(thief, "w")
        taken = claim_one(thief)
        assert isinstance(taken, Claim)
        stolen.append(taken)
        wait_for(lambda: trial.client.must_end(trial.lease))

    def objective(trial: LeasedTrial) -> float:
        assert trial.number == 1
        finish_claim(thief, stolen[0], TrialState.COMPLETE, 8.0, outcome="complete")
        return 1.0

    opening(steal)
    assert work(study, objective) == 0
    assert [trial.value for trial in trials(study)] == [8.0, 1.0]
    assert failures(study) == [(1, "lease_lost", "drop")]


# --- objectives that misbehave as they let go -------------------------------------------------------------------------


def clean_up_badly(trial: LeasedTrial, wait: Callable[[], object]) -> float:
    try:
        trial.report(0.5, 1)
        wait()
        trial.report(0.25, 2)
    finally:
        raise ValueError("in the objective's own clean-up")


def leave_badly(trial: LeasedTrial, wait: Callable[[], object]) -> float:
    try:
        return clean_up_badly(trial, wait)
    except BaseException:
        sys.exit(1)


def chain_badly(trial: LeasedTrial, wait: Callable[[], object]) -> float:
    try:
        return clean_up_badly(trial, wait)
    except BaseException as error:
        raise RuntimeError("wrapped") from error


WAYS = [clean_up_badly, leave_badly, chain_badly]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_on_the_way_out_of_a_parked_trial_fails_nothing(
    way: Callable[..., float], make_study: MakeStudy
) -> None:
    study = make_study(trials=2)
    stopping = StopSignal()
    assert work(study, lambda trial: way(trial, stopping.request), stopping) == 143
    assert states(study) == ["RUNNING"]
    assert (rows(study)[0].lease_until, failures(study)) == (None, [])
    assert work(study, one) == 0
    assert states(study) == ["COMPLETE"] * 2


@pytest.mark.parametrize("way", WAYS)
def test_an_error_on_the_way_out_of_a_lost_trial_fails_nothing(
    way: Callable[..., float], make_study: MakeStudy
) -> None:
    study = make_study(trials=1)
    thief = study.ledger("thief")
    stolen: list[Any] = []

    def steal() -> None:
        reaper.release_leases_of(thief, "w")
        stolen.append(claim_one(thief))
        control.stop(study)  # so that the worker does not wait for the thief

    def finish_for_the_thief() -> None:
        wait_for(lambda: bool(failures(study)))
        finish_claim(thief, stolen[0], TrialState.COMPLETE, 8.0, outcome="complete")

    helper = threading.Thread(target=finish_for_the_thief)
    helper.start()
    assert work(study, lambda trial: way(trial, steal)) == 0
    helper.join()
    assert (states(study), trials(study)[0].value) == (["COMPLETE"], 8.0)
    assert failures(study) == [(1, "lease_lost", "drop")]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_on_the_way_out_of_an_outage_fails_nothing(
    way: Callable[..., float], make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1, recovery={"outage_patience": "1s"})

    def refused(*arguments: object, **settings: object) -> Any:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))

    def objective(trial: LeasedTrial) -> float:
        return way(trial, lambda: wait_for(lambda: trial.client.must_end(trial.lease)))

    with monkeypatch.context() as patched:
        for name in ("report", "renew_all"):
            patched.setattr(Ledger, name, refused)
        with pytest.raises(StorageError, match="the storage has failed for 1 s"):
            work(study, objective)
    assert (states(study), failures(study)) == (["RUNNING"], [])
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study, one) == 0
    assert states(study) == ["COMPLETE"]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_on_the_way_out_leaves_a_trial_ended(way: Callable[..., float], make_study: MakeStudy) -> None:
    """An error on the way out of a trial that a person ended leaves it ended so."""
    study = make_study(trials=1)

    def objective(trial: LeasedTrial) -> float:
        def stop() -> None:
            assert not control.stop_trial(study, 0)
            wait_for(lambda: trial.client.must_end(trial.lease))

        return way(trial, stop)

    assert work(study, objective) == 0
    assert (states(study), trials(study)[0].value, outcomes(study)) == (["PRUNED"], 0.25, ["stopped"])
    assert failures(study) == []


@pytest.mark.parametrize("way", WAYS)
def test_an_error_on_the_way_out_is_a_time_limit(way: Callable[..., float], make_study: MakeStudy) -> None:
    """An error on the way out of a trial whose time is up is a time limit."""
    study = make_study(trials=1, budget={"trials": 1, "trial_timeout": "1h"})

    def objective(trial: LeasedTrial) -> float:
        def let_an_hour_pass() -> None:
            trial.lease.seconds_left = -1.0

        return way(trial, let_an_hour_pass)

    assert work(study, objective) == 0
    assert (states(study), trials(study)[0].value) == (["PRUNED"], 0.25)
    assert failures(study) == [(1, "time_limit", "prune")]


def test_pruned_said_to_whatever_passes_ends_no_parked_trial(make_study: MakeStudy) -> None:
    """An objective that says pruned to whatever passes does not end a parked trial."""
    study = make_study(trials=1)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        try:
            trial.report(0.5, 1)
            stopping.request()
            trial.report(0.25, 2)
        except BaseException:
            raise optuna.TrialPruned  # noqa: B904  (as the Signal is the context, it can be told)
        return 1.0

    assert work(study, objective, stopping) == 143
    assert states(study) == ["RUNNING"]


def test_an_error_after_a_swallowed_signal_is_the_objective_s(make_study: MakeStudy) -> None:
    """An error of its own after a signal was swallowed is the objective's."""
    study = make_study(trials=1)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        stopping.request()
        with contextlib.suppress(BaseException):
            trial.should_prune()
        raise ValueError("of its own")

    assert work(study, objective, stopping) == 143
    assert (states(study), failures(study)) == (["FAIL"], [(1, "exception", "fail")])


def test_a_result_in_spite_of_a_signal_is_a_result(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        stopping.request()
        with contextlib.suppress(BaseException):
            trial.should_prune()
        return 1.0

    assert work(study, objective, stopping) == 143
    assert (states(study), trials(study)[0].value) == (["COMPLETE"], 1.0)


@pytest.mark.parametrize("code", [0, 1, "a word", None])
def test_a_system_exit_of_any_code_is_the_end_of_its_trial_alone(code: object, make_study: MakeStudy) -> None:
    study = make_study(trials=2)

    def objective(trial: LeasedTrial) -> float:
        if trial.number == 0:
            sys.exit(code)
        return 1.0

    assert work(study, objective) == 0
    assert states(study) == ["FAIL", "COMPLETE"]
    assert failures(study) == [(1, "exception", "fail")]


@pytest.mark.both
@pytest.mark.parametrize("step", [2**40, 2**31 - 1, -1, 2**70])
def test_a_step_that_no_column_holds_is_the_objective_s_error(step: int, make_study: MakeStudy) -> None:
    study = make_study(trials=2)

    def objective(trial: LeasedTrial) -> float:
        if trial.number == 0:
            trial.report(1.0, step)
        trial.report(1.0, 2**31 - 2)
        return 1.0

    assert work(study, objective) == 0
    assert states(study) == ["FAIL", "COMPLETE"]
    assert failures(study) == [(1, "exception", "fail")]
    assert "ValueError: report: step" in (rows(study)[0].reason or "")
    assert trials(study)[1].intermediate_values == {2**31 - 2: 1.0}


@pytest.mark.parametrize("step", [float("nan"), float("inf"), "one", None])
def test_a_step_that_is_no_number_is_the_objective_s_error(step: Any, make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: LeasedTrial) -> float:
        trial.report(1.0, step)
        return 1.0

    assert work(study, objective) == 0
    assert failures(study) == [(1, "exception", "fail")]


# --- study.stop() -----------------------------------------------------------------------------------------------------


def test_a_resumed_study_is_not_stopped_again(make_study: MakeStudy) -> None:
    """A stop by an objective is not passed on again after a person resumed the study."""
    study = make_study(trials=4)
    other = study.ledger("other")
    held = claim_one(other)  # trial 0: while it is open, our worker waits instead of leaving
    assert isinstance(held, Claim)

    def resume_when_stopped() -> None:
        wait_for(lambda: join_study(study.storage, study.name).stop_reason is not None)
        wait_for(lambda: states(study)[1:] == ["COMPLETE"])
        control.resume(study)
        finish_claim(other, held, TrialState.COMPLETE, 1.0, outcome="complete")

    def objective(trial: LeasedTrial) -> float:
        if trial.number == 1:
            trial.study.stop()
        return 1.0

    person = threading.Thread(target=resume_when_stopped)
    person.start()
    assert work(study, objective) == 0
    person.join()
    assert states(study) == ["COMPLETE"] * 4
    assert join_study(study.storage, study.name).stop_reason is None


@pytest.mark.parametrize("end", ["complete", "pruned", "fail", "retry"])
def test_a_stop_by_an_objective_stands_however_its_trial_ends(end: str, make_study: MakeStudy) -> None:
    study = make_study(trials=4, failures={"exception": {"retries": 1 if end == "retry" else 0}})

    def objective(trial: LeasedTrial) -> float:
        if trial.lease.claim.attempt == 1:
            trial.study.stop()
            if end == "pruned":
                raise optuna.TrialPruned
            if end in ("fail", "retry"):
                raise ValueError(end)
        return 1.0

    assert work(study, objective) == 0
    assert len(trials(study)) == 1
    assert "study.stop()" in (join_study(study.storage, study.name).stop_reason or "")


def test_a_stop_by_an_objective_that_parks_stands(make_study: MakeStudy) -> None:
    study = make_study(trials=4)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        trial.study.stop()
        stopping.request()
        trial.should_prune()
        return 1.0

    assert work(study, objective, stopping) == 143
    assert work(study, one) == 0
    assert states(study) == ["COMPLETE"]


# --- answers that were lost -------------------------------------------------------------------------------------------


def lose_answers(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, times: int = 1) -> list[object]:
    """Let a call do its work and then fail, as when the connection is cut between a commit and its answer."""
    real, answers = getattr(owner, name), []

    def unheard(*arguments: Any, **settings: Any) -> object:
        answers.append(real(*arguments, **settings))
        if len(answers) <= times:
            raise sa.exc.OperationalError("COMMIT", {}, Exception("the server closed the connection"))
        return answers[-1]

    monkeypatch.setattr(owner, name, unheard)
    return answers


class HasClaim:
    """Counts how often each trial's end is told to its sampler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[tuple[int, str]] = []
        ends = self.ends

        class Noting(optuna.samplers.RandomSampler):
            def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: object) -> None:
                ends.append((trial.number, state.name))

        monkeypatch.setitem(samplers.SAMPLERS, "random", lambda draw: Noting(seed=draw.trial_seed))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> HasClaim:
    return HasClaim(monkeypatch)


@pytest.mark.both
@pytest.mark.parametrize("times", [1, 2])
def test_a_finish_whose_answer_was_lost_settles_once(
    times: int, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: HasClaim
) -> None:
    study = make_study(trials=2)
    answers = lose_answers(monkeypatch, Ledger, "finish_all", times=times)
    assert work(study, lambda trial: float(trial.number)) == 0
    assert len(answers) == 2 + times
    assert [(trial.state.name, trial.value) for trial in trials(study)] == [("COMPLETE", 0.0), ("COMPLETE", 1.0)]
    assert failures(study) == []
    assert told.ends == [(0, "COMPLETE"), (1, "COMPLETE")]


def test_a_pruning_whose_answer_was_lost_settles_once(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: HasClaim
) -> None:
    study = make_study(trials=1)
    lose_answers(monkeypatch, Ledger, "finish_all")

    def objective(trial: LeasedTrial) -> float:
        trial.report(0.5, 1)
        raise optuna.TrialPruned("enough")

    assert work(study, objective) == 0
    assert (states(study), trials(study)[0].value, outcomes(study)) == (["PRUNED"], 0.5, ["pruned"])
    assert (failures(study), told.ends) == ([], [(0, "PRUNED")])


@pytest.mark.parametrize(("then", "state"), [("fail", "FAIL"), ("prune", "PRUNED")])
def test_a_failure_whose_answer_was_lost_is_written_once(
    then: str, state: str, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: HasClaim
) -> None:
    """A failure whose answer was lost is written once and the sampler is told of the last."""
    study = make_study(trials=2, failures={"exception": {"retries": 1, "then": then}})
    answers = lose_answers(monkeypatch, Ledger, "fail", times=1)

    def objective(trial: LeasedTrial) -> float:
        if trial.number == 0:
            answers.clear()  # so that each attempt's answer is lost
            raise ValueError("no")
        return 1.0

    assert work(study, objective) == 0
    assert states(study) == [state, "COMPLETE"]
    assert failures(study) == [(1, "exception", "retry"), (2, "exception", then)]
    assert told.ends == [(0, state), (1, "COMPLETE")]
    with study.storage.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_studies.c.streak)).scalar_one() == 0


def test_a_failure_whose_answer_was_lost_counts_once_in_a_row(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=2, failures={"in_a_row": 3})
    lose_answers(monkeypatch, Ledger, "fail")

    def objective(trial: LeasedTrial) -> float:
        raise ValueError("no")

    assert work(study, objective) == 0
    assert states(study) == ["FAIL", "FAIL"]
    with study.storage.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_studies.c.streak)).scalar_one() == 2


def test_a_stop_whose_answer_was_lost_ends_its_trial_once(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1)
    lose_answers(monkeypatch, Ledger, "end_as_stopped")

    def objective(trial: LeasedTrial) -> float:
        trial.report(0.5, 1)
        assert not control.stop_trial(study, 0)
        wait_for(lambda: trial.client.must_end(trial.lease))
        trial.should_prune()
        return 1.0

    assert work(study, objective) == 0
    assert (states(study), outcomes(study), failures(study)) == (["PRUNED"], ["stopped"], [])


def test_a_parking_whose_answer_was_lost_parks(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=1)
    stopping = StopSignal()
    lose_answers(monkeypatch, Ledger, "park")

    def objective(trial: LeasedTrial) -> float:
        stopping.request()
        trial.should_prune()
        return 1.0

    assert work(study, objective, stopping) == 143
    assert (states(study), rows(study)[0].lease_until, failures(study)) == (["RUNNING"], None, [])


@pytest.mark.both
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("whose", ["new", "queued", "parked"])
def test_a_claim_whose_answer_was_lost_costs_nothing(
    whose: str, times: int, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim whose answer was lost ends with every trial finished once."""
    study = make_study(trials=3)
    if whose == "queued":
        study.optuna.enqueue_trial({"x": 0.5})
    if whose == "parked":
        ledger = study.ledger("before")
        claim = claim_one(ledger)
        assert isinstance(claim, Claim)
        ledger.park(claim)
    begun: list[int] = []

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        return trial.suggest_float("x", 0, 1)

    with monkeypatch.context() as patched:
        lose_answers(patched, claiming, "claim_many", times=times)
        assert work(study, objective) == 0
    assert begun == [0, 1, 2]
    assert states(study) == ["COMPLETE"] * 3
    assert [row.attempt for row in rows(study)] == [1 + times + (whose == "parked"), 1, 1]
    assert failures(study) == []
    assert whose != "queued" or trials(study)[0].params == {"x": 0.5}


def test_a_grid_point_is_not_lost_with_a_claim_s_answer(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=9, sampler={"name": "grid", "search_space": {"x": [1, 2, 3]}})
    with monkeypatch.context() as patched:
        lose_answers(patched, claiming, "claim_many")
        assert work(study, lambda trial: trial.suggest_int("x", 1, 3)) == 0
    assert sorted(trial.params["x"] for trial in trials(study)) == [1, 2, 3]


def test_a_trial_taken_up_after_a_lost_answer_stays_there(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that another worker took up after a lost answer is not taken from it."""
    study = make_study(trials=1, failures={"exception": {"retries": 1}})
    fail, taken = Ledger.fail, []

    def unheard(ledger: Ledger, *arguments: Any, **settings: Any) -> object:
        verdict = fail(ledger, *arguments, **settings)
        if not taken:
            taken.append(claim_one(study.ledger("other")))  # the trial was parked for another attempt
            control.stop(study)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("the server closed the connection"))
        return verdict

    def objective(trial: LeasedTrial) -> float:
        raise ValueError("no")

    def finish_for_the_other() -> None:
        wait_for(lambda: bool(taken))
        time.sleep(0.5)
        finish_claim(study.ledger("other"), taken[0], TrialState.COMPLETE, 8.0, outcome="complete")

    monkeypatch.setattr(Ledger, "fail", unheard)
    helper = threading.Thread(target=finish_for_the_other)
    helper.start()
    assert work(study, objective) == 0
    helper.join()
    assert (states(study), trials(study)[0].value) == (["COMPLETE"], 8.0)
    assert failures(study) == [(1, "exception", "retry")]


# --- a second signal --------------------------------------------------------------------------------------------------

WORKER = """
import sys, time
from hpo.worker.signals import StopSignal

stopping = StopSignal.installed(grace=600, is_supervised=True)
print("ready", flush=True)
while not stopping():
    time.sleep(0.01)
print("asked", flush=True)
sys.stdin.readline()
sys.exit(stopping.exit_code)
"""


@pytest.fixture
def of_a_fleet() -> Iterator[subprocess.Popen[str]]:
    """A process that is asked to stop by a parent, and takes its time."""
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_does_not_end_a_worker_of_a_fleet(
    second: signal.Signals, of_a_fleet: subprocess.Popen[str]
) -> None:
    """A second signal does not end a process whose parent passes signals on."""
    assert of_a_fleet.stdout is not None
    of_a_fleet.send_signal(signal.SIGTERM)
    assert of_a_fleet.stdout.readline() == "asked\n"
    for _ in range(3):
        time.sleep(0.2)  # too far apart to be one request
        of_a_fleet.send_signal(second)
    time.sleep(0.3)
    assert of_a_fleet.poll() is None
    of_a_fleet.communicate("that is all\n", timeout=PATIENCE)
    assert of_a_fleet.returncode == 143  # by the first


def test_an_orphan_s_heartbeat_asks_as_a_first_signal_does(make_study: MakeStudy) -> None:
    stopping = StopSignal()
    with Heartbeat(client_of(make_study().ledger("w")), parent=-1, leave=stopping.request):
        assert stopping.exit_code == 143
