"""Objectives that misbehave as they let go, and steps that are none."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.study import control
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.rows import outcomes, recorded_failures, rows, states
from tests.support.trials import MakeStudy, claim_one, finish_claim
from tests.support.user_loops import one, trials, work
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


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
    assert (rows(study)[0].lease_until, recorded_failures(study)) == (None, [])
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
        wait_for(lambda: bool(recorded_failures(study)))
        finish_claim(thief, stolen[0], TrialState.COMPLETE, 8.0, outcome="complete")

    helper = threading.Thread(target=finish_for_the_thief)
    helper.start()
    assert work(study, lambda trial: way(trial, steal)) == 0
    helper.join()
    assert (states(study), trials(study)[0].value) == (["COMPLETE"], 8.0)
    assert recorded_failures(study) == [(1, "lease_lost", "drop")]


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
    assert (states(study), recorded_failures(study)) == (["RUNNING"], [])
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
    assert recorded_failures(study) == []


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
    assert recorded_failures(study) == [(1, "time_limit", "prune")]


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
    assert (states(study), recorded_failures(study)) == (["FAIL"], [(1, "exception", "fail")])


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
    assert recorded_failures(study) == [(1, "exception", "fail")]


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
    assert recorded_failures(study) == [(1, "exception", "fail")]
    assert "ValueError: report: step" in (rows(study)[0].reason or "")
    assert trials(study)[1].intermediate_values == {2**31 - 2: 1.0}


@pytest.mark.parametrize("step", [float("nan"), float("inf"), "one", None])
def test_a_step_that_is_no_number_is_the_objective_s_error(step: Any, make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: LeasedTrial) -> float:
        trial.report(1.0, step)
        return 1.0

    assert work(study, objective) == 0
    assert recorded_failures(study) == [(1, "exception", "fail")]
