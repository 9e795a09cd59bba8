"""Trials are taken from workers that are gone, each once, and from nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease
from hpo.queue import finish, lease_clock, reaper, workers
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.reaper import Reaper
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql, tables
from hpo.storage.tables import Hold, hpo_failures, hpo_studies, hpo_trials, hpo_workers
from hpo.study import control
from hpo.study.study import Study
from tests.support.trials import (
    MakeStudy,
    begin,
    claim_one,
    finish_claim,
    reap,
    trial_of,
)

pytestmark = pytest.mark.both

LEASE = 60.0


def taken(study: Study, worker: str = "dead", *, lease_seconds: float = -1.0) -> Claim:
    """Claim a trial for a worker whose lease is over as it begins."""
    claim = claim_one(study.ledger(worker, lease_seconds=lease_seconds))
    assert isinstance(claim, Claim)
    return claim


def rows(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        of_study = sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)
        return list(connection.execute(of_study.order_by(hpo_trials.c.trial_id)))


def failures(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        return list(
            connection.execute(sa.select(hpo_failures).order_by(hpo_failures.c.trial_id, hpo_failures.c.attempt))
        )


# --- leases that ran out ----------------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_is_taken_and_one_that_runs_is_not(make_study: MakeStudy) -> None:
    study = make_study()
    taken(study, "dead"), taken(study, "living", lease_seconds=LEASE)
    assert reap(study) == 1
    assert [row.lease_until is None for row in rows(study)] == [True, False]
    (failure,) = failures(study)
    assert (failure.kind, failure.verdict, failure.attempt, failure.worker) == ("lost_worker", "retry", 1, "dead")
    assert failure.message == "its worker did not renew its lease in time (dead)"
    assert failure.traceback is None
    assert trial_of(study, 0).state == TrialState.RUNNING


def test_reaping_twice_is_reaping_once(make_study: MakeStudy) -> None:
    study = make_study()
    taken(study)
    assert [reap(study) for _ in range(3)] == [1, 0, 0]
    assert len(failures(study)) == 1


@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_leases_run_out_by_the_database_s_clock_and_not_by_the_reaper_s(
    ahead: float, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    taken(study, "dead"), taken(study, "living", lease_seconds=LEASE)
    right = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: right() + ahead)
        assert reap(study) == 1
    assert [row.lease_until is None for row in rows(study)] == [True, False]


def test_only_running_trials_of_this_study_are_reaped(make_study: MakeStudy) -> None:
    study, other = make_study(trials=9), make_study(trials=9, name="other")
    parked, ended, done = (taken(study) for _ in range(3))
    study.ledger("dead").park(parked)
    finish_claim(study.ledger("dead"), done, TrialState.COMPLETE, 1.0, outcome="complete")
    study.optuna.tell(ended.number, 0.5)
    study.optuna.ask()
    taken(other)
    assert reap(study) == 0
    assert failures(study) == []
    assert [row.lease_until is None for row in rows(other)] == [False]


def test_a_trial_that_was_taken_goes_on_from_its_checkpoint(make_study: MakeStudy) -> None:
    study = make_study()
    claim = taken(study)
    checkpoint = Checkpoint(epoch=1, path="/c.pt", digest="abc")
    study.ledger("dead", lease_seconds=-1.0).record_checkpoint(claim, checkpoint)
    assert reap(study) == 1
    _, again, _ = begin(study, "next")
    assert (again.number, again.attempt, again.checkpoint) == (0, 2, checkpoint)


def test_a_worker_that_comes_back_to_a_reaped_trial_finds_it_lost(make_study: MakeStudy) -> None:
    study = make_study()
    claim = taken(study)
    reap(study)
    ledger = study.ledger("dead")
    assert ledger.renew_all([claim]) == {claim}
    assert ledger.commands_of([claim])[claim].lost
    with pytest.raises(LostLease):
        finish_claim(ledger, claim, TrialState.COMPLETE, 1.0, outcome="complete")
    assert trial_of(study, 0).state == TrialState.RUNNING


def test_the_third_loss_ends_a_trial(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    for expected in (TrialState.RUNNING, TrialState.RUNNING, TrialState.FAIL):
        taken(study)
        assert reap(study) == 1
        assert trial_of(study, 0).state == expected
    assert [(row.attempt, row.verdict) for row in failures(study)] == [(1, "retry"), (2, "retry"), (3, "fail")]
    (row,) = rows(study)
    assert (row.settled, row.lease_until, row.outcome) == (True, None, "lost_worker")
    assert row.reason == "its worker did not renew its lease in time (dead)"
    assert claim_one(study.ledger("w")) is Idle.DONE


def test_a_loss_that_ends_a_trial_may_leave_it_pruned_with_its_value(make_study: MakeStudy) -> None:
    study = make_study(failures={"lost_worker": {"retries": 0, "then": "prune"}})
    ledger, _, trial = begin(study)
    trial.report(0.5, 1)
    assert reaper.fail_leases_of(ledger, "w", "killed") == 1
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.PRUNED, 0.5)


def test_workers_lost_one_after_the_other_break_a_study(make_study: MakeStudy) -> None:
    study = make_study(failures={"lost_worker": {"retries": 0}, "in_a_row": 3})
    for _ in range(3):
        taken(study)
    assert reap(study) == 3
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_studies)).one()
    assert row.hold == Hold.BROKEN
    assert row.stop_reason.startswith(
        "3 trials in a row ended by lost_worker, the last: its worker did not renew its lease"
    )


# --- workers that died ------------------------------------------------------------------------------------------------


def test_only_the_dead_worker_s_trials_are_taken_though_their_leases_run(make_study: MakeStudy) -> None:
    study = make_study()
    for worker in ("host:1:aa", "host:1:ab", "host:1:aa"):
        taken(study, worker, lease_seconds=LEASE)
    assert reaper.fail_leases_of(study.ledger("launcher"), "host:1:aa", "killed by SIGKILL") == 2
    assert [row.lease_until is None for row in rows(study)] == [True, False, True]
    assert {row.message for row in failures(study)} == {"its worker died: killed by SIGKILL (host:1:aa)"}
    assert reaper.fail_leases_of(study.ledger("launcher"), "host:1:aa", "killed by SIGKILL") == 0
    assert len(failures(study)) == 2


def test_a_dead_worker_has_no_part_in_a_trial_that_another_has_taken_up(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    study.ledger("old").park(taken(study, "old", lease_seconds=LEASE))
    taken(study, "new", lease_seconds=LEASE)
    assert reaper.fail_leases_of(study.ledger("launcher"), "old", "exit code 1") == 0
    assert rows(study)[0].lease_until is not None


def test_a_worker_that_left_gives_its_trials_back(make_study: MakeStudy) -> None:
    """A worker that left in peace gives its trials back without a failure."""
    study = make_study()
    for worker in ("leaving", "staying"):
        taken(study, worker, lease_seconds=LEASE)
    reaper.release_leases_of(study.ledger("launcher"), "leaving")
    assert [row.lease_until is None for row in rows(study)] == [True, False]
    assert failures(study) == []


@pytest.mark.parametrize(("curve", "state", "value"), [((0.5,), TrialState.PRUNED, 0.5), ((), TrialState.FAIL, None)])
@pytest.mark.parametrize("way", ["reap", "fail_leases_of"])
def test_a_lost_trial_that_a_person_has_ended_ends_and_is_not_parked(
    way: str, curve: tuple[float, ...], state: TrialState, value: float | None, make_study: MakeStudy
) -> None:
    study = make_study()
    ledger, _, trial = begin(study, "dead")
    for step, reported in enumerate(curve, start=1):
        trial.report(reported, step)
    assert not control.stop_trial(study, 0)
    if way == "fail_leases_of":
        assert reaper.fail_leases_of(study.ledger("launcher"), "dead", "killed") == 1
    else:
        with sql.writing(ledger.engine) as connection:
            connection.execute(hpo_trials.update().values(lease_until=1.0))
        assert reap(study) == 1
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (state, value)
    assert (rows(study)[0].settled, rows(study)[0].outcome) == (True, "stopped")
    assert [(row.kind, row.verdict) for row in failures(study)] == [("lost_worker", "drop")]


# --- the timer --------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test sets."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def beside_another(study: Study) -> None:
    """Let another process have worked on the study for a while: then the storage was not away."""
    other = study.ledger("another")
    workers.register(other)
    with sql.writing(other.engine) as connection:
        connection.execute(hpo_workers.update().values(started_at=1.0))


def begun(study: Study, clock: Clock) -> Reaper:
    """Return a reaper that has been at work just now, and a trial that it could take from now on."""
    reaper = Reaper(study.ledger("w", lease_seconds=LEASE), clock=clock)
    beside_another(study)
    assert reaper() == 0
    taken(study)
    return reaper


def test_a_reaper_takes_what_is_expired_at_its_start(make_study: MakeStudy, clock: Clock) -> None:
    """A reaper beside others takes what is expired as soon as it starts."""
    study = make_study()
    taken(study)
    beside_another(study)
    reaper = Reaper(study.ledger("w", lease_seconds=LEASE), clock=clock)
    assert reaper.is_due
    assert reaper() == 1


@pytest.mark.parametrize("company", ["none", "itself", "one that just came", "one long silent", "another study's"])
def test_a_reaper_that_starts_alone_waits_half_a_lease(company: str, make_study: MakeStudy, clock: Clock) -> None:
    study = make_study()
    taken(study)
    ledger = study.ledger("w", lease_seconds=LEASE)
    if company == "itself":
        workers.register(ledger)
    elif company == "another study's":
        beside_another(make_study(name="other"))
    elif company != "none":
        beside_another(study)
    silent = {
        "itself": {"started_at": 1.0},
        "one that just came": {"started_at": 1e12},
        "one long silent": {"seen_at": 2.0},
    }
    with sql.writing(study.storage.engine) as connection:
        if values := silent.get(company):
            connection.execute(hpo_workers.update().values(**values))
    reaper = Reaper(ledger, clock=clock)
    took = [reaper()]
    for _ in range(3):
        clock.seconds += LEASE / 6
        took.append(reaper())
    assert took == [0, 0, 0, 1]


def test_a_reaper_is_due_six_times_a_lease(make_study: MakeStudy, clock: Clock) -> None:
    reaper = begun(make_study(), clock)
    assert not reaper.is_due
    clock.seconds += LEASE / 6 - 0.1
    assert not reaper.is_due
    clock.seconds += 0.2
    assert reaper.is_due
    assert reaper() == 1
    assert not reaper.is_due


def test_a_reaper_that_was_away_itself_gives_everybody_a_lease_s_time(make_study: MakeStudy, clock: Clock) -> None:
    reaper = begun(make_study(), clock)
    clock.seconds += LEASE / 2 + 1  # the storage was away, or this process was: others may have been silent for it
    took = [reaper()]
    for _ in range(6):
        clock.seconds += LEASE / 6
        took.append(reaper())
    assert took == [0, 0, 0, 0, 0, 0, 1]


def test_a_gap_of_half_a_lease_is_none(make_study: MakeStudy, clock: Clock) -> None:
    reaper = begun(make_study(), clock)
    clock.seconds += LEASE / 2
    assert reaper() == 1


def test_a_storage_that_is_always_slow_does_not_keep_the_dead_alive(make_study: MakeStudy, clock: Clock) -> None:
    reaper = begun(make_study(), clock)
    took = []
    for _ in range(6):
        clock.seconds += LEASE + 1
        took.append(reaper())
    assert took == [0, 0, 0, 0, 0, 1]


def test_a_gap_after_the_dead_were_reaped_is_a_gap_again(make_study: MakeStudy, clock: Clock) -> None:
    study = make_study()
    reaper = begun(study, clock)
    for _ in range(3):
        clock.seconds += 10 * LEASE
        assert reaper() == 0
        clock.seconds += LEASE / 2
        assert reaper() == 0
        clock.seconds += LEASE / 2
        assert reaper() == 1
        taken(study)


def test_the_time_that_a_reaper_waits_for_the_storage_is_a_gap(
    make_study: MakeStudy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaper = begun(make_study(), clock)
    stamp = workers.stamp

    def slow(connection: sa.Connection, ledger: Ledger) -> None:
        clock.seconds += LEASE
        stamp(connection, ledger)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "stamp", slow)
        took = [reaper()]
    for _ in range(3):
        took.append(reaper())
        clock.seconds += LEASE / 2
    assert took == [0, 0, 0, 1]


def test_an_attempt_that_the_storage_refused_does_not_end_a_gap(
    make_study: MakeStudy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaper = begun(make_study(), clock)

    def refused(connection: sa.Connection, ledger: Ledger) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))

    for _ in range(6):
        clock.seconds += LEASE / 6
        with monkeypatch.context() as patched:
            patched.setattr(workers, "stamp", refused)
            with pytest.raises(sa.exc.OperationalError):
                reaper()
    took = [reaper()]
    for _ in range(2):
        clock.seconds += LEASE / 2
        took.append(reaper())
    assert took == [0, 0, 1]


def test_a_reaper_stamps_its_worker_s_row_even_while_it_holds_off(make_study: MakeStudy, clock: Clock) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=LEASE)
    workers.register(ledger)
    with sql.writing(ledger.engine) as connection:
        connection.execute(hpo_workers.update().values(seen_at=1.0))
    Reaper(ledger, clock=clock)()
    with ledger.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_workers.c.seen_at)).scalar_one() > 1e9


# --- side by side -----------------------------------------------------------------------------------------------------


def together(*acts: Callable[[], object]) -> list[object]:
    """Do all of it at one instant, each in a thread; return what came of each."""
    ready, results = threading.Barrier(len(acts)), dict[int, object]()

    def run(index: int, act: Callable[[], object]) -> None:
        ready.wait()
        results[index] = act()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(acts))]


def test_two_reapers_at_one_instant_take_each_trial_once(make_study: MakeStudy, clock: Clock) -> None:
    study = make_study(trials=20)
    for _ in range(20):
        taken(study)
    beside_another(study)
    reapers = [Reaper(study.ledger(worker), clock=clock) for worker in ("one", "other")]
    counts = together(*reapers)
    left = reap(study)  # what one had locked as the other looked was skipped
    assert sum(count for count in counts if isinstance(count, int)) + left == 20
    assert [(row.attempt, row.kind, row.verdict) for row in failures(study)] == [(1, "lost_worker", "retry")] * 20
    assert {row.lease_until for row in rows(study)} == {None}


def test_a_reaper_and_a_parent_that_buries_take_a_trial_once(make_study: MakeStudy) -> None:
    study = make_study(trials=10)
    for _ in range(10):
        taken(study)
    launcher = study.ledger("launcher")
    together(lambda: reap(study), lambda: reaper.fail_leases_of(launcher, "dead", "killed"))
    reap(study)
    assert [(row.attempt, row.verdict) for row in failures(study)] == [(1, "retry")] * 10


def reaped_while(study: Study, write: Callable[[sa.Connection], object]) -> object:
    """Return what a reaper takes that begins while another transaction has written this and not yet committed."""
    return while_written(study, write, lambda: reap(study))


def while_written(study: Study, write: Callable[[sa.Connection], object], act: Callable[[], object]) -> object:
    """Return what comes of an act, an error included, that begins while this is written and not yet committed."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:
            found.append(error)

    reaper = threading.Thread(target=run)
    with sql.writing(study.storage.engine) as connection:
        write(connection)
        reaper.start()
        reaper.join(timeout=0.5)  # SQLite lets it wait, Postgres skips the row
    reaper.join()
    return found[0]


def test_a_trial_that_ends_while_the_reaper_waits_is_not_touched(make_study: MakeStudy) -> None:
    study = make_study()
    claim = taken(study)
    (row,) = rows(study)

    def end(connection: sa.Connection) -> None:

        finish.close(connection, row, outcome="complete", reason=None)
        ended = finish.End(claim=claim, state=TrialState.COMPLETE, value=1.0, outcome="complete")
        finish.succeed(connection, row.study_uid, [ended])

    assert reaped_while(study, end) == 0
    assert reap(study) == 0
    assert failures(study) == []
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.COMPLETE, 1.0)
    assert rows(study)[0].outcome == "complete"


def test_a_trial_that_fails_while_the_reaper_waits_fails_by_its_own_kind(make_study: MakeStudy) -> None:
    study = make_study()
    taken(study)
    (row,) = rows(study)
    failed = Failure(kind=Kind.DATA_ERROR, message="no such file")
    assert reaped_while(study, lambda connection: finish.fail(connection, row, failed, study.spec.failures)) == 0
    assert reap(study) == 0
    assert [row.kind for row in failures(study)] == ["data_error"]


def test_a_lease_that_is_renewed_while_the_reaper_waits_is_not_taken(make_study: MakeStudy) -> None:
    study = make_study()
    taken(study)

    def renew(connection: sa.Connection) -> None:
        connection.execute(hpo_trials.update().values(lease_clock.lease(connection.dialect.name, LEASE)))

    assert reaped_while(study, renew) == 0
    assert reap(study) == 0
    assert failures(study) == []
    assert rows(study)[0].lease_until is not None


@pytest.mark.parametrize("way", ["reap", "fail_leases_of", "hpo stop --now"])
def test_an_end_at_that_instant_saves_no_other_trial(way: str, make_study: MakeStudy) -> None:
    """A trial that something else ends at that instant does not save the others."""
    study = make_study(failures={"lost_worker": {"retries": 0}})
    told, lost = taken(study), taken(study)
    if way == "hpo stop --now":
        for claim in (told, lost):
            study.ledger("dead").park(claim)
    acts: dict[str, Callable[[], object]] = {
        "reap": lambda: reap(study),
        "fail_leases_of": lambda: reaper.fail_leases_of(study.ledger("launcher"), "dead", "killed"),
        "hpo stop --now": lambda: control.stop(study, now=True),
    }

    def tell(connection: sa.Connection) -> None:  # as the dashboard does
        ended = {"state": TrialState.COMPLETE, "datetime_complete": tables.utc()}
        connection.execute(tables.trials.update().where(tables.trials.c.trial_id == told.trial_id).values(**ended))

    found = while_written(study, tell, acts[way])
    assert isinstance(found, int), repr(
        found
    )  # a Signal would end the heartbeat's thread, or the command with a traceback
    acts[way]()
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["COMPLETE", "FAIL"]
