"""Answers of the storage that are lost after its work was done: each trial still ends once."""

from __future__ import annotations

import threading
import time
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.queue import claiming
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.storage.tables import hpo_studies
from hpo.strategy import samplers
from hpo.study import control
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.rows import outcomes, recorded_failures, rows, states
from tests.support.trials import MakeStudy, claim_one, finish_claim
from tests.support.user_loops import trials, work
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


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


class ToldEnds:
    """Counts how often each trial's end is told to its sampler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[tuple[int, str]] = []
        ends = self.ends

        class Noting(optuna.samplers.RandomSampler):
            def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: object) -> None:
                ends.append((trial.number, state.name))

        monkeypatch.setitem(samplers.SAMPLERS, "random", lambda draw: Noting(seed=draw.trial_seed))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> ToldEnds:
    return ToldEnds(monkeypatch)


@pytest.mark.both
@pytest.mark.parametrize("times", [1, 2])
def test_a_finish_whose_answer_was_lost_settles_once(
    times: int, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: ToldEnds
) -> None:
    study = make_study(trials=2)
    answers = lose_answers(monkeypatch, Ledger, "finish_all", times=times)
    assert work(study, lambda trial: float(trial.number)) == 0
    assert len(answers) == 2 + times
    assert [(trial.state.name, trial.value) for trial in trials(study)] == [("COMPLETE", 0.0), ("COMPLETE", 1.0)]
    assert recorded_failures(study) == []
    assert told.ends == [(0, "COMPLETE"), (1, "COMPLETE")]


def test_a_pruning_whose_answer_was_lost_settles_once(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: ToldEnds
) -> None:
    study = make_study(trials=1)
    lose_answers(monkeypatch, Ledger, "finish_all")

    def objective(trial: LeasedTrial) -> float:
        trial.report(0.5, 1)
        raise optuna.TrialPruned("enough")

    assert work(study, objective) == 0
    assert (states(study), trials(study)[0].value, outcomes(study)) == (["PRUNED"], 0.5, ["pruned"])
    assert (recorded_failures(study), told.ends) == ([], [(0, "PRUNED")])


@pytest.mark.parametrize(("then", "state"), [("fail", "FAIL"), ("prune", "PRUNED")])
def test_a_failure_whose_answer_was_lost_is_written_once(
    then: str, state: str, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, told: ToldEnds
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
    assert recorded_failures(study) == [(1, "exception", "retry"), (2, "exception", then)]
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
    assert (states(study), outcomes(study), recorded_failures(study)) == (["PRUNED"], ["stopped"], [])


def test_a_parking_whose_answer_was_lost_parks(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=1)
    stopping = StopSignal()
    lose_answers(monkeypatch, Ledger, "park")

    def objective(trial: LeasedTrial) -> float:
        stopping.request()
        trial.should_prune()
        return 1.0

    assert work(study, objective, stopping) == 143
    assert (states(study), rows(study)[0].lease_until, recorded_failures(study)) == (["RUNNING"], None, [])


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
    assert recorded_failures(study) == []
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
    assert recorded_failures(study) == [(1, "exception", "retry")]
