"""Limits beside the number of trials: the same for every worker, by the storage's clocks, and gone once they are raised."""

from __future__ import annotations

import re
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.errors import SpecError, StudyError
from hpo.queue import claiming, limits, workers
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.queue.reaper import Reaper
from hpo.spec.budget import HOUR
from hpo.spec.study_file import StudySpec
from hpo.storage import study_rows
from hpo.storage.tables import Hold, hpo_workers
from hpo.study import control
from hpo.study import study as studies
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.view import pages
from tests.conftest import OWN_OBJECTIVE
from tests.support.trials import MakeStudy, claim_one, finish_claim, taken


def ended(ledger: Ledger, value: float | None, state: TrialState = TrialState.COMPLETE) -> int:
    """Run a trial to its end and return its number."""
    claim = taken(ledger)
    finish_claim(ledger, claim, state, value, outcome="complete")
    return claim.number


def limited(study: Study) -> dict[str, limits.Limit]:
    with study.storage.engine.connect() as connection:
        found = limits.look(connection, study_rows.living_row(connection, study.study_id))
    return {one.key: one for one in found}


def began(study: Study, ledger: Ledger, seconds: float) -> None:
    """Register a worker as one that started so many seconds ago."""
    workers.register(ledger)
    with study.storage.engine.begin() as connection:
        moved = hpo_workers.update().where(hpo_workers.c.worker == ledger.worker)
        connection.execute(moved.values(started_at=hpo_workers.c.started_at - seconds))


def raised(study: Study, **budget: Any) -> Study:
    """Join the study as an `hpo run` with another budget does."""
    spec = StudySpec.from_document({**OWN_OBJECTIVE, "budget": {"trials": 100, **budget}})
    spec = spec.model_copy(update={"checkpoints": study.spec.checkpoints})
    return studies.create_or_join(study.storage, spec, code_folder=study.code_folder, code_digest="")


@pytest.mark.both
def test_a_target_ends_the_search_and_lets_running_trials_finish(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "target": 0.1})
    ledger, other = study.ledger("a"), study.ledger("b")
    assert ended(ledger, 0.11) == 0
    running = taken(other)
    assert ended(ledger, 0.1) == 2
    for each in (ledger, other):
        assert claiming.claim_many(each, 1) is Idle.WAIT
    assert summarize(study).stop_reason == "budget.target = 0.1 is reached: trial 2 has 0.1"
    finish_claim(other, running, TrialState.COMPLETE, 0.2, outcome="complete")
    assert claiming.claim_many(other, 1) is Idle.DONE
    assert summarize(study).is_over

    assert raised(study, target=0.1).stop_reason == "budget.target = 0.1 is reached: trial 2 has 0.1"
    assert raised(study, target=0.01).stop_reason is None
    assert claim_one(ledger) == Claim(trial_id=taken_id(study, 3), number=3, attempt=1)


def taken_id(study: Study, number: int) -> int:
    return study.optuna.get_trials(deepcopy=False)[number]._trial_id


@pytest.mark.both
def test_patience_counts_what_ended_since_the_best(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "patience": 3})
    ledger = study.ledger("w")
    ended(ledger, None, TrialState.PRUNED)
    assert limited(study)["patience"].used == 0  # nothing can be better than nothing
    for value in (0.5, 0.6, 0.7, 0.4):
        ended(ledger, value)
    ended(ledger, 0.4)  # as good, and not better
    ended(ledger, None, TrialState.PRUNED)
    ended(ledger, None, TrialState.FAIL)
    assert (limited(study)["patience"].used, limited(study)["patience"].trial) == (2, 4)
    ended(ledger, 0.9)
    assert claiming.claim_many(ledger, 1) is Idle.DONE
    said = "budget.patience = 3 is spent: 3 trials ended without a better value than trial 4's"
    assert summarize(study).stop_reason == said
    assert raised(study, patience=4).stop_reason is None
    assert isinstance(claim_one(ledger), Claim)


@pytest.mark.both
def test_a_trial_that_violates_a_constraint_reaches_no_target(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "target": 0.1})
    ledger = study.ledger("w")
    claim = taken(ledger)
    study.storage.optuna.set_trial_system_attr(claim.trial_id, "constraints:size", 1e-7)
    finish_claim(ledger, claim, TrialState.COMPLETE, 0.0, outcome="complete")
    assert limited(study)["target"].is_spent is False
    claim = taken(ledger)
    study.storage.optuna.set_trial_system_attr(claim.trial_id, "constraints:size", float("inf"))
    finish_claim(ledger, claim, TrialState.COMPLETE, 0.0, outcome="complete")
    assert limited(study)["target"].is_spent is False
    claim = taken(ledger)
    study.storage.optuna.set_trial_system_attr(claim.trial_id, "constraints:size", -0.5)
    study.storage.optuna.set_trial_system_attr(claim.trial_id, "constraints:odd", float("nan"))  # no number above 0
    finish_claim(ledger, claim, TrialState.COMPLETE, 0.05, outcome="complete")
    assert (limited(study)["target"].is_spent, limited(study)["target"].trial) == (True, 2)


def test_a_limit_that_was_raised_meanwhile_stops_nothing(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "wall_clock": "1h"})
    began(study, study.ledger("w"), 2 * HOUR)
    with study.storage.engine.begin() as connection:
        old = study_rows.living_row(connection, study.study_id)
    raised(study, wall_clock="9h")
    with study.storage.engine.begin() as connection:
        limits.enforce(connection, old)
    assert (summarize(study).hold, summarize(study).stop_reason) == (None, None)


@pytest.mark.both
@pytest.mark.parametrize("budget", [{"wall_clock": "1h"}, {"gpu_hours": 1.0}])
def test_a_spent_time_parks_running_trials_and_lets_workers_leave(
    make_study: MakeStudy, budget: dict[str, Any]
) -> None:
    study = make_study(budget={"trials": 100, **budget})
    ledger, other = study.ledger("a"), study.ledger("b")
    began(study, ledger, HOUR - 600)
    held = taken(ledger)
    parked = taken(ledger)
    ledger.park(parked)
    assert (ledger.commands_of([held])[held].park, summarize(study).hold) == (False, None)
    began(study, ledger, 600)  # a restart keeps the first start
    Reaper(other)()  # the heartbeat of any worker
    assert (ledger.commands_of([held])[held].park, summarize(study).hold) == (True, Hold.SPENT)
    ledger.park(held)
    for each in (ledger, other):
        assert claiming.claim_many(each, 1) is Idle.DONE
    with pytest.raises(StudyError, match=r"is spent; change it in \[budget\], then hpo run again"):
        control.resume(study)
    key = next(iter(budget))
    assert f"stopped  budget.{key}" in pages.status_text(summarize(study))

    assert raised(study, **budget).stop_reason is not None
    assert raised(study, **{key: "3h" if key == "wall_clock" else 3.0}).stop_reason is None
    claim = taken(other)
    assert (claim.number, claim.attempt) == (held.number, 2)
    assert 0 < (limited(study)[key].seconds_left or 0) < 2 * HOUR


@pytest.mark.both
def test_a_claim_finds_a_spent_time_by_itself(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "wall_clock": "1h"})
    began(study, study.ledger("dead"), 2 * HOUR)  # it is killed, and its row stays
    assert claiming.claim_many(study.ledger("w"), 1) is Idle.DONE
    assert summarize(study).counts["running"] == 0


def test_a_study_stopped_by_a_person_stays_stopped_when_its_limit_is_raised(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "wall_clock": "1h"})
    ledger = study.ledger("w")
    with study.storage.engine.begin() as connection:
        study_rows.update(connection, study.uid, stop_reason="by `hpo stop`")
    began(study, ledger, 2 * HOUR)
    assert claiming.claim_many(ledger, 1) is Idle.DONE
    assert (summarize(study).hold, summarize(study).stop_reason) == (Hold.SPENT, "by `hpo stop`")
    assert raised(study, wall_clock="9h").stop_reason == "by `hpo stop`"
    assert summarize(study).hold is None


Lived = tuple[float, float, str | None, str | None]  # from, to, CUDA_VISIBLE_DEVICES, clock


@pytest.mark.both
def test_time_is_counted_once_for_what_is_shared(make_study: MakeStudy) -> None:
    study = make_study(budget={"trials": 100, "gpu_hours": 1.0})

    def counted(*lived: Lived) -> tuple[float, float]:
        with study.storage.engine.connect() as connection:
            for number, (start, end, gpus, clock) in enumerate(lived):
                row = {"worker": f"w{number}", "started_at": start, "seen_at": end, "left_at": end}
                fixed = {"study_uid": study.uid, "study_id": study.study_id, "host": "h", "pid": 1, "clock_skew": 0.0}
                connection.execute(hpo_workers.insert().values(**row, **fixed, gpus=gpus, clock=clock, versions="{}"))
            found = limits.worker_time(connection, study_rows.living_row(connection, study.study_id), devices=True)
            connection.rollback()
        assert found is not None
        assert found.devices == 0
        return found.wall, found.gpu

    one, pair = "GPU-1", "GPU-2,GPU-3"
    assert counted((0, 10, one, "a"), (5, 20, one, "a"), (6, 7, one, "a"), (30, 40, one, "a")) == (30, 30)
    assert counted((0, 10, pair, "a"), (5, 20, "GPU-2, GPU-3", "a"), (30, 40, one, "b")) == (30, 50)
    by_number = [(0.0, 10.0, "0", "a"), (0.0, 10.0, "0,1", "a")]  # an engine numbers those of each job anew
    assert counted(*by_number) == (10, 30)
    assert counted((0, 10, None, "a"), (0, 10, "", "a"), (0, 10, "-1", "b")) == (20, 30)


WRONG: dict[str, dict[str, Any]] = {
    "budget.target: several objectives have a front and no best value": {
        "objectives": {"a": "minimize", "b": "maximize"},
        "budget": {"target": 0.5},
    },
    "budget.patience: several objectives": {
        "objectives": {"a": "minimize", "b": "maximize"},
        "budget": {"patience": 5},
    },
    "budget.target = nan: no trial has such a value": {"budget": {"target": float("nan")}},
    "budget.wall_clock": {"budget": {"wall_clock": "soon"}},
    "budget.gpu_hours": {"budget": {"gpu_hours": 0.0}},
    "budget.gpu_hours = inf": {"budget": {"gpu_hours": float("inf")}},
    "budget.patience": {"budget": {"patience": 0}},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_limit_is_refused(said: str) -> None:
    document = {
        key: value for key, value in OWN_OBJECTIVE.items() if key != "direction" or "objectives" not in WRONG[said]
    }
    with pytest.raises(SpecError, match=re.escape(said)):
        StudySpec.from_document({**document, **WRONG[said]})


def test_a_budget_without_limits_is_stored_as_before(make_study: MakeStudy) -> None:
    study = make_study()
    assert study.spec.document["budget"] == {"trials": 10}


@pytest.mark.both
def test_a_spent_time_ends_the_wait_of_a_paused_study(make_study: MakeStudy) -> None:
    """Its workers occupy their machines while they wait. A parked trial is no reason to stay."""
    study = make_study(budget={"trials": 100, "wall_clock": "1h"})
    ledger = study.ledger("w")
    workers.register(ledger)
    ledger.park(taken(ledger))
    control.pause(study)
    assert claiming.claim_many(ledger, 1) is Idle.WAIT
    assert claiming.must_wait(ledger)
    began(study, ledger, HOUR)
    Reaper(ledger)()
    assert not claiming.must_wait(ledger)
    assert claiming.claim_many(ledger, 1) is Idle.DONE
