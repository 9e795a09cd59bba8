"""How a worker comes by a trial, in studies that are held up and beside workers that claim at the same instant.

What a claim takes first, and what the budget allows, stands in test_ledger.py.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import claiming, control, storage
from hpo.claim import Claim
from hpo.claiming import Idle
from hpo.db import sql
from hpo.db.tables import Hold, hpo_studies, hpo_trials
from hpo.errors import StudyError
from hpo.failures import Failure, Kind
from hpo.study import Study
from tests.trials import begin

MakeStudy = Callable[..., Study]


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
    assert claiming.claim(study.ledger("w")) is Idle.DONE
    assert leases(study) == [None, None]
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "FAIL", "WAITING"]


def test_a_paused_study_lets_workers_wait_and_leaves_what_is_parked(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    study.optuna.enqueue_trial({"x": 0.5})
    control.pause(study)
    assert claiming.claim(study.ledger("w")) is Idle.WAIT
    assert leases(study) == [None]
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["RUNNING", "WAITING"]


def test_a_paused_study_lets_workers_wait_though_nothing_is_open_yet(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    control.pause(study)
    assert claiming.claim(study.ledger("w")) is Idle.WAIT
    assert study.optuna.get_trials() == []


def test_a_paused_study_that_is_stopped_as_well_lets_workers_wait_for_what_is_parked(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    control.pause(study)
    control.stop(study)  # which promises that what is open is still finished
    assert claiming.claim(study.ledger("w")) is Idle.WAIT


def test_a_study_that_trials_are_being_copied_into_starts_none(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(hold=Hold.FORKING, stop_reason="a fork was cut off"))
    assert claiming.claim(study.ledger("w")) is Idle.DONE
    assert study.optuna.get_trials() == []


def test_after_a_pause_what_was_parked_goes_first(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    control.pause(study)
    control.resume(study)
    assert [begin(study)[1].number for _ in range(2)] == [0, 1]


def test_a_broken_study_that_a_person_resumes_goes_on_with_what_is_parked(make_study: MakeStudy) -> None:
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
    assert claiming.claim(study.ledger("w")) is Idle.DONE


def test_a_claim_says_from_where_and_with_which_batches_the_trial_goes_on(make_study: MakeStudy) -> None:
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
    assert claiming.claim(study.ledger("w")) is Idle.WAIT


def test_nothing_is_claimed_in_a_deleted_study(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    parked(study)
    optuna.delete_study(study_name=study.name, storage=study.storage.optuna)
    with pytest.raises(StudyError, match="was deleted while this worker ran"):
        claiming.claim(study.ledger("w"))


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
        place = storage.connect(url)  # a process of its own has an engine of its own
        ledger = dataclasses.replace(study.ledger(worker), engine=place.engine)
        ready.wait()
        claims.append(claiming.claim(ledger))
        place.close()

    threads = [threading.Thread(target=work, args=[f"w{n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.number for claim in claims if isinstance(claim, Claim)) == [0, 1, 2, 3]
    assert [trial.number for trial in study.optuna.get_trials()] == [0, 1, 2, 3]
