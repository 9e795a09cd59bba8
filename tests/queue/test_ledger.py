"""The hot writes, on SQLite and on Postgres."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import TrialState

from hpo.errors import LostLease, StudyError
from hpo.final import openings
from hpo.queue import claiming, reaper, workers
from hpo.queue.claiming import Idle
from hpo.queue.finish import End
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim, Commands
from hpo.queue.report import Report
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql, tables
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import hpo_curves, hpo_failures, hpo_test_openings, hpo_trials, hpo_workers
from hpo.study import control
from hpo.study.study import Study
from tests.support.trials import (
    MakeStudy,
    claim_one,
    finish_claim,
    reap,
    record_receipt,
    row_of,
    taken,
    trial_of,
)
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.both


def said(claim: Claim, step: int, value: float) -> Report:
    return Report(claim=claim, step=step, value=value, metrics={"value": value})


def finish(ledger: Ledger, claim: Claim, value: float = 1.0) -> None:
    finish_claim(ledger, claim, TrialState.COMPLETE, value, outcome="complete")


def expire(study: Study) -> None:
    """Let every lease run out, as if its worker had been silent for long enough."""
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_trials.update().where(hpo_trials.c.lease_until.is_not(None)).values(lease_until=0.0))


def test_new_trials_are_numbered_from_zero_without_gaps(make_study: MakeStudy) -> None:
    ledger = make_study(trials=5).ledger("w")
    assert [taken(ledger).number for _ in range(5)] == [0, 1, 2, 3, 4]


def test_the_budget_is_reserved_before_a_trial_starts(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    one, other = study.ledger("one"), study.ledger("other")
    taken(one), taken(other), taken(one)
    assert claim_one(other) is Idle.WAIT
    assert len(study.optuna.get_trials()) == 3


def test_a_failed_trial_is_charged_and_a_taken_over_one_only_once(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    ledger = study.ledger("w")
    finish_claim(ledger, taken(ledger), TrialState.FAIL, None, outcome="exception", reason="boom")
    ledger.park(taken(ledger))
    again = taken(ledger)
    assert (again.number, again.attempt) == (1, 2)
    finish(ledger, again)
    assert claim_one(ledger) is Idle.DONE
    assert [trial.state for trial in study.optuna.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_foreign_trials_are_charged_and_never_adopted(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    foreign = study.optuna.ask()
    ledger = study.ledger("w")
    mine = taken(ledger)
    assert mine.trial_id != foreign._trial_id
    assert claim_one(ledger) is Idle.WAIT  # for mine
    finish(ledger, mine)
    assert claim_one(ledger) is Idle.DONE  # a foreign trial that still runs is not waited for
    assert trial_of(study, foreign.number).state == TrialState.RUNNING


def test_a_queued_trial_goes_before_a_new_one_and_keeps_its_parameters(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    study.optuna.enqueue_trial({"x": 0.25})
    study.optuna.enqueue_trial({"x": 0.75})
    ledger = study.ledger("w")
    claims = [taken(ledger), taken(ledger)]
    assert [claim.number for claim in claims] == [0, 1]
    study.optuna.get_trials(deepcopy=False)
    drawn = [optuna.trial.Trial(study.optuna, claim.trial_id).suggest_float("x", 0, 1) for claim in claims]
    assert drawn == [0.25, 0.75]


def test_a_queued_trial_that_plain_optuna_popped_first_is_left_to_it(make_study: MakeStudy) -> None:
    study = make_study(trials=5)
    study.optuna.enqueue_trial({"x": 0.5})
    assert study.optuna.ask().number == 0
    assert taken(study.ledger("w")).number == 1


def test_queued_trials_beyond_the_budget_stay_queued(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    for x in (0.1, 0.2):
        study.optuna.enqueue_trial({"x": x})
    ledger = study.ledger("w")
    finish(ledger, taken(ledger))
    assert claim_one(ledger) is Idle.DONE
    assert [trial.state for trial in study.optuna.get_trials()] == [TrialState.COMPLETE, TrialState.WAITING]


def test_a_report_is_what_optuna_reads(make_study: MakeStudy) -> None:
    """A report is what Optuna reads and the raw metrics stand beside it."""
    study = make_study()
    ledger = study.ledger("w")
    claim = taken(ledger)
    report = Report(claim=claim, step=1, value=0.5, metrics={"loss": 0.75, "accuracy": math.nan})
    assert ledger.report([report]).lost == []
    assert trial_of(study, 0).intermediate_values == {1: 0.5}
    assert ledger.curve(claim, "loss") == [0.75]
    assert [math.isnan(value) for value in ledger.curve(claim, "accuracy")] == [True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e300])
def test_any_float_survives_the_way_to_optuna(make_study: MakeStudy, value: float) -> None:
    study = make_study()
    ledger = study.ledger("w")
    ledger.report([said(taken(ledger), 1, value)])
    assert repr(trial_of(study, 0).intermediate_values[1]) == repr(value)


def test_a_report_written_twice_is_written_once(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w")
    claim = taken(ledger)
    for _ in range(2):
        assert ledger.report([said(claim, 1, 0.5)]).lost == []
    assert trial_of(study, 0).intermediate_values == {1: 0.5}


def test_one_transaction_reports_for_many_trials_and_names_the_lost_ones(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w")
    claims = [taken(ledger) for _ in range(3)]
    ledger.park(claims[1])
    again = taken(study.ledger("other"))
    assert again.number == 1
    assert ledger.report([said(claim, 1, float(claim.number)) for claim in claims]).lost == [claims[1]]
    assert [trial_of(study, number).intermediate_values for number in range(3)] == [{1: 0.0}, {}, {1: 2.0}]


def test_a_live_lease_is_not_taken_and_an_expired_one_is(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    first = taken(study.ledger("first"))
    second = study.ledger("second")
    assert claim_one(second) is Idle.WAIT
    expire(study)
    assert claim_one(second) is Idle.WAIT  # taking a lease away is the reaper's affair
    assert reap(study) == 1
    assert reap(study) == 0
    again = taken(second)
    assert (again.trial_id, again.number, again.attempt) == (first.trial_id, first.number, 2)
    assert row_of(study, again).worker == "second"


def test_renewing_keeps_a_lease_that_would_have_run_out(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    expire(study)
    assert ledger.renew_all([claim]) == set()
    assert claim_one(study.ledger("other")) is Idle.WAIT


def test_a_worker_whose_lease_was_taken_changes_nothing_any_more(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    old, new = study.ledger("old"), study.ledger("new")
    stale = taken(old)
    expire(study)
    reap(study)
    fresh = taken(new)
    assert old.report([said(stale, 1, 9.0)]).lost == [stale]
    assert old.renew_all([stale]) == {stale}
    with pytest.raises(LostLease):
        finish(old, stale, value=9.0)
    with pytest.raises(LostLease):
        old.record_checkpoint(stale, Checkpoint(epoch=1, path="x", digest="d"))
    with pytest.raises(LostLease):
        record_receipt(old, stale, {"seed": 1})
    old.park(stale)
    assert claim_one(old) is Idle.WAIT  # the park did not touch the new lease
    assert trial_of(study, 0).intermediate_values == {}
    finish(new, fresh, value=2.0)
    assert trial_of(study, 0).value == 2.0


def test_a_trial_finished_once_cannot_be_finished_or_taken_again(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    finish(ledger, claim, value=1.0)
    finish(ledger, claim, value=2.0)  # as after a commit whose answer was lost: what is written stands
    other = study.ledger("other")
    with pytest.raises(LostLease):
        finish(other, claim, value=2.0)
    assert trial_of(study, 0).value == 1.0
    assert claim_one(ledger) is Idle.DONE


def test_a_trial_that_optuna_ended_from_outside_is_lost_to_its_worker(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    study.optuna.tell(claim.number, state=TrialState.FAIL)
    assert ledger.report([said(claim, 1, 1.0)]).lost == [claim]
    with pytest.raises(LostLease):
        finish(ledger, claim)
    assert claim_one(ledger) is Idle.DONE
    assert trial_of(study, 0).state == TrialState.FAIL


def test_taking_over_cuts_the_curve_back_to_the_checkpoint(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    for step in (1, 2):
        ledger.report([said(claim, step, float(step))])
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="/c.pt", digest="abc"))
    for step in (3, 4):
        ledger.report([said(claim, step, float(step))])
    expire(study)
    reap(study)
    again = taken(study.ledger("other"))
    assert again.checkpoint == Checkpoint(epoch=2, path="/c.pt", digest="abc")
    assert trial_of(study, 0).intermediate_values == {1: 1.0, 2: 2.0}
    assert ledger.curve(again, "value") == [1.0, 2.0]


def test_taking_over_without_a_checkpoint_empties_the_curve(make_study: MakeStudy) -> None:
    """Taking over without a checkpoint keeps the parameters and empties the curve."""
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    study.optuna.get_trials(deepcopy=False)
    drawn = optuna.trial.Trial(study.optuna, claim.trial_id).suggest_float("x", 0, 1)
    ledger.report([said(claim, 1, 1.0)])
    ledger.park(claim)
    again = taken(ledger)
    assert again.checkpoint is None
    assert trial_of(study, 0).intermediate_values == {}
    assert ledger.curve(again, "value") == []
    assert trial_of(study, 0).params == {"x": drawn}


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_taking_over_makes_the_pruner_forget(make_study: MakeStudy, has_checkpoint: bool) -> None:
    """Taking over makes the pruner forget what came after the checkpoint."""
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    attributes = study.storage.optuna.set_trial_system_attr
    attributes(claim.trial_id, "grid_id", 7)
    attributes(claim.trial_id, "completed_rung_0", 0.1)
    if has_checkpoint:
        ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="/c.pt", digest="abc"))
    attributes(claim.trial_id, "completed_rung_1", 0.2)
    ledger.park(claim)
    taken(ledger)
    kept = {"grid_id": 7, "completed_rung_0": 0.1} if has_checkpoint else {"grid_id": 7}
    assert trial_of(study, 0).system_attrs == kept


def test_the_oldest_parked_trial_goes_first(make_study: MakeStudy) -> None:
    """The oldest parked trial goes first and before queued and new ones."""
    study = make_study(trials=5)
    ledger = study.ledger("w")
    claims = [taken(ledger) for _ in range(3)]
    study.optuna.enqueue_trial({"x": 0.5})
    for claim in reversed(claims[1:]):
        ledger.park(claim)
    assert [taken(ledger).number for _ in range(4)] == [1, 2, 3, 4]


def test_a_stopped_study_starts_nothing_new_and_finishes_what_is_parked(make_study: MakeStudy) -> None:
    study = make_study(trials=5)
    ledger = study.ledger("w")
    ledger.park(taken(ledger))
    ledger.stop("enough")
    ledger.stop("again")  # the first reason stands
    finish(ledger, taken(ledger))
    assert claim_one(ledger) is Idle.DONE
    assert len(study.optuna.get_trials()) == 1


def test_parking_a_dead_process_frees_only_its_own_trials(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    for worker in ("host:1:aa", "host:1:ab", "host:2:aa"):
        taken(study.ledger(worker))
    reaper.release_leases_of(study.ledger("launcher"), "host:1:aa")
    again = taken(study.ledger("new"))
    assert again.number == 0
    assert claim_one(study.ledger("new")) is Idle.WAIT


def test_a_study_deleted_and_made_again_inherits_nothing(make_study: MakeStudy) -> None:
    old = make_study(trials=3)
    ledger = old.ledger("w")
    claim = taken(ledger)
    ledger.report([said(claim, 1, 1.0)])
    ledger.park(taken(ledger))
    optuna.delete_study(study_name=old.name, storage=old.storage.optuna)
    with pytest.raises(StudyError, match="deleted"):
        claim_one(ledger)
    new = make_study(trials=3)
    assert new.uid != old.uid
    fresh = taken(new.ledger("w"))
    assert (fresh.number, fresh.attempt, fresh.checkpoint) == (0, 1, None)
    assert new.ledger("w").curve(fresh, "value") == []
    with pytest.raises(StudyError, match="deleted"):
        claim_one(ledger)


def test_a_deleted_study_s_worker_writes_nothing(make_study: MakeStudy) -> None:
    """A worker of a deleted study writes nothing into the one made again."""
    old = make_study(trials=3)
    ledger = old.ledger("old")
    stale = taken(ledger)
    optuna.delete_study(study_name=old.name, storage=old.storage.optuna)
    assert ledger.report([said(stale, 1, -1e9)]).lost == [stale]
    new = make_study(trials=3)
    fresh = taken(new.ledger("new"))
    assert ledger.report([said(stale, 1, -1e9)]).lost == [stale]
    with pytest.raises(LostLease):
        finish(ledger, stale, value=-1e9)
    assert new.ledger("new").report([said(fresh, 1, 0.5)]).lost == []
    finish(new.ledger("new"), fresh, value=0.5)
    assert [trial.value for trial in new.optuna.trials] == [0.5]


def test_a_lease_that_was_given_back_is_not_renewed(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    ledger.park(claim)
    assert ledger.renew_all([claim]) == {claim}
    assert taken(study.ledger("other")).number == 0


@pytest.mark.parametrize("reason", ["a file called \udcff", "a NUL \0 in it", "plain"])
def test_any_reason_can_be_stored(make_study: MakeStudy, reason: str) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    finish_claim(ledger, claim, TrialState.FAIL, None, outcome="exception", reason=reason)
    assert row_of(study, claim).reason == reason.replace("\udcff", "\\udcff").replace("\0", "\\0")


def test_starting_over_forgets_the_checkpoint_and_the_curve(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = taken(ledger)
    ledger.report([said(claim, 1, 1.0)])
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="/c.pt", digest="abc"))
    ledger.start_over(claim)
    assert trial_of(study, 0).intermediate_values == {}
    ledger.park(claim)
    assert taken(ledger).checkpoint is None


def test_deleting_a_study_by_optuna_works_beside_our_rows(make_study: MakeStudy, place: Storage, url: str) -> None:
    study = make_study(trials=3)
    ledger = study.ledger("w")
    claim = taken(ledger)
    ledger.report([said(claim, 1, 1.0)])
    ledger.fail(claim, Failure(kind=Kind.LOST_WORKER, message="killed"))
    workers.register(ledger)
    receipt = {"study": study.name, "study_uid": study.uid, "trial": 0}
    assert openings.announce(study.spec.model_copy(update={"receipt": receipt}), Path("/runs/x"), url) is None
    optuna.delete_study(study_name=study.name, storage=place.optuna)
    assert optuna.get_all_study_names(place.optuna) == []
    if not place.is_sqlite:
        with place.engine.connect() as connection:
            left = [
                connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in (hpo_trials, hpo_curves, hpo_failures, hpo_workers, hpo_test_openings)
            ]
        assert left == [0, 0, 0, 0, 0]


def test_datetimes_are_stored_as_optuna_stores_them(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    theirs = study.optuna.ask()
    study.optuna.tell(theirs, 1.0)
    raised = make_study(trials=9, name="other")
    mine = taken(raised.ledger("w"))
    finish(raised.ledger("w"), mine)
    started = (trial_of(study, 0).datetime_start, trial_of(raised, 0).datetime_start)
    assert abs((started[0] - started[1]).total_seconds()) < 600  # not an hour, let alone a time zone, apart
    assert trial_of(raised, 0).duration.total_seconds() >= 0
    assert claim_one(ledger) is Idle.DONE


# --- many at once -----------------------------------------------------------------------------------------------------


def taken_many(ledger: Ledger, count: int) -> list[Claim]:
    claims = claiming.claim_many(ledger, count)
    assert not isinstance(claims, Idle)
    assert len(claims) == count
    return claims


def completed(claim: Claim, value: float | None = 0.5, *, reason: str | None = None) -> End:
    return End(claim=claim, state=TrialState.COMPLETE, value=value, outcome="complete", reason=reason)


def let_fall(study: Study, lost: Claim, given_back: Claim, ended: Claim) -> Claim:
    """Let three claims fall, each in its way; return the claim that the first one's trial has now."""
    ledger = study.ledger("w")
    ledger.park(lost)
    (again,) = taken_many(study.ledger("thief"), 1)
    assert again.trial_id == lost.trial_id
    ledger.park(given_back)
    study.optuna.tell(ended.number, state=TrialState.FAIL)
    return again


def test_nothing_of_nobody_is_no_statement(make_study: MakeStudy) -> None:
    ledger = dataclasses.replace(make_study().ledger("w"), engine=sa.create_engine("sqlite:////nowhere/at/all.db"))
    assert ledger.renew_all([]) == set()
    assert ledger.commands_of([]) == {}
    assert ledger.write_metrics([]) == set()
    assert ledger.finish_all([]) == set()


def test_leases_that_stand_are_renewed_together_and_the_others_are_named(make_study: MakeStudy) -> None:
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 6)
    again = let_fall(study, *claims[:3])
    expire(study)
    assert ledger.renew_all(claims) == set(claims[:3])
    assert [bool(row_of(study, claim).lease_until) for claim in claims] == [False, False, False, True, True, True]
    assert study.ledger("thief").renew_all([claims[0], again]) == {claims[0]}  # two claims to one trial
    assert row_of(study, again).lease_until > 0
    assert reap(study) == 0


def test_orders_come_for_each_of_many(make_study: MakeStudy) -> None:
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 5)
    again = let_fall(study, *claims[:3])
    control.stop_trial(study, 3)
    found = ledger.commands_of([*claims, again])
    lost = Commands(lost=True, stop=False, park=False)
    go_on = Commands(lost=False, stop=False, park=False)
    stop = Commands(lost=False, stop=True, park=False)
    # That another program ended one is not looked at here: a report finds it out, or a renewal.
    assert found == dict(zip([*claims, again], [lost, lost, go_on, stop, go_on, go_on], strict=True))
    control.pause(study)
    assert [found.park for found in ledger.commands_of(claims).values()] == [False, False, True, True, True]


def test_raw_metrics_of_many_are_written_where_the_claim_stands(make_study: MakeStudy) -> None:
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 5)
    again = let_fall(study, *claims[:3])
    expire(study)
    reports = [said(claim, step, float(step)) for step in (1, 2) for claim in [*claims, again]]
    assert ledger.write_metrics(reports) == set(claims[:3])
    assert [ledger.curve(claim, "value") for claim in claims] == [[1.0, 2.0], [], [], [1.0, 2.0], [1.0, 2.0]]
    assert row_of(study, claims[4]).lease_until > 0


def test_a_stale_and_a_later_claim_are_told_apart(make_study: MakeStudy) -> None:
    """A stale and a later claim to one trial are told apart in one report."""
    study = make_study(trials=2)
    ledger = study.ledger("w")
    stale, other = taken_many(ledger, 2)
    ledger.park(stale)
    (again,) = taken_many(ledger, 1)  # the worker that had it takes it up anew, and has not yet heard that it was lost
    for step in (1, 2):
        reports = [said(stale, step, 9.0), said(again, step, 0.5), said(other, step, 0.25)]
        assert ledger.report(reports).lost == [stale]
    assert trial_of(study, 0).intermediate_values == {1: 0.5, 2: 0.5}
    assert ledger.curve(again, "value") == [0.5, 0.5]


def test_trials_end_together_each_in_its_own_way(make_study: MakeStudy) -> None:
    study = make_study(trials=9, failures={"in_a_row": 2})
    ledger = study.ledger("w")
    ledger.fail(taken(ledger), Failure(kind=Kind.EXCEPTION, message="boom"))
    claims = taken_many(ledger, 4)
    ends = [
        completed(claims[0], 0.5),
        End(claim=claims[1], state=TrialState.PRUNED, value=0.25, outcome="pruned", reason="a NUL \0 in it"),
        End(claim=claims[2], state=TrialState.PRUNED, value=None, outcome="pruned"),
        End(claim=claims[3], state=TrialState.FAIL, value=None, outcome="exception", reason="at the median"),
    ]
    assert ledger.finish_all(ends) == set()
    found = study.optuna.get_trials()[1:]
    assert [(trial.state, trial.value) for trial in found] == [(end.state, end.value) for end in ends]
    assert all(trial.datetime_complete is not None for trial in found)
    rows = [row_of(study, claim) for claim in claims]
    assert [(row.settled, row.lease_until) for row in rows] == [(True, None)] * 4
    assert [row.outcome for row in rows] == ["complete", "pruned", "pruned", "exception"]
    assert [row.reason for row in rows] == [None, "a NUL \\0 in it", None, "at the median"]
    ledger.fail(taken(ledger), Failure(kind=Kind.EXCEPTION, message="boom"))  # the row of failures was broken
    assert claim_one(ledger) is not Idle.DONE


def test_lost_ones_among_ends_are_named_and_left(make_study: MakeStudy) -> None:
    """Of trials that end together those that were lost are named and left."""
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 6)
    again = let_fall(study, *claims[:3])
    before = [row_of(study, claim) for claim in claims[:3]]
    for _ in range(2):  # the second time as after a commit whose answer was lost
        assert ledger.finish_all([completed(claim) for claim in claims]) == set(claims[:3])
        assert [row_of(study, claim) for claim in claims[:3]] == before
        states = [trial.state.name for trial in study.optuna.get_trials()]
        assert states == ["RUNNING", "RUNNING", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    others = [completed(claim) for claim in (claims[3], claims[0], again)]
    assert study.ledger("thief").finish_all(others) == {claims[3], claims[0]}  # another's end is not one's own
    assert trial_of(study, 0).state == TrialState.COMPLETE


def test_an_end_that_fails_half_way_ends_none(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 3)

    def broken(*arguments: object, **settings: object) -> Any:
        raise sa.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr(sql, "upsert", broken)
        with pytest.raises(sa.exc.OperationalError):
            ledger.finish_all([completed(claim) for claim in claims])
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING"] * 3
    assert ledger.renew_all(claims) == set()
    assert ledger.finish_all([completed(claim) for claim in claims]) == set()


def while_another_writes(study: Study, url: str, write: sa.Update, act: Callable[[], object]) -> object:
    """Return what comes of an act that begins while another process has written this and not yet committed."""
    found: list[object] = []
    other = connect(url)
    acting = threading.Thread(target=lambda: found.append(act()))
    with sql.writing(other.engine) as connection:
        connection.execute(write)
        acting.start()
        acting.join(0.3)
        assert acting.is_alive()
    acting.join(PATIENCE)
    other.close()
    return found[0]


def test_another_s_write_is_waited_for(make_study: MakeStudy, url: str) -> None:
    """What others write to a row meanwhile is waited for and costs no lease."""
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 4)
    stop = hpo_trials.update().where(hpo_trials.c.trial_id == claims[1].trial_id).values(stop_requested=True)
    assert while_another_writes(study, url, stop, lambda: ledger.renew_all(claims)) == set()
    reports = [said(claim, 1, 0.5) for claim in claims]
    assert while_another_writes(study, url, stop, lambda: ledger.write_metrics(reports)) == set()
    ends = [completed(claim) for claim in claims]
    assert while_another_writes(study, url, stop, lambda: ledger.finish_all(ends)) == set()
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["COMPLETE"] * 4
    assert [row_of(study, claim).stop_requested for claim in claims] == [False, True, False, False]


def test_a_lease_taken_meanwhile_is_lost(make_study: MakeStudy, url: str) -> None:
    """A lease that is taken while others wait to write is lost to them."""
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 6)

    def take(claim: Claim) -> sa.Update:
        of_trial = hpo_trials.c.trial_id == claim.trial_id
        return hpo_trials.update().where(of_trial).values(attempt=2, worker="thief")

    assert while_another_writes(study, url, take(claims[1]), lambda: ledger.renew_all(claims)) == {claims[1]}
    reports = [said(claim, 1, 0.5) for claim in claims]
    lost = while_another_writes(study, url, take(claims[2]), lambda: ledger.write_metrics(reports))
    assert lost == {claims[1], claims[2]}
    ends = [completed(claim) for claim in claims]
    lost = while_another_writes(study, url, take(claims[3]), lambda: ledger.finish_all(ends))
    assert lost == set(claims[1:4])
    states = [trial.state.name for trial in study.optuna.get_trials()]
    assert states == ["COMPLETE", "RUNNING", "RUNNING", "RUNNING", "COMPLETE", "COMPLETE"]


def test_an_end_that_another_program_is_writing_is_waited_for_and_stands(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 3)
    elsewhere = tables.trials.update().where(tables.trials.c.number == 1).values(state=TrialState.FAIL)
    ends = [completed(claim) for claim in claims]
    assert while_another_writes(study, url, elsewhere, lambda: ledger.finish_all(ends)) == {claims[1]}
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert not row_of(study, claims[1]).settled  # whoever drops the trial closes it


def test_beginnings_wait_for_an_end_elsewhere(make_study: MakeStudy, url: str) -> None:
    """What trials begin with waits for an end that another program is writing and leaves that trial alone."""
    study = make_study(trials=20)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 4)
    x = {"param_name": "x", "param_value": 0.5, "distribution_json": distribution_to_json(FloatDistribution(0, 1))}
    told = {"key": "of_a_sampler", "value_json": "1"}

    def ended(number: int) -> sa.Update:
        return tables.trials.update().where(tables.trials.c.number == number).values(state=TrialState.FAIL)

    given = [SuggestedParams(claim=claim, params=[x], attributes=[told]) for claim in claims]
    lost = while_another_writes(study, url, ended(1), lambda: ledger.write_suggested(given))
    assert lost == {claims[1]}
    made = [TrialReceipt(claim=claim, receipt={"of": claim.number}) for claim in claims]
    lost = while_another_writes(study, url, ended(2), lambda: ledger.record_receipts(made))
    assert lost == {claims[1], claims[2]}
    assert while_another_writes(study, url, ended(3), lambda: ledger.renew_all(claims)) == set(claims[1:])
    found = study.optuna.get_trials()
    assert [trial.params for trial in found] == [{"x": 0.5}, {}, {"x": 0.5}, {"x": 0.5}]
    assert ["of_a_sampler" in trial.system_attrs for trial in found] == [True, False, True, True]
    receipts = [row_of(study, claim).receipt for claim in claims]
    assert [receipt and json.loads(receipt)["of"] for receipt in receipts] == [0, None, None, 3]


def test_writers_of_many_trials_in_any_order_do_not_lock_each_other_out(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=40)
    ledger = study.ledger("w")
    claims = taken_many(ledger, 24)
    until, errors = time.monotonic() + 3.0, list[BaseException]()

    def go(act: Callable[[Ledger, list[Claim], int], object]) -> None:
        own = connect(url)
        mine, drawn, turn = dataclasses.replace(ledger, engine=own.engine), random.Random(id(act)), 0
        try:
            while time.monotonic() < until:
                turn += 1
                act(mine, drawn.sample(claims, 16), turn)
        except BaseException as error:
            errors.append(error)
        own.close()

    def report(mine: Ledger, some: list[Claim], turn: int) -> None:
        assert mine.report([said(claim, turn, 0.5) for claim in some], metrics=False).lost == []

    def renew(mine: Ledger, some: list[Claim], _: int) -> None:
        assert mine.renew_all(some) == set()

    def write_metrics(mine: Ledger, some: list[Claim], turn: int) -> None:
        assert mine.write_metrics([said(claim, turn, 0.5) for claim in some]) == set()

    def end(mine: Ledger, some: list[Claim], _: int) -> None:
        (extra,) = taken_many(mine, 1)
        assert mine.finish_all([completed(extra)]) == set()
        time.sleep(0.3)

    def order(_: Ledger, some: list[Claim], __: int) -> None:
        control.stop_trial(study, some[0].number)

    threads = [threading.Thread(target=go, args=[act]) for act in (report, renew, renew, write_metrics, end, order)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledger.finish_all([completed(claim) for claim in claims]) == set()
