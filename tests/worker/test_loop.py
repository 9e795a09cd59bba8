"""The worker's loop and the trial it hands to an objective: what is written for each way a trial can end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import warnings
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StorageError
from hpo.queue import reaper
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.storage import sql
from hpo.storage.tables import hpo_trials
from hpo.strategy import samplers
from hpo.study.study import Study
from hpo.study.study import join as join_study
from hpo.study.trial_history import history
from hpo.view.pages import history_text
from hpo.worker import loop
from hpo.worker.attempt import open_trial
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.trials import MakeStudy, claim_one, end_trial, finish_claim, held
from tests.support.user_loops import trials, work


def outcomes(study: Study) -> list[tuple[str, str | None]]:
    with study.storage.engine.connect() as connection:
        rows = connection.execute(
            sa.select(hpo_trials.c.outcome, hpo_trials.c.reason)
            .where(hpo_trials.c.study_uid == study.uid)
            .order_by(hpo_trials.c.trial_id)
        )
        return [(outcome, reason) for outcome, reason in rows]


def test_an_unchanged_optuna_objective_runs_to_the_budget(make_study: MakeStudy) -> None:
    study = make_study(trials=4)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        trial.set_user_attr("doubled", 2 * x)
        return x * x

    assert work(study, objective) == 0
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE] * 4
    assert [trial.value for trial in trials(study)] == [trial.params["x"] ** 2 for trial in trials(study)]
    assert [trial.user_attrs["doubled"] for trial in trials(study)] == [2 * t.params["x"] for t in trials(study)]


def test_an_exception_fails_its_trial_alone(make_study: MakeStudy) -> None:
    """An exception fails its trial with the traceback and the worker goes on."""
    study = make_study(trials=3)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            raise ZeroDivisionError("in user code")
        return 1.0

    work(study, objective)
    assert [trial.state.name for trial in trials(study)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert outcomes(study)[1][0] == "exception"
    assert "ZeroDivisionError: in user code" in (outcomes(study)[1][1] or "")


def test_a_system_exit_fails_the_trial(make_study: MakeStudy) -> None:
    """A system exit in an objective fails the trial and leaves no zombie."""
    study = make_study(trials=2)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            raise SystemExit(3)
        return 1.0

    assert work(study, objective) == 0
    assert [trial.state.name for trial in trials(study)] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("returned", [None, "a word", (1.0, 2.0), []])
def test_what_is_no_number_never_becomes_a_value(make_study: MakeStudy, returned: Any) -> None:
    study = make_study(trials=1)
    work(study, lambda trial: returned)
    (trial,) = trials(study)
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    assert "the objective returned" in (outcomes(study)[0][1] or "")


@pytest.mark.parametrize("returned", [math.inf, -math.inf, math.nan, "inf"])
@pytest.mark.parametrize("reported", [[], [3.0, 2.0], [3.0, math.inf]])
def test_a_number_that_is_not_finite_is_pruned_as_diverged_with_the_last_finite_report(
    make_study: MakeStudy, returned: Any, reported: list[float]
) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> Any:
        for step, value in enumerate(reported, start=1):
            trial.report(value, step)
        return returned

    work(study, objective)
    (trial,) = trials(study)
    finite = [value for value in reported if math.isfinite(value)]
    assert (trial.state, trial.value) == (TrialState.PRUNED, finite[-1] if finite else None)
    assert outcomes(study)[0][0] == "diverged"


def test_a_number_in_a_string_is_a_number(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    work(study, lambda trial: "1.5")
    assert trials(study)[0].value == 1.5


def test_a_pruned_trial_keeps_its_last_reported_value(make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        trial.report(3.0, 1)
        trial.report(2.0, 2)
        raise optuna.TrialPruned("enough")

    work(study, objective)
    (trial,) = trials(study)
    assert (trial.state, trial.value) == (TrialState.PRUNED, 2.0)
    assert outcomes(study) == [("pruned", "enough")]


def test_pruning_with_no_report_or_with_nan_leaves_no_value(make_study: MakeStudy) -> None:
    study = make_study(trials=2)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            trial.report(math.nan, 1)
        raise optuna.TrialPruned

    work(study, objective)
    assert [(trial.state.name, trial.value) for trial in trials(study)] == [("PRUNED", None)] * 2
    assert outcomes(study) == [("pruned", "the objective raised TrialPruned without the pruner's word")] * 2


@pytest.mark.both
def test_the_pruner_of_the_study_decides_on_the_reported_curve(make_study: MakeStudy) -> None:
    study = make_study(trials=6, pruner={"name": "median", "n_startup_trials": 3, "n_min_trials": 1})

    def objective(trial: optuna.Trial) -> float:
        for step in (1, 2, 3):
            trial.report(10.0 * trial.number + step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 10.0 * trial.number

    work(join_study(study.storage, study.name), objective)
    assert [trial.state.name for trial in trials(study)] == ["COMPLETE"] * 3 + ["PRUNED"] * 3
    assert [len(trial.intermediate_values) for trial in trials(study)] == [3, 3, 3, 1, 1, 1]
    assert [reason for _, reason in outcomes(study)] == [None] * 3 + [
        f"by the pruner median at step 1, with {value}.0000" for value in (31, 41, 51)
    ]
    assert "reason   by the pruner median at step 1, with 31.0000" in history_text(history(study, 3)).splitlines()


def test_steps_are_stored_as_they_are_reported(make_study: MakeStudy) -> None:
    study = make_study(trials=2)

    def objective(trial: optuna.Trial) -> float:
        for step in range(trial.number, 3):
            trial.report(float(step), step)
        return 0.0

    work(study, objective)
    assert [trial.intermediate_values for trial in trials(study)] == [{0: 0.0, 1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}]


def test_a_step_reported_again_is_ignored_with_a_warning_as_in_optuna(make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        trial.report(1.0, 1)
        with pytest.warns(UserWarning, match="step 1 was reported already"):
            trial.report(9.0, 1)
        return 0.0

    work(study, objective)
    assert trials(study)[0].intermediate_values == {1: 1.0}


@pytest.mark.parametrize(
    ("rule", "reported", "value"),
    [
        ("last", {1: 3.0, 2: 1.0, 3: 2.0}, 2.0),
        ("best", {1: 3.0, 2: 1.0, 3: 1.0}, 1.0),
        ("mean of last 2", {1: 3.0, 2: 2.0, 3: 1.5}, 1.5),
        (None, {1: 3.0, 2: 1.0, 3: 2.0}, 7.0),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_one_rule_makes_every_value(
    make_study: MakeStudy, rule: str | None, reported: dict[int, float], value: float, pruned: bool
) -> None:
    """One rule makes what is reported and the final and the pruned value."""
    study = make_study(trials=1, **({"value": rule} if rule else {}))

    def objective(trial: optuna.Trial) -> float:
        for step, loss in enumerate((3.0, 1.0, 2.0), start=1):
            trial.report(loss, step)
        if pruned:
            raise optuna.TrialPruned
        return 7.0

    work(study, objective)
    (trial,) = trials(study)
    assert trial.intermediate_values == reported
    assert trial.value == (reported[3] if pruned else value)


def test_a_worker_asked_to_stop_parks_and_leaves(make_study: MakeStudy) -> None:
    """A worker that is asked to stop parks its trial and leaves with the signal."""
    study = make_study(trials=2)
    stopping = StopSignal()

    def objective(trial: optuna.Trial) -> float:
        trial.report(1.0, 1)
        stopping.request()
        try:
            trial.should_prune()
        except Exception:
            pytest.fail("parking must pass an objective's own except clause")
        return 0.0

    assert work(study, objective, stopping) == 143
    assert [trial.state for trial in trials(study)] == [TrialState.RUNNING]
    attempts = []

    def second(trial: LeasedTrial) -> float:
        attempts.append((trial.number, trial.lease.claim.attempt))
        assert trials(study)[0].intermediate_values == {}
        return 5.0

    assert work(study, second) == 0
    assert attempts == [(0, 2), (1, 1)]
    assert [trial.value for trial in trials(study)] == [5.0, 5.0]


@pytest.mark.both
def test_a_trial_taken_meanwhile_is_dropped(make_study: MakeStudy) -> None:
    """A trial that was taken meanwhile is dropped and the worker goes on."""
    study = make_study(trials=2)
    thief = study.ledger("thief")
    stolen = []

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0 and not stolen:
            with sql.writing(study.storage.engine) as connection:
                connection.execute(hpo_trials.update().values(lease_until=0.0))
                reaper.reap(connection, thief)
            stolen.append(claim_one(thief))
            trial.report(1.0, 1)
            pytest.fail("a report under a lost lease must end the trial")
        if len(stolen) == 1:  # now our worker has the second trial: the thief ends the first one
            finish_claim(thief, stolen[0], TrialState.COMPLETE, 8.0, outcome="complete")
            stolen.append(None)
        return 2.0

    assert work(study, objective) == 0
    assert [trial.value for trial in trials(study)] == [8.0, 2.0]


def test_an_objective_may_stop_the_study(make_study: MakeStudy) -> None:
    study = make_study(trials=10)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            trial.study.stop()
        return 1.0

    assert work(study, objective) == 0
    assert len(trials(study)) == 3
    assert claim_one(study.ledger("other")) is Idle.DONE
    assert "study.stop()" in (join_study(study.storage, study.name).stop_reason or "")


def test_an_idle_worker_claims_again_within_a_tenth_of_its_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy one claims less and less often, since each claim takes the study's lock. Both pause 2 s at most."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def pauses(*, is_busy: bool) -> list[float]:
        nonlocal now
        pause, found = loop.Pause(), []
        for _ in range(40):
            assert pause.is_over
            pause.begin(is_busy=is_busy)
            assert not pause.is_over
            found.append(pause._until - now)
            now = pause._until
        return found

    idle, busy = pauses(is_busy=False), pauses(is_busy=True)
    for number, seconds in enumerate(idle):
        assert seconds == pytest.approx(min(0.22 + 0.1 * sum(idle[:number]), 2.0))
    assert busy[:3] == pytest.approx([0.3, 0.45, 0.675])
    assert busy[-1] == idle[-1] == pytest.approx(2.0)


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_an_objective_raises_is_the_end_of_its_trial_alone(
    make_study: MakeStudy, error: type[BaseException]
) -> None:
    study = make_study(trials=2)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            raise error
        return 1.0

    assert work(study, objective) == 0
    assert [trial.state.name for trial in trials(study)] == ["FAIL", "COMPLETE"]


def test_a_queued_trial_beside_a_grid(make_study: MakeStudy) -> None:
    """A queued trial beside a grid ends neither the worker nor the grid."""
    study = make_study(trials=50, sampler={"name": "grid", "search_space": {"x": [1, 2, 3]}})
    study.optuna.enqueue_trial({"x": 9})

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_int("x", 1, 9)

    assert work(study, objective) == 0
    assert sorted(trial.params["x"] for trial in trials(study)) == [1, 2, 3, 9]
    assert claim_one(study.ledger("other")) is Idle.DONE


def test_a_grid_point_of_another_worker_is_waited_for(make_study: MakeStudy) -> None:
    """A grid point that another worker runs is waited for and not run twice."""
    study = make_study(trials=50, sampler={"name": "grid", "search_space": {"x": [1, 2]}})
    slow, quick = study.ledger("slow"), study.ledger("quick")
    claims = [claim_one(slow), claim_one(quick)]
    assert claim_one(quick) is Idle.WAIT  # both points are dealt out, if not drawn yet
    for claim, ledger in zip(claims, (slow, quick), strict=True):
        assert isinstance(claim, Claim)
        study.optuna.sampler = samplers.build(study.spec, claim.number)
        study.optuna.get_trials(deepcopy=False)
        open_trial(study, *held(ledger, claim)).suggest_int("x", 1, 2)
    assert claim_one(quick) is Idle.WAIT
    for claim, ledger in zip(claims, (slow, quick), strict=True):
        assert isinstance(claim, Claim)
        finish_claim(ledger, claim, TrialState.COMPLETE, 1.0, outcome="complete")
    assert claim_one(quick) is Idle.DONE  # though nobody told the study to stop
    assert join_study(study.storage, study.name).stop_reason == "every point of the grid was tried"
    assert sorted(trial.params["x"] for trial in trials(study)) == [1, 2]


def test_a_sampler_that_fails_before_a_trial_fails_that_trial(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=2)

    class Broken(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if trial.number == 0:
                raise RuntimeError("a sampler's bug")

        def after_trial(self, *arguments: object) -> None:
            raise RuntimeError("another one")

    monkeypatch.setitem(samplers.SAMPLERS, "random", lambda draw: Broken(seed=draw.trial_seed))
    assert work(study, lambda trial: trial.suggest_float("x", 0, 1)) == 0
    assert [trial.state.name for trial in trials(study)] == ["FAIL", "COMPLETE"]
    assert "a sampler's bug" in (outcomes(study)[0][1] or "")


def test_qmc_gives_no_point_twice_to_workers_that_ask_at_once(make_study: MakeStudy) -> None:
    study = make_study(trials=12, sampler={"name": "qmc"})
    ledger = study.ledger("w")
    drawn = []
    for start in range(0, 12, 4):
        claims = [claim_one(ledger) for _ in range(4)]
        opened = []
        for claim in claims:
            assert isinstance(claim, Claim)
            study.optuna.sampler = samplers.build(study.spec, claim.number)
            study.optuna.get_trials(deepcopy=False)
            opened.append(open_trial(study, *held(ledger, claim)))
            drawn.append((opened[-1].suggest_float("x", 0, 1), opened[-1].suggest_float("y", 0, 1)))
        for trial in opened:
            end_trial(trial, TrialState.COMPLETE, float(start))
    assert len(set(drawn)) == 12


def test_a_storage_error_under_a_report_is_not_the_trial_s_failure(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1, recovery={"outage_patience": "1s"})

    def broken(*arguments: object, **settings: object) -> object:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))

    def objective(trial: optuna.Trial) -> float:
        with contextlib.suppress(Exception):
            trial.report(1.0, 1)
        pytest.fail("an outage must end the trial")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", broken)
        with pytest.raises(StorageError, match="the server closed the connection"):
            work(study, objective)
    assert [trial.state for trial in trials(study)] == [TrialState.RUNNING]


def test_a_grid_runs_every_point_once_and_ends_the_study(make_study: MakeStudy) -> None:
    grid = {"x": [1, 2, 3], "kind": ["a", "b"]}
    study = make_study(trials=50, sampler={"name": "grid", "search_space": grid})

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_int("x", 1, 3) + len(trial.suggest_categorical("kind", ["a", "b"]))

    assert work(study, objective) == 0
    points = [(trial.params["x"], trial.params["kind"]) for trial in trials(study)]
    assert sorted(points) == [(x, kind) for x in (1, 2, 3) for kind in ("a", "b")]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes", "qmc"])
def test_every_sampler_gets_to_see_the_results_it_is_told(make_study: MakeStudy, sampler: str) -> None:
    study = make_study(trials=16, sampler={"name": sampler})

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_float("y", -1, 1) ** 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        assert work(study, objective) == 0
    points = [(trial.params["x"], trial.params["y"]) for trial in trials(study)]
    assert len(set(points)) == 16


def test_the_same_seed_and_history_give_the_same_suggestions(make_study: MakeStudy) -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", -1, 1) ** 2

    one, other = (
        make_study(trials=14, sampler={"name": "tpe"}),
        make_study(trials=14, name="b", sampler={"name": "tpe"}),
    )
    for study in (one, other):
        work(study, objective)
    assert [trial.params for trial in trials(one)] == [trial.params for trial in trials(other)]
    third = make_study(trials=14, name="c", seed=1, sampler={"name": "tpe"})
    work(third, objective)
    assert [trial.params for trial in trials(one)] != [trial.params for trial in trials(third)]


@pytest.mark.parametrize("sampler", [{"name": "tpe"}, {"name": "cmaes"}])  # nsga2 keeps ids of trials in the study
def test_a_worker_s_suggestions_are_optuna_s(make_study: MakeStudy, sampler: dict[str, Any]) -> None:
    """A worker's suggestions are those that Optuna makes of the same history."""
    study = make_study(trials=30, sampler=sampler)

    def drawn(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", -10, 10) ** 2 + trial.suggest_float("y", -10, 10) ** 2

    work(study, drawn)
    made = trials(study)
    for number in (5, 12, 20, 29):
        plain = optuna.create_study(study_name=study.name)
        plain.add_trials(made[:number])
        plain.sampler = samplers.build(study.spec, number)
        trial = plain.ask()
        drawn(trial)
        assert trial.params == made[number].params, number


def test_a_crash_of_the_worker_counts_for_the_trial_at_hand(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ledger: Ledger, ends: object) -> None:
        raise RuntimeError("can't start new thread")

    study = make_study(trials=1)
    monkeypatch.setattr(Ledger, "finish_all", broken)
    with pytest.raises(RuntimeError, match="new thread"):
        work(study, lambda trial: 0.5)
    assert reaper.fail_leases_of(study.ledger("w"), "w", "its worker died") == 1  # it still holds the lease
