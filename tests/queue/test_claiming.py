"""How a worker comes by a trial, in studies that are held up and beside workers that claim at the same instant.

What a claim takes first, and what the budget allows, stands in test_ledger.py.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import claiming, reaper
from hpo.queue.claiming import Idle
from hpo.queue.commands import pause, resume
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql, study_rows, trial_writes
from hpo.storage.connect import connect
from hpo.storage.retry import Retry
from hpo.storage.tables import Hold, hpo_studies, hpo_trials
from hpo.study import control
from hpo.study.study import Study
from hpo.worker.client import ClaimRequest
from tests.support.trials import MakeStudy, begin, claim_one, client_of, finish_claim, record_receipt, row_of

pytestmark = pytest.mark.both


def parked(study: Study) -> None:
    """Begin a trial and park it."""
    ledger, claim, _ = begin(study)
    ledger.park(claim)


def break_it(study: Study) -> None:
    """Let a trial fail in a study that bears no failure."""
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=Kind.EXCEPTION, message="boom"))


def leases(study: Study) -> list[float | None]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_trials.c.lease_until).order_by(hpo_trials.c.trial_id)).scalars())


def test_a_broken_study_sends_workers_home_and_leaves_what_is_parked(make_study: MakeStudy) -> None:
    study = make_study(trials=9, failures={"in_a_row": 1})
    one, other = begin(study), begin(study)
    one[0].park(one[1])
    study.optuna.enqueue_trial({"x": 0.5})
    other[0].fail(other[1], Failure(kind=Kind.EXCEPTION, message="boom"))
    assert claim_one(study.ledger("w")) is Idle.DONE
    assert leases(study) == [None, None]
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "FAIL", "WAITING"]


def test_a_paused_study_lets_workers_wait_and_leaves_what_is_parked(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    study.optuna.enqueue_trial({"x": 0.5})
    control.pause(study)
    assert claim_one(study.ledger("w")) is Idle.WAIT
    assert leases(study) == [None]
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "WAITING"]


def test_a_paused_study_lets_workers_wait_though_nothing_is_open_yet(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    control.pause(study)
    assert claim_one(study.ledger("w")) is Idle.WAIT
    assert study.optuna.get_trials() == []


def test_a_paused_and_stopped_study_waits_for_the_parked(make_study: MakeStudy) -> None:
    """A paused study that is stopped as well lets workers wait for what is parked."""
    study = make_study(trials=9)
    parked(study)
    control.pause(study)
    control.stop(study)  # which promises that what is open is still finished
    assert claim_one(study.ledger("w")) is Idle.WAIT


def test_a_study_that_trials_are_being_copied_into_starts_none(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(hold=Hold.FORKING, stop_reason="a fork was cut off"))
    assert claim_one(study.ledger("w")) is Idle.DONE
    assert study.optuna.get_trials() == []


def test_after_a_pause_what_was_parked_goes_first(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    control.pause(study)
    control.resume(study)
    assert [begin(study)[1].number for _ in range(2)] == [0, 1]


def test_a_resumed_study_goes_on_with_what_is_parked(make_study: MakeStudy) -> None:
    """A broken study that a person resumes goes on with what is parked."""
    study = make_study(trials=9, failures={"in_a_row": 1})
    first = begin(study)
    break_it(study)
    first[0].park(first[1])
    control.resume(study)
    assert [begin(study)[1].number for _ in range(2)] == [0, 2]


def test_a_trial_that_a_person_ended_is_not_taken_up(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    parked(study)
    control.stop_trial(study, 0)
    assert begin(study)[1].number == 1


def test_a_trial_that_something_else_ended_is_not_taken_up(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    parked(study)
    study.optuna.tell(0, state=TrialState.FAIL)
    assert claim_one(study.ledger("w")) is Idle.DONE


def test_a_claim_says_how_its_trial_goes_on(make_study: MakeStudy) -> None:
    """A claim says from where and with which batches the trial goes on."""
    study = make_study(trials=1)
    ledger, claim, _ = begin(study)
    assert (claim.attempt, claim.checkpoint, claim.accumulation) == (1, None, 1)
    ledger.fail(claim, Failure(kind=Kind.OUT_OF_MEMORY, message="out"), accumulation=8)
    assert begin(study)[1] == Claim(trial_id=claim.trial_id, number=0, attempt=2, accumulation=8)


def test_what_a_fork_brought_along_is_not_charged(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(imported=2))
    for _ in range(2):
        study.optuna.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.5))
    assert begin(study)[1].number == 2
    assert claim_one(study.ledger("w")) is Idle.WAIT


def test_nothing_is_claimed_in_a_deleted_study(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    optuna.delete_study(study_name=study.name, storage=study.storage.optuna)
    with pytest.raises(StudyError, match="was deleted while this worker ran"):
        claim_one(study.ledger("w"))


@pytest.mark.parametrize("open_trials", [0, 3], ids=["new", "parked"])
def test_workers_that_claim_at_one_instant_get_each_a_trial_of_their_own(
    open_trials: int, make_study: MakeStudy, url: str
) -> None:
    study = make_study(trials=4)
    held = [begin(study) for _ in range(open_trials)]
    for ledger, claim, _ in held:
        ledger.park(claim)
    ready, claims = threading.Barrier(4), []

    def work(worker: str) -> None:
        place = connect(url)  # a process of its own has an engine of its own
        ledger = dataclasses.replace(study.ledger(worker), engine=place.engine)
        ready.wait()
        claims.append(claim_one(ledger))
        place.close()

    threads = [threading.Thread(target=work, args=[f"w{n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.number for claim in claims if isinstance(claim, Claim)) == [0, 1, 2, 3]
    assert [trial.number for trial in study.optuna.get_trials()] == [0, 1, 2, 3]


# --- many at once -----------------------------------------------------------------------------------------------------


def many(study: Study, wanted: int, worker: str = "w", **settings: Any) -> list[Claim]:
    claims = claiming.claim_many(study.ledger(worker), wanted, **settings)
    return [] if isinstance(claims, Idle) else claims


def numbers(claims: list[Claim]) -> list[int]:
    return [claim.number for claim in claims]


def park_as(study: Study, *partitions: str | None) -> None:
    """Begin as many trials and park each as one of this partition."""
    ledger = study.ledger("parks")
    claims = claiming.claim_many(ledger, len(partitions))
    assert not isinstance(claims, Idle)
    for claim, stack_key in zip(claims, partitions, strict=True):
        ledger.park(claim, stack_key=stack_key)


def lose(study: Study, claim: Claim, kind: Kind = Kind.LOST_WORKER) -> None:
    study.ledger("w").fail(claim, Failure(kind=kind, message="killed"))


def numbered(study: Study) -> list[int]:
    return [trial.number for trial in study.optuna.get_trials(deepcopy=False)]


def test_how_many_new_trials_are_begun(make_study: MakeStudy) -> None:
    """As many new trials are begun as are wanted and as the budget has left."""
    study = make_study(trials=10)
    assert [numbers(many(study, 4)) for _ in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]
    assert claiming.claim_many(study.ledger("w"), 4) is Idle.WAIT
    assert None not in leases(study)
    assert numbered(study) == list(range(10))


def test_each_of_many_claims_can_be_worked_on(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    study.optuna.enqueue_trial({"x": 0.5})
    ledger = study.ledger("w")
    for claim in many(study, 3):
        assert (claim.attempt, row_of(study, claim).stack_key, claim.alone) == (1, None, False)
        assert (claim.began is None) == (claim.number == 0)  # that one was there
        record_receipt(ledger, claim, {"seed": 1}, "mlp")
        finish_claim(ledger, claim, TrialState.COMPLETE, 0.5, outcome="complete")
    assert claiming.claim_many(ledger, 3) is Idle.DONE
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["COMPLETE"] * 3


def test_more_are_queued_than_are_wanted_and_than_the_budget_has(make_study: MakeStudy) -> None:
    """The counts of queued and parked trials end early, and the budget stays exact."""
    study = make_study(trials=12)
    for _ in range(20):
        study.optuna.enqueue_trial({})
    assert numbers(many(study, 2)) == [0, 1]
    study.optuna.ask()  # a foreign process takes one
    assert numbers(many(study, 2)) == [3, 4]
    for claim in many(study, 4):  # 5 to 8
        study.ledger("w").park(claim)
    assert numbers(many(study, 1, stack_key="a", waiting_at_most=1)) == [5]
    assert many(study, 1, stack_key="a", waiting_at_most=1) != []  # parked ones go first
    assert numbers(many(study, 20)) == [7]
    assert numbers(many(study, 20)) == [8]
    assert numbers(many(study, 20)) == [9, 10, 11]
    assert claiming.claim_many(study.ledger("w"), 20) is Idle.WAIT
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING"] * 12 + ["WAITING"] * 8


def test_a_look_without_the_lock_knows_when_to_wait(make_study: MakeStudy) -> None:
    """It says so only while a later claim may find what the present one does not."""
    study = make_study(trials=2)
    ledger = study.ledger("w")
    assert not claiming.must_wait(ledger)
    first, second = many(study, 2)
    assert claiming.must_wait(ledger)
    with sql.writing(study.storage.engine) as connection:
        pause(connection, study.uid)
    assert claiming.must_wait(ledger)
    ledger.park(first)
    assert claiming.must_wait(ledger)  # a paused study gives nothing
    with sql.writing(study.storage.engine) as connection:
        resume(connection, study.uid)
    assert not claiming.must_wait(ledger)
    (first,) = many(study, 1)
    study.optuna.enqueue_trial({})
    assert claiming.must_wait(ledger)  # beyond the budget
    for claim in (first, second):
        finish_claim(ledger, claim, TrialState.COMPLETE, 0.5, outcome="complete")
    assert not claiming.must_wait(ledger)  # only a claim may say that all is done
    assert claiming.claim_many(ledger, 1) is Idle.DONE


def test_a_worker_that_waits_for_others_takes_no_lock(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    assert many(study, 1)
    client = client_of(study.ledger("idle"), Retry(0.0))
    assert client.claim(ClaimRequest(count=1)) is Idle.WAIT
    with sql.writing(study.storage.engine) as connection:
        study_rows.lock(connection, study.study_id)
        assert client.claim(ClaimRequest(count=1)) is Idle.WAIT


@pytest.mark.parametrize("settings", [{"wanted": 0}, {"wanted": 1, "fleet": 0}, {"wanted": 1, "waiting_at_most": 0}])
def test_what_makes_no_sense_is_refused(settings: dict[str, int], make_study: MakeStudy) -> None:
    with pytest.raises(ValueError, match=r"=0; it must be at least 1"):
        claiming.claim_many(make_study().ledger("w"), **settings)


def test_queued_trials_go_before_new_ones_and_both_count(make_study: MakeStudy) -> None:
    study = make_study(trials=5)
    begin(study)
    for x in (0.1, 0.2, 0.3):
        study.optuna.enqueue_trial({"x": x})
    assert numbers(many(study, 2)) == [1, 2]
    assert numbers(many(study, 9)) == [3, 4]
    assert claim_one(study.ledger("w")) is Idle.WAIT


def test_queued_trials_beyond_the_budget_stay_queued(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    for x in (0.1, 0.2, 0.3):
        study.optuna.enqueue_trial({"x": x})
    assert numbers(many(study, 9)) == [0, 1]
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "RUNNING", "WAITING"]


def test_queued_trials_that_plain_optuna_takes_meanwhile_are_left_to_it(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=9)
    for x in (0.1, 0.2, 0.3, 0.4):
        study.optuna.enqueue_trial({"x": x})
    set_states = trial_writes.set_states

    def beaten(connection: sa.Connection, ids: list[int], state: TrialState, **settings: Any) -> set[int]:
        monkeypatch.undo()
        set_states(connection, ids[:1], TrialState.RUNNING, once=(TrialState.WAITING,))  # as if by another program
        return set_states(connection, ids, state, **settings)

    monkeypatch.setattr(trial_writes, "set_states", beaten)
    assert numbers(many(study, 3)) == [1, 2, 3]  # what was lost is made up for from the queue
    assert numbers(many(study, 9, fleet=5)) == [4]


def test_one_call_takes_no_more_than_its_share_of_the_new_trials(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    study.optuna.enqueue_trial({"x": 0.5})
    assert numbers(many(study, 64, fleet=4)) == [0, 1, 2]  # the queued one, and ceil(8 / 4)
    assert numbers(many(study, 64, fleet=4)) == [3, 4]
    assert [len(many(study, 64, fleet=4)) for _ in range(5)] == [1, 1, 1, 1, 0]


def test_a_share_is_of_the_grid_if_that_is_smaller_than_the_budget(make_study: MakeStudy) -> None:
    study = make_study(trials=100)
    ledger = dataclasses.replace(study.ledger("w"), grid_points=8)
    counts = []
    while not isinstance(claims := claiming.claim_many(ledger, 64, fleet=2), Idle):
        counts.append(len(claims))
    assert counts == [4, 2, 1, 1]
    assert claims is Idle.WAIT


def test_a_grid_s_points_are_each_dealt_out_once(make_study: MakeStudy) -> None:
    study = make_study(trials=100)
    ledger = dataclasses.replace(study.ledger("w"), grid_points=6)
    study.optuna.enqueue_trial({"x": 0.5})
    claims = many_of(ledger, 9)
    assert len(claims) == 6  # the queued one may yet take a point as well
    for point, claim in enumerate(claims[1:]):
        study.storage.optuna.set_trial_system_attr(claim.trial_id, claiming.GRID_KEY, point)
    finish_claim(ledger, claims[0], TrialState.COMPLETE, 0.5, outcome="complete")  # without one
    assert len(many_of(ledger, 9)) == 1
    assert claiming.claim_many(ledger, 9) is Idle.WAIT


def many_of(ledger: Ledger, wanted: int, **settings: Any) -> list[Claim]:
    claims = claiming.claim_many(ledger, wanted, **settings)
    return [] if isinstance(claims, Idle) else claims


def test_a_grid_that_is_all_tried_stops_the_study(make_study: MakeStudy) -> None:
    study = make_study(trials=100)
    ledger = dataclasses.replace(study.ledger("w"), grid_points=3)
    for point, claim in enumerate(many_of(ledger, 64)):
        study.storage.optuna.set_trial_system_attr(claim.trial_id, claiming.GRID_KEY, point)
        finish_claim(ledger, claim, TrialState.COMPLETE, 0.5, outcome="complete")
    assert claiming.claim_many(ledger, 64) is Idle.DONE
    with study.storage.engine.connect() as connection:
        reason = connection.execute(sa.select(hpo_studies.c.stop_reason)).scalar_one()
    assert reason == "every point of the grid was tried"
    assert len(numbered(study)) == 3


@pytest.mark.parametrize("held_up", ["paused", "stopped"])
def test_a_study_that_is_held_up_begins_nothing_for_many_either(held_up: str, make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    park_as(study, None, "a", "a")
    (control.pause if held_up == "paused" else control.stop)(study)
    found = claiming.claim_many(study.ledger("w"), 9, stack_key="a")
    assert found is Idle.WAIT if held_up == "paused" else [claim.number for claim in found] == [0, 1, 2]
    assert claiming.claim_many(study.ledger("w"), 9, stack_key="a") is Idle.WAIT
    assert numbered(study) == [0, 1, 2]


# --- parked ones, and what they train in -------------------------------------------------------------------------------


def test_what_an_open_stack_is_given(
    make_study: MakeStudy,
) -> None:
    """An open stack gets what is parked of its partition and of none yet and then new ones."""
    study = make_study(trials=9)
    park_as(study, "a", None, "b", "a", None)
    assert numbers(many(study, 2, stack_key="a")) == [0, 1]
    assert [(one.number, row_of(study, one).stack_key) for one in many(study, 4, stack_key="a")] == [
        (3, "a"),
        (4, None),
        (5, None),
        (6, None),
    ]
    assert numbers(many(study, 9, stack_key="a")) == [7, 8]
    assert claiming.claim_many(study.ledger("w"), 9, stack_key="a") is Idle.WAIT
    assert numbers(many(study, 9)) == [2]


def test_without_a_stack_the_oldest_parked_trial_decides_which_is_opened(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    park_as(study, "b", "a", None, "b", "b")
    assert numbers(many(study, 2)) == [0, 3]  # no more than are wanted
    assert numbers(many(study, 9)) == [1]  # and nothing new beside it
    assert numbers(many(study, 9)) == [2]  # of none yet: alone, since it may open anything
    assert numbers(many(study, 9)) == [4]
    assert numbers(many(study, 9)) == [5, 6, 7, 8]


def test_a_parked_trial_keeps_its_stack_key_over_attempts(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger = study.ledger("w")
    (claim,) = many(study, 1)
    record_receipt(ledger, claim, {"seed": 1}, "a")
    ledger.park(claim)
    (again,) = many(study, 1)
    assert (row_of(study, again).stack_key, again.attempt) == ("a", 2)
    record_receipt(ledger, again, {"seed": 2})
    ledger.park(again, stack_key="b")  # the file was changed between two runs, for one
    assert claim_one(ledger) == dataclasses.replace(again, attempt=3)
    assert row_of(study, again).stack_key == "b"


def test_nothing_new_is_asked_for_while_too_much_waits_for_another_stack(make_study: MakeStudy) -> None:
    study = make_study(trials=20)
    park_as(study, "b", "b", "c", "a")
    study.optuna.enqueue_trial({"x": 0.5})
    limits = {"stack_key": "a", "waiting_at_most": 3}
    assert numbers(many(study, 9, **limits)) == [3]  # its own is taken
    assert claiming.claim_many(study.ledger("w"), 9, **limits) is Idle.WAIT
    assert numbers(many(study, 9, stack_key="a", waiting_at_most=5)) == [4, 5]  # for these may all come to wait
    assert numbers(many(study, 2, stack_key="b", waiting_at_most=3)) == [0, 1]
    assert numbers(many(study, 9, **limits)) == [6, 7]


def test_a_trial_on_its_last_attempt_at_killing_workers_is_trained_alone(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    for _ in range(2):
        claims = many(study, 3, stack_key="a")
        assert [claim.alone for claim in claims] == [False] * 3
        for claim in claims[:2]:
            lose(study, claim)
        study.ledger("w").park(claims[2], stack_key="a")
    assert numbers(many(study, 2, stack_key="a")) == [2, 3]  # the guilty and who was with it are passed over
    one, other = many(study, 9), many(study, 9)
    assert [(claim.number, claim.alone, claim.attempt) for claim in [*one, *other]] == [(0, True, 3), (1, True, 3)]
    study.ledger("w").park(one[0])  # as by a pause: it is no less suspect
    assert claim_one(study.ledger("w")) == dataclasses.replace(one[0], attempt=4)


def test_none_that_is_trained_alone_is_taken_beside_another(make_study: MakeStudy) -> None:
    """Trials beside the oldest parked one are none that are trained alone."""
    study = make_study(trials=9, failures={"cuda_error": {"retries": 1}})
    claims = many(study, 3)
    for claim in claims:
        record_receipt(study.ledger("w"), claim, {}, "a")
    lose(study, claims[1], Kind.CUDA_ERROR)
    for claim in (claims[0], claims[2]):
        study.ledger("w").park(claim)
    assert numbers(many(study, 9)) == [0, 2]
    assert [(claim.number, claim.alone) for claim in many(study, 9)] == [(1, True)]


@pytest.mark.parametrize(
    ("kind", "retries", "alone"),
    [
        (Kind.LOST_WORKER, 1, True),
        (Kind.CUDA_ERROR, 1, True),
        (Kind.CUDA_ERROR, 2, False),
        (Kind.DATA_ERROR, 1, False),  # its own affair
    ],
)
def test_whether_a_trial_is_trained_alone_is_its_policy_s_to_say(
    kind: Kind, retries: int, alone: bool, make_study: MakeStudy
) -> None:
    study = make_study(trials=1, failures={kind.value: {"retries": retries}})
    (claim,) = many(study, 1)
    assert not claim.alone  # though no kind has a failure
    lose(study, claim, kind)
    assert [again.alone for again in many(study, 1)] == [alone]


def test_a_policy_without_retries_trains_nobody_alone(make_study: MakeStudy) -> None:
    none = {"retries": 0}
    study = make_study(trials=1, failures={"lost_worker": none, "cuda_error": none})
    park_as(study, "a")
    assert [claim.alone for claim in many(study, 9, stack_key="a")] == [False]


def test_taken_over_trials_are_cut_back_each_to_its_own(make_study: MakeStudy) -> None:
    """Each of many taken over trials is cut back to its own checkpoint."""
    study = make_study(trials=4)
    ledger = study.ledger("w")
    claims = many(study, 4)
    attributes = study.storage.optuna.set_trial_system_attr
    for claim in claims:
        for step in range(1, 5):
            told = Report(claim=claim, step=step, value=float(step), metrics={"value": float(step)})
            assert ledger.report([told]).lost == []
            attributes(claim.trial_id, f"completed_rung_{step}", 0.5)
            if step == claim.number:
                path = f"/{claim.number}.pt"
                ledger.record_checkpoint(claim, Checkpoint(epoch=step, path=path, digest="abc"))
        attributes(claim.trial_id, "other", claim.number)
    for claim in claims:
        ledger.park(claim, stack_key="a")
    found = study.optuna.get_trials()
    assert [len(trial.intermediate_values) for trial in found] == [4] * 4
    again = many(study, 3, stack_key="a")
    found = study.optuna.get_trials()
    assert [sorted(trial.intermediate_values) for trial in found] == [[], [1], [1, 2], [1, 2, 3, 4]]
    assert [ledger.curve(claim, "value") for claim in again] == [[], [1.0], [1.0, 2.0]]
    rungs = [{f"completed_rung_{step}": 0.5 for step in range(1, number + 1)} for number in (0, 1, 2, 4)]
    others: list[dict[str, object]] = [{"other": 0}, {}, {}, {"other": 3}]  # what came after a checkpoint is forgotten
    assert [trial.system_attrs for trial in found] == [{**a, **b} for a, b in zip(rungs, others, strict=True)]
    assert [claim.checkpoint and claim.checkpoint.epoch for claim in again] == [None, 1, 2]


# --- races ------------------------------------------------------------------------------------------------------------


def at_once(url: str, study: Study, *acts: Callable[[Ledger], object]) -> list[object]:
    """Do these in threads of their own at one instant, each with an engine of its own; return what each returned or raised."""
    ready, found = threading.Barrier(len(acts)), dict[int, object]()

    def run(place: int, act: Callable[[Ledger], object]) -> None:
        opened = connect(url)
        ledger = dataclasses.replace(study.ledger(f"w{place}"), engine=opened.engine)
        ready.wait()
        try:
            found[place] = act(ledger)
        except BaseException as error:
            found[place] = error
        opened.close()

    threads = [threading.Thread(target=run, args=one) for one in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(acts))]


def claim_until_there_is_nothing(wanted: int, **settings: Any) -> Callable[[Ledger], list[Claim]]:
    def act(ledger: Ledger) -> list[Claim]:
        claims: list[Claim] = []
        while more := many_of(ledger, wanted, **settings):
            claims += more
        return claims

    return act


def test_racing_workers_share_the_budget_exactly(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=100)
    for x in range(20):
        study.optuna.enqueue_trial({"x": x / 20})
    found = at_once(url, study, *(claim_until_there_is_nothing(wanted, fleet=2) for wanted in (1, 7, 16, 64)))
    claims = [claim for one in found if isinstance(one, list) for claim in one]
    assert sorted(claim.number for claim in claims) == list(range(100))
    assert len({claim.trial_id for claim in claims}) == 100
    assert numbered(study) == list(range(100))


def test_racing_workers_of_a_grid_deal_each_point_out_once(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=500)

    def act(ledger: Ledger) -> list[Claim]:
        return claim_until_there_is_nothing(8)(dataclasses.replace(ledger, grid_points=50))

    found = at_once(url, study, *[act] * 4)
    assert sum(len(one) for one in found if isinstance(one, list)) == 50
    assert numbered(study) == list(range(50))


def test_racing_workers_take_each_parked_trial_once(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=60)
    park_as(study, *["a", "b", None] * 20)
    acts = [claim_until_there_is_nothing(5, stack_key=stack_key) for stack_key in ("a", "a", "b", None)]
    found = at_once(url, study, *acts)
    claims = [claim for one in found if isinstance(one, list) for claim in one]
    assert sorted(claim.number for claim in claims) == list(range(60))
    assert {claim.attempt for claim in claims} == {2}
    for one, stack_key in zip(found, ("a", "a", "b"), strict=False):
        assert isinstance(one, list)
        assert {row_of(study, claim).stack_key for claim in one} <= {stack_key, None}


def test_numbers_are_unique_and_without_gaps_beside_plain_optuna(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=1000)

    def plain(_: Ledger) -> list[int]:
        opened = optuna.storages.RDBStorage(url)
        ids = [opened.create_new_trial(study.study_id) for _ in range(20)]
        made = [opened.get_trial_number_from_id(trial_id) for trial_id in ids]
        opened.remove_session()
        opened.engine.dispose()
        return made

    def ours(ledger: Ledger) -> list[int]:
        return [claim.number for _ in range(8) for claim in many_of(ledger, 7)]

    found = at_once(url, study, plain, ours, plain, ours)
    given = [number for one in found if isinstance(one, list) for number in one]
    assert sorted(given) == list(range(2 * 20 + 2 * 56))
    assert numbered(study) == sorted(given)


def test_a_claim_that_fails_half_way_leaves_nothing(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=9)
    park_as(study, "a", "a")
    study.optuna.enqueue_trial({"x": 0.5})

    def broken(*arguments: object, **settings: object) -> Any:
        raise sa.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    for what in ("insert_trials", "set_states"):
        with monkeypatch.context() as patched:
            patched.setattr(trial_writes, what, broken)
            with pytest.raises(sa.exc.OperationalError):
                claiming.claim_many(study.ledger("w"), 9, stack_key="a")
        assert leases(study) == [None, None]
        assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "RUNNING", "WAITING"]
    assert [(claim.number, claim.attempt) for claim in many(study, 4, stack_key="a")] == [
        (0, 2),
        (1, 2),
        (2, 1),
        (3, 1),
    ]


def test_claims_whose_answer_was_lost_are_given_back(
    make_study: MakeStudy,
) -> None:
    """After a claim whose answer was lost the worker gives back what it does not know of."""
    study = make_study(trials=9)
    ledger = study.ledger("w")
    known, stale = many(study, 2), many(study, 1)
    ledger.park(stale[0])
    unheard = many(study, 3)  # the stale one, taken up by the worker that holds its earlier attempt
    assert {claim.trial_id for claim in unheard} >= {stale[0].trial_id}
    others = many(study, 2)
    reaper.release_leases_of(ledger, "w", but=[*known, *stale])
    assert ledger.renew_all([*known, *stale, *unheard, *others]) == {*stale, *unheard, *others}
    assert numbers(many(study, 9, stack_key="a")) == [2, 3, 4, 5, 6, 7, 8]
