"""What people order: each order takes hold at once, says how far it got, and refuses what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import reaper
from hpo.queue.claiming import Idle
from hpo.queue.models import Commands
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql
from hpo.storage.tables import Hold, hpo_studies, hpo_trials
from hpo.study import control
from hpo.study.study import Study
from tests.support.trials import MakeStudy, begin, claim_one, finish_claim, trial_of

pytestmark = pytest.mark.both  # each order locks rows of ours and of Optuna's

BY_HAND = "by `hpo stop`"
GO_ON = Commands(lost=False, stop=False, park=False)
ORDERS: dict[str, Callable[[Study], object]] = {
    "stop": control.stop,
    "stop --now": lambda study: control.stop(study, now=True),
    "stop --trial": lambda study: control.stop_trial(study, 0),
    "pause": control.pause,
    "resume": control.resume,
    "doctor --fail": lambda study: control.fail_foreign(study, 0),
}


def row_of(study: Study, number: int) -> Any:
    trial_id = trial_of(study, number)._trial_id
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials).where(hpo_trials.c.trial_id == trial_id)).one()


def standing(study: Study) -> tuple[str | None, str | None]:
    """Return what has stopped the study, and how it is held."""
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_studies).where(hpo_studies.c.uid == study.uid)).one()
        return row.stop_reason, row.hold


def parked(study: Study, *curve: float) -> None:
    ledger, claim, trial = begin(study)
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    ledger.park(claim)


def with_one_of_each(study: Study) -> None:
    """Give the study a trial in each state, numbered as below."""
    opened = [begin(study) for _ in range(3)]
    (_, _, running), (ledger, claim, _), (_, done, _) = opened
    running.report(0.5, 1)
    ledger.park(claim)
    finish_claim(ledger, done, TrialState.COMPLETE, 1.0, outcome="complete")
    study.optuna.ask()
    study.optuna.enqueue_trial({"x": 0.5})


RUNNING, PARKED, FINISHED, FOREIGN, QUEUED = range(5)


# --- stop -------------------------------------------------------------------------------------------------------------


def test_a_stopped_study_starts_nothing_and_finishes_what_is_open(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    assert control.stop(study) == 2
    assert standing(study) == (BY_HAND, None)
    assert [trial.state.name for trial in study.optuna.get_trials()] == [
        "RUNNING", "RUNNING", "COMPLETE", "RUNNING", "WAITING",
    ]  # fmt: skip
    assert not row_of(study, RUNNING).stop_requested
    ledger, claim, _ = begin(study)
    assert claim.number == PARKED
    finish_claim(ledger, claim, TrialState.COMPLETE, 1.0, outcome="complete")
    assert claim_one(ledger) is Idle.WAIT  # for the one that runs


def test_stopping_twice_keeps_the_first_reason(make_study: MakeStudy) -> None:
    study = make_study()
    study.ledger("w").stop("the sampler is done")
    assert control.stop(study) == 0
    assert standing(study) == ("the sampler is done", None)


def test_stopping_now_ends_what_is_parked_and_asks_what_runs(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    assert control.stop(study, now=True) == 1
    assert standing(study) == (BY_HAND, None)
    assert (row_of(study, PARKED).settled, row_of(study, PARKED).outcome) == (True, "stopped")
    running = row_of(study, RUNNING)
    assert (running.settled, running.stop_requested) == (False, True)
    assert running.lease_until is not None
    assert trial_of(study, FINISHED).state == TrialState.COMPLETE
    assert trial_of(study, FOREIGN).state == TrialState.RUNNING
    assert trial_of(study, QUEUED).state == TrialState.WAITING


@pytest.mark.parametrize(
    ("curve", "state", "value"),
    [
        ((0.5, 0.25), TrialState.PRUNED, 0.25),
        ((0.5, float("nan")), TrialState.PRUNED, 0.5),
        ((), TrialState.FAIL, None),
    ],
)
@pytest.mark.parametrize("order", ["stop --now", "stop --trial"])
def test_a_parked_trial_ends_with_the_value_it_has(
    order: str, curve: tuple[float, ...], state: TrialState, value: float | None, make_study: MakeStudy
) -> None:
    study = make_study()
    parked(study, *curve)
    ORDERS[order](study)
    trial = trial_of(study, 0)
    assert (trial.state, trial.value) == (state, value)
    assert trial.datetime_complete is not None
    row = row_of(study, 0)
    assert (row.settled, row.outcome, row.reason) == (True, "stopped", BY_HAND)


def test_a_running_trial_is_asked_and_hears_it(make_study: MakeStudy) -> None:
    study = make_study()
    ledger, claim, trial = begin(study)
    trial.report(0.5, 1)
    assert ledger.commands_of([claim])[claim] == GO_ON
    assert control.stop(study, now=True) == 1
    assert ledger.commands_of([claim])[claim] == Commands(lost=False, stop=True, park=False)
    trial.client.end_as_stopped(trial.lease)
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.PRUNED, 0.5)
    assert control.stop(study, now=True) == 0


@pytest.mark.parametrize("way", ["parks it", "leaves", "fails with a retry left"])
def test_a_trial_asked_to_end_ends_though_let_go(way: str, make_study: MakeStudy) -> None:
    """A running trial that was asked ends though its worker lets go before it hears it."""
    study = make_study()
    ledger, claim, trial = begin(study, "w")
    trial.report(0.5, 1)
    control.stop(study, now=True)
    if way == "parks it":
        ledger.park(claim)
    elif way == "leaves":
        reaper.release_leases_of(study.ledger("launcher"), "w")
    else:
        ledger.fail(claim, Failure(kind=Kind.DATA_ERROR, message="no such file"))
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.PRUNED, 0.5)  # nobody may come any more
    assert row_of(study, 0).outcome == "stopped"


def test_a_trial_whose_worker_is_gone_is_asked_like_one_that_runs(make_study: MakeStudy) -> None:
    study = make_study()
    claim_one(study.ledger("dead", lease_seconds=-1.0))
    assert control.stop(study, now=True) == 1
    assert row_of(study, 0).stop_requested


# --- one trial --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "ended", "state"),
    [
        (RUNNING, False, TrialState.RUNNING),
        (PARKED, True, TrialState.FAIL),
        (QUEUED, True, TrialState.FAIL),
    ],
    ids=["running", "parked", "queued"],
)
def test_one_trial_is_ended_or_asked_and_no_other(
    number: int, ended: bool, state: TrialState, make_study: MakeStudy
) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    before = study.optuna.get_trials()
    assert control.stop_trial(study, number) is ended
    after = study.optuna.get_trials()
    assert after[number].state == state
    assert (after[number].datetime_complete is not None) is ended
    assert [trial for trial in after if trial.number != number] == [t for t in before if t.number != number]
    assert standing(study) == (None, None)  # the study goes on
    assert row_of(study, RUNNING).stop_requested is (number == RUNNING)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (FINISHED, "trial 2 of study 'own' is complete already"),
        (
            FOREIGN,
            "trial 3 of study 'own' was started by another program than hpo; end that one, or `hpo doctor own --fail 3`",
        ),
        (99, "study 'own' has no trial 99; `hpo status own` lists those that run"),
    ],
    ids=["finished", "foreign", "unknown"],
)
def test_a_trial_that_cannot_be_stopped_is_told_and_nothing_is_written(
    number: int, message: str, make_study: MakeStudy
) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    before = study.optuna.get_trials()
    with pytest.raises(StudyError) as caught:
        control.stop_trial(study, number)
    assert str(caught.value) == message
    assert study.optuna.get_trials() == before


def test_a_trial_that_was_ended_elsewhere_is_finished_already(make_study: MakeStudy) -> None:
    study = make_study()
    begin(study)
    study.optuna.tell(0, state=TrialState.FAIL)
    with pytest.raises(StudyError, match="trial 0 of study 'own' is failed already"):
        control.stop_trial(study, 0)


def test_a_trial_is_one_of_the_study_named(make_study: MakeStudy) -> None:
    one, other = make_study(name="one"), make_study(name="other")
    parked(one)
    with pytest.raises(StudyError, match="study 'other' has no trial 0"):
        control.stop_trial(other, 0)
    assert trial_of(one, 0).state == TrialState.RUNNING


def test_a_queued_trial_that_was_stopped_is_never_run(make_study: MakeStudy) -> None:
    study = make_study()
    study.optuna.enqueue_trial({"x": 0.5})
    control.stop_trial(study, 0)
    assert begin(study)[1].number == 1


# --- pause and resume -------------------------------------------------------------------------------------------------


def test_what_runs_in_a_paused_study_is_to_be_parked(make_study: MakeStudy) -> None:
    study = make_study()
    ledger, claim, _ = begin(study)
    control.pause(study)
    control.pause(study)
    assert standing(study) == (None, Hold.PAUSED)
    assert ledger.commands_of([claim])[claim] == Commands(lost=False, stop=False, park=True)
    ledger.park(claim)
    assert claim_one(ledger) is Idle.WAIT
    assert trial_of(study, 0).state == TrialState.RUNNING


def test_resuming_takes_a_pause_back(make_study: MakeStudy) -> None:
    study = make_study()
    ledger, claim, _ = begin(study)
    control.pause(study)
    assert control.resume(study) == "paused"
    assert standing(study) == (None, None)
    assert ledger.commands_of([claim])[claim] == GO_ON
    assert control.resume(study) is None


def test_resuming_takes_a_stop_back_and_tells_its_reason(make_study: MakeStudy) -> None:
    study = make_study()
    control.stop(study)
    assert claim_one(study.ledger("w")) is Idle.DONE
    assert control.resume(study) == f"stopped: {BY_HAND}"
    assert begin(study)[1].number == 0


def break_it(study: Study) -> str:
    """Let a study break, and return its reason."""
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=Kind.EXCEPTION, message="boom"))
    return "1 trials in a row ended by exception, the last: boom"


def test_resuming_mends_a_broken_study_and_tells_what_broke_it(make_study: MakeStudy) -> None:
    study = make_study(failures={"in_a_row": 1})
    reason = break_it(study)
    assert standing(study) == (reason, Hold.BROKEN)
    assert control.resume(study) == f"stopped: {reason}"
    assert standing(study) == (None, None)


def test_a_pause_of_a_broken_study_is_refused_and_leaves_it_broken(make_study: MakeStudy) -> None:
    study = make_study(failures={"in_a_row": 1})
    reason = break_it(study)
    with pytest.raises(StudyError, match="study 'own' has stopped already: 1 trials in a row"):
        control.pause(study)
    assert standing(study) == (reason, Hold.BROKEN)


def hold_for_a_fork(study: Study) -> None:
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(hold=Hold.FORKING, stop_reason="a fork into it was cut off"))


def test_a_fork_that_was_cut_off_is_not_resumed(make_study: MakeStudy) -> None:
    study = make_study()
    hold_for_a_fork(study)
    with pytest.raises(StudyError, match="study 'own': a fork into it was cut off"):
        control.resume(study)
    with pytest.raises(StudyError, match="has stopped already: a fork into it was cut off"):
        control.pause(study)
    control.stop(study)
    assert standing(study) == ("a fork into it was cut off", Hold.FORKING)


# --- trials of others -------------------------------------------------------------------------------------------------


def test_a_running_trial_of_another_program_is_failed(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    before = study.optuna.get_trials()
    control.fail_foreign(study, FOREIGN)
    after = study.optuna.get_trials()
    assert after[FOREIGN].state == TrialState.FAIL
    assert after[FOREIGN].datetime_complete is not None
    assert [trial for trial in after if trial.number != FOREIGN] == [t for t in before if t.number != FOREIGN]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (RUNNING, "trial 0 of study 'own' is ours; `hpo stop own --trial 0`"),
        (PARKED, "trial 1 of study 'own' is ours; `hpo stop own --trial 1`"),
        (FINISHED, "trial 2 of study 'own' does not run: it is complete"),
        (QUEUED, "trial 4 of study 'own' does not run: it is queued"),
        (99, "study 'own' has no trial 99; `hpo status own` lists those that run"),
    ],
    ids=["running", "parked", "finished", "queued", "unknown"],
)
def test_what_is_ours_or_does_not_run_is_not_failed(number: int, message: str, make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with_one_of_each(study)
    before = study.optuna.get_trials()
    with pytest.raises(StudyError) as caught:
        control.fail_foreign(study, number)
    assert str(caught.value) == message
    assert study.optuna.get_trials() == before


# --- a study that is gone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("made_again", [False, True], ids=["gone", "made again"])
def test_no_order_reaches_a_deleted_study_or_the_one_made_in_its_place(
    order: str, made_again: bool, make_study: MakeStudy
) -> None:
    study = make_study()
    parked(study)
    optuna.delete_study(study_name=study.name, storage=study.storage.optuna)
    if made_again:
        again = make_study()
        parked(again)
    with pytest.raises(StudyError, match="study 'own' was deleted"):
        ORDERS[order](study)
    if made_again:
        assert standing(again) == (None, None)
        assert trial_of(again, 0).state == TrialState.RUNNING
