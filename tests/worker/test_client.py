"""What a worker sends for all trials that it holds: in few statements, in order, and one trial's trouble is its own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease, NoAnswer, Outage, Stopped
from hpo.queue import claiming
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report, ReportResult
from hpo.storage import clock, sql, study_rows
from hpo.storage.retry import Retry
from hpo.storage.tables import hpo_trials
from hpo.study import control
from hpo.study.study import Study
from hpo.worker import client, lease_upkeep, storage_calls
from hpo.worker.client import ClaimRequest, QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.lease import Lease
from tests.support.trials import AN_OUTAGE, MakeStudy, client_of, finish_claim, refused, said
from tests.support.waiting import PATIENCE, wait_for


def opened(study: Study, count: int, *, retry: float = 60.0, **ledger: Any) -> tuple[QueueClient, list[Lease]]:
    """Return a client and so many leases in it."""
    queue_client = client_of(study.ledger("w", **ledger), Retry(retry))
    return queue_client, more(queue_client, count)


def more(queue_client: QueueClient, count: int) -> list[Lease]:
    claims = claiming.claim_many(queue_client.ledger, count)
    assert not isinstance(claims, claiming.Idle)
    return [queue_client.hold(claim) for claim in claims]


def epoch(leases: Sequence[Lease], step: int) -> list[Report]:
    return [said(lease, step) for lease in leases]


def seen(study: Study) -> list[list[int]]:
    """Return the steps that Optuna has of each trial."""
    return [sorted(trial.intermediate_values) for trial in study.optuna.get_trials(deepcopy=False)]


def curves(queue_client: QueueClient, leases: Sequence[Lease]) -> list[list[float]]:
    return [queue_client.curve(lease, "value") for lease in leases]


def until(study: Study) -> list[float | None]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_trials.c.lease_until).order_by(hpo_trials.c.trial_id)).scalars())


def lose(study: Study, *leases: Lease) -> None:
    """Let another worker have trials."""
    for lease in leases:
        study.ledger("w").park(lease.claim)
    claims = claiming.claim_many(study.ledger("thief"), len(leases), stack_key="any")
    assert not isinstance(claims, claiming.Idle)
    assert {claim.trial_id for claim in claims} == {lease.claim.trial_id for lease in leases}


def is_lost(queue_client: QueueClient, lease: Lease) -> bool:
    try:
        lease.check()
    except LostLease:
        assert queue_client.must_end(lease)
        return True
    return queue_client.must_end(lease)


class Noted:
    """What a method of the ledger is called with, before it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        real = getattr(Ledger, name)

        def method(ledger: Ledger, given: Any, **settings: Any) -> Any:
            self.calls.append((list(given), settings))
            return real(ledger, given, **settings)

        monkeypatch.setattr(Ledger, name, method)

    @property
    def sizes(self) -> list[int]:
        return [len(given) for given, _ in self.calls]


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let the first report hang until this is set; what it does is done then."""
    answer, calls, left, report = threading.Event(), [0], [0], Ledger.report

    def hanging(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        calls[0] += 1
        if calls[0] == 1:
            assert answer.wait(PATIENCE)
        try:
            return report(ledger, reports, **settings)
        finally:
            left[0] += 1

    monkeypatch.setattr(Ledger, "report", hanging)
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 0.2)
    yield answer
    answer.set()
    wait_for(lambda: left == calls)  # before the database goes


# --- an epoch of many -------------------------------------------------------------------------------------------------


def test_an_epoch_of_many_trials_is_one_report(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of many trials is one report and their raw metrics wait."""
    study = make_study(trials=20)
    queue_client, leases = opened(study, 16)
    reports = Noted(monkeypatch, "report")
    for step in (1, 2, 3):
        queue_client.report(epoch(leases, step))
    assert reports.sizes == [16, 16, 16]
    assert seen(study) == [[1, 2, 3]] * 16
    assert queue_client.finished == 0
    assert curves(queue_client, leases) == [[]] * 16
    metrics = Noted(monkeypatch, "write_metrics")
    queue_client.send_metrics()  # as the heartbeat does at every tick
    assert metrics.sizes == []
    monkeypatch.setattr(client, "METRICS_SECONDS", 0.0)
    queue_client.send_metrics()
    assert metrics.sizes == [48]
    assert curves(queue_client, leases) == [[1.0, 2.0, 3.0]] * 16
    queue_client.flush()
    assert metrics.sizes == [48]


def test_raw_metrics_of_very_many_reports_are_written_in_parts(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=8)
    queue_client, leases = opened(study, 8)
    for step in range(1, 11):
        queue_client.report(epoch(leases, step))
    metrics = Noted(monkeypatch, "write_metrics")
    monkeypatch.setattr(client, "METRICS_AT_ONCE", 30)
    queue_client.flush()
    assert metrics.sizes == [30, 30, 20]
    assert curves(queue_client, leases) == [[float(step) for step in range(1, 11)]] * 8


@pytest.mark.both
def test_those_that_were_lost_learn_of_it_and_the_others_do_not(make_study: MakeStudy) -> None:
    study = make_study(trials=6)
    queue_client, leases = opened(study, 6)
    queue_client.report(epoch(leases, 1))
    lose(study, leases[1], leases[4])
    study.optuna.tell(5, state=TrialState.FAIL)
    queue_client.report(epoch(leases, 2))
    assert [is_lost(queue_client, lease) for lease in leases] == [False, True, False, False, True, True]
    assert seen(study) == [[1, 2], [], [1, 2], [1, 2], [], [1]]
    queue_client.flush()
    assert curves(queue_client, leases) == [[1.0, 2.0], [], [1.0, 2.0], [1.0, 2.0], [], []]
    for lease in (leases[1], leases[4], leases[5]):
        queue_client.held.remove(lease)
    kept = [leases[0], leases[2], leases[3]]
    queue_client.report(epoch(kept, 3))
    queue_client.flush()
    assert curves(queue_client, kept) == [[1.0, 2.0, 3.0]] * 3


def test_trials_lost_before_their_raw_metrics_learn_of_it(make_study: MakeStudy) -> None:
    """Trials that were lost before their raw metrics were written learn of it."""
    study = make_study(trials=4)
    queue_client, leases = opened(study, 4)
    queue_client.report(epoch(leases, 1))
    lose(study, leases[2])
    queue_client.flush()
    assert [is_lost(queue_client, lease) for lease in leases] == [False, False, True, False]
    assert curves(queue_client, leases) == [[1.0], [1.0], [], [1.0]]


def test_a_report_of_many_renews_their_leases(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of many renews their leases once a third of one has gone."""
    study = make_study(trials=9)
    now = clock.awake_or_asleep()
    queue_client, leases = opened(study, 3)
    reports = Noted(monkeypatch, "report")
    for step, later in enumerate((0.0, 19.0, 20.5, 21.0, 41.0), start=1):  # of a lease of 60 s
        monkeypatch.setattr(clock, "awake_or_asleep", lambda later=later: now + later)
        queue_client.report(epoch(leases, step))
        if later == 21.0:
            leases += more(queue_client, 1)  # fresh: it asks for nothing
    assert [settings["renew"] for _, settings in reports.calls] == [False, False, True, False, True]
    assert not queue_client.upkeep.is_to_be_renewed
    monkeypatch.setattr(clock, "awake_or_asleep", lambda: now + 62.0)
    queue_client.report(epoch(leases[:1], 6))
    assert queue_client.upkeep.is_to_be_renewed  # the others have said nothing, so the heartbeat does it


def test_a_trial_that_is_not_held_cannot_report(make_study: MakeStudy) -> None:
    """A trial that is not held here cannot report and nothing is written."""
    study = make_study(trials=4)
    queue_client, leases = opened(study, 3)
    queue_client.held.remove(leases[1])
    with pytest.raises(RuntimeError, match="trial 1 is not held here any more; report before its objective returns"):
        queue_client.report(epoch(leases, 1))
    queue_client.flush()
    assert seen(study) == [[], [], []]


# --- refused for good -------------------------------------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, is_bad: Callable[[Report], bool]) -> None:
    """Let the database refuse reports for good, and with each the transaction that it comes in."""
    real = getattr(Ledger, name)

    def selective(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> Any:
        if any(map(is_bad, reports)):
            raise sa.exc.DataError("INSERT", {}, Exception("integer out of range"))
        return real(ledger, reports, **settings)

    monkeypatch.setattr(Ledger, name, selective)


def test_a_refused_report_is_its_own_trial_s_affair(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that the database refuses is the affair of its own trial."""
    study = make_study(trials=4)
    queue_client, leases = opened(study, 4)
    refusing(monkeypatch, "report", lambda report: (report.claim.number, report.step) in [(1, 2), (3, 2)])
    for step in (1, 2, 3):
        queue_client.report(epoch(leases, step))
        for lease in leases:
            if step == 2 and lease.claim.number in (1, 3):
                with pytest.raises(sa.exc.DataError, match="integer out of range"):
                    lease.check()
            lease.check()  # it is told once
            assert not queue_client.must_end(lease)
    assert not queue_client.calls.is_cut_off
    queue_client.flush()
    assert seen(study) == [[1, 2, 3], [1, 3]] * 2
    assert curves(queue_client, leases) == [[1.0, 2.0, 3.0], [1.0, 3.0]] * 2


def test_refused_raw_metrics_cost_the_others_none(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Raw metrics that the database refuses cost the other trials none."""
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    refusing(monkeypatch, "write_metrics", lambda report: report.claim.number == 1)
    for step in (1, 2):
        queue_client.report(epoch(leases, step))
    queue_client.flush()
    assert curves(queue_client, leases) == [[1.0, 2.0], [], [1.0, 2.0]]
    assert caplog.text.count("raw metrics cannot be written: integer out of range") == 1
    assert "trial 1: raw metrics cannot be written" in caplog.text


def test_an_outage_amid_single_reports(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that fails amid reports that are written one by one gets the rest later."""
    study = make_study(trials=4)
    queue_client, leases = opened(study, 4)
    report, turns = Ledger.report, iter(range(100))

    def failing(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        turn = next(turns)
        if len(reports) > 1:
            raise sa.exc.DataError("INSERT", {}, Exception("integer out of range"))
        if turn == 3:
            raise AN_OUTAGE
        return report(ledger, reports, **settings)

    monkeypatch.setattr(Ledger, "report", failing)
    queue_client.report(epoch(leases, 1))
    assert queue_client.calls.is_cut_off
    assert seen(study) == [[1], [1], [], []]
    queue_client.send()
    assert not queue_client.calls.is_cut_off
    assert seen(study) == [[1]] * 4
    assert next(turns) == 7  # nothing was sent twice: 4 at once, 0, 1, 2 in vain, 2 and 3 at once, 2, 3


# --- a storage that fails ---------------------------------------------------------------------------------------------


@pytest.mark.both
def test_reports_of_many_in_an_outage_go_in_few_statements(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What many reported during an outage is sent in order and in few statements."""
    study = make_study(trials=16)
    queue_client, leases = opened(study, 16)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        for step in range(1, 21):
            queue_client.report(epoch(leases, step))
        assert queue_client.calls.is_cut_off
        assert not queue_client.record_checkpoint(leases[3], Checkpoint(epoch=1, path="/c.pt", digest="d"))
    assert caplog.text.count("the storage fails, training goes on") == 1
    reports = Noted(monkeypatch, "report")
    queue_client.send()
    assert reports.sizes == [100, 100, 100, 20]
    sent = [(report.step, report.claim.number) for given, _ in reports.calls for report in given]
    assert sent == [(step, number) for step in range(1, 21) for number in range(16)]
    assert not queue_client.calls.is_cut_off
    queue_client.flush()
    assert curves(queue_client, leases) == [[float(step) for step in range(1, 21)]] * 16


def test_a_trial_lost_during_an_outage_is_found_so(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that was lost during an outage is found so and the others' reports arrive."""
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        queue_client.report(epoch(leases, 1))
    lose(study, leases[0])
    queue_client.report(epoch(leases, 2))
    assert not any(is_lost(queue_client, lease) for lease in leases)
    queue_client.flush()
    assert [is_lost(queue_client, lease) for lease in leases] == [True, False, False]
    assert curves(queue_client, leases) == [[], [1.0, 2.0], [1.0, 2.0]]


def test_an_outage_that_lasts_ends_every_trial_and_one_that_ends_none(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_client, leases = opened(make_study(trials=3), 3, retry=PATIENCE)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        queue_client.report(epoch(leases, 1))
    assert not any(queue_client.must_end(lease) for lease in leases)
    queue_client.calls._failing_since = time.monotonic() - PATIENCE - 1
    for lease in leases:
        with pytest.raises(Outage, match=f"the storage has failed for {PATIENCE:.0f} s"):
            queue_client.let_go(lease)
        assert lease.keeps_its_place
    queue_client.send()
    assert not any(queue_client.must_end(lease) for lease in leases)


def test_what_is_removed_leaves_nothing_behind(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    queue_client.report(epoch(leases, 1))  # its raw metrics wait
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        queue_client.report(epoch(leases, 2))  # and all of this
    queue_client.held.remove(leases[1])
    queue_client.held.remove(leases[1])  # twice is once
    assert queue_client.held.leases == [leases[0], leases[2]]
    queue_client.flush()
    assert seen(study) == [[1, 2], [1], [1, 2]]
    assert curves(queue_client, leases) == [[1.0, 2.0], [], [1.0, 2.0]]
    renewed = Noted(monkeypatch, "renew_all")
    queue_client.upkeep.renew()
    assert renewed.sizes == [2]
    assert not leases[1].is_lost


def test_what_is_removed_while_a_sender_hangs_leaves_nothing_behind(
    make_study: MakeStudy, hang: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    queue_client.report(epoch(leases, 1))
    assert queue_client.calls.is_cut_off
    queue_client.report(epoch(leases, 2))
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 10 * PATIENCE)
    queue_client.held.remove(leases[1])  # waits for nobody: the sender hangs until the test lets it go
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 0.2)
    with pytest.raises(NoAnswer):
        queue_client.send()
    hang.set()
    wait_for(lambda: not queue_client.calls.is_cut_off)
    queue_client.flush()
    assert seen(study) == [[1, 2], [1], [1, 2]]  # what was under way then arrived: the claim stands
    assert curves(queue_client, leases) == [[1.0, 2.0], [], [1.0, 2.0]]


def test_the_first_trial_after_an_outage_in_which_all_let_go_begins_anew(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 2, retry=PATIENCE)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        queue_client.report(epoch(leases, 1))
    queue_client.calls._failing_since = time.monotonic() - PATIENCE - 1
    for lease in leases:
        queue_client.held.remove(lease)
    (lease,) = more(queue_client, 1)
    assert not queue_client.calls.is_cut_off
    queue_client.let_go(lease)
    queue_client.report([said(lease, 1)])
    assert seen(study) == [[], [], [1]]


def test_a_client_without_trials_asks_the_database_nothing(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_client = client_of(make_study().ledger("w"))

    def pick(*_: object, **__: object) -> Any:
        pytest.fail("nobody is here to ask for")

    for name in ("writing", "writing_once", "reading"):
        monkeypatch.setattr(sql, name, pick)
    queue_client.report([])
    for act in (
        queue_client.flush,
        queue_client.send,
        queue_client.upkeep.renew,
        queue_client.upkeep.poll_commands,
        queue_client.send_metrics,
    ):
        act()
    assert not queue_client.upkeep.is_to_be_renewed


# --- what is heard ----------------------------------------------------------------------------------------------------


def test_orders_reach_the_trial_that_they_are_for(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    control.stop_trial(study, 1)
    queue_client.upkeep.poll_commands()
    assert [queue_client.must_end(lease) for lease in leases] == [False, True, False]
    assert [lease.keeps_its_place for lease in leases] == [True, False, True]
    with pytest.raises(Stopped):
        queue_client.let_go(leases[1])
    control.pause(study)
    queue_client.upkeep.poll_commands()
    assert all(queue_client.must_end(lease) for lease in leases)
    control.resume(study)
    queue_client.upkeep.poll_commands()
    assert [queue_client.must_end(lease) for lease in leases] == [False, True, False]


@pytest.mark.parametrize("seen_by", ["renew", "poll_commands"])
def test_what_was_lost_is_found_so_once_and_not_asked_for_again(
    seen_by: str, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3)
    lose(study, leases[2])
    asked = Noted(monkeypatch, "renew_all" if seen_by == "renew" else "commands_of")
    for _ in range(2):
        getattr(queue_client.upkeep, seen_by)()
        assert [is_lost(queue_client, lease) for lease in leases] == [False, False, True]
        with sql.writing(study.storage.engine) as connection:
            study_rows.raise_orders(connection, study.uid)
    assert asked.sizes == [3, 2]


def test_commands_are_read_once_per_version_of_the_orders(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are also read for each new trial, and again after a while for what an earlier version of hpo has ordered."""
    study = make_study(trials=5)
    queue_client, leases = opened(study, 2)
    asked = Noted(monkeypatch, "commands_of")
    for _ in range(3):
        queue_client.upkeep.poll_commands()
    assert asked.sizes == [2]
    control.stop_trial(study, 0)
    for _ in range(2):
        queue_client.upkeep.poll_commands()
    assert asked.sizes == [2, 2]
    assert [lease.commands.stop for lease in leases] == [True, False]
    (third,) = more(queue_client, 1)
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_trials.update().values(stop_requested=True))
    queue_client.upkeep.poll_commands()
    assert asked.sizes == [2, 2, 3]
    assert third.commands.stop
    queue_client.held.remove(third)
    queue_client.upkeep.poll_commands()
    assert asked.sizes == [2, 2, 3]
    monkeypatch.setattr(lease_upkeep, "RECHECK_SECONDS", 0.0)
    queue_client.upkeep.poll_commands()
    assert asked.sizes == [2, 2, 3, 2]


@pytest.mark.both
def test_a_mass_start_lets_the_database_count_again(make_study: MakeStudy) -> None:
    """Whoever begins trial 128, 256 and so on has the statistics refreshed, once."""
    study = make_study(trials=200)
    queue_client, _ = opened(study, 128)
    assert not queue_client.has_doubled_a_study
    leases = queue_client.claim(ClaimRequest(count=10))
    assert not isinstance(leases, Idle)
    assert queue_client.has_doubled_a_study
    Heartbeat(queue_client)._keep()
    assert not queue_client.has_doubled_a_study
    if not study.storage.is_sqlite:
        with sql.reading(study.storage.engine) as connection:
            counted = sa.text("SELECT relname, reltuples FROM pg_class WHERE relname IN ('trials', 'hpo_trials')")
            assert {row.relname: row.reltuples for row in connection.execute(counted)} == {
                "trials": 138,
                "hpo_trials": 138,
            }
    queue_client.ledger.park(leases[0].claim)
    assert leases[0].claim.number == 128
    again = queue_client.claim(ClaimRequest(count=1))
    assert not isinstance(again, Idle)
    assert again[0].claim.number == 128
    assert not queue_client.has_doubled_a_study  # it was there already


def test_a_worker_holds_its_own_lost_trial_by_the_later_claim(make_study: MakeStudy) -> None:
    """A worker that takes up its own lost trial holds it by the later claim."""
    study = make_study(trials=2)
    queue_client, (stale, other) = opened(study, 2)
    queue_client.report(epoch([stale, other], 1))
    queue_client.ledger.park(stale.claim)  # as a reaper does, while the worker is frozen
    (again,) = more(queue_client, 1)
    assert [is_lost(queue_client, lease) for lease in (stale, again, other)] == [True, False, False]
    queue_client.report(epoch([stale, again, other], 2))
    queue_client.flush()
    assert seen(study) == [[2], [1, 2]]
    assert curves(queue_client, [again, other]) == [[2.0], [1.0, 2.0]]
    queue_client.held.remove(stale)
    assert queue_client.held.leases == [other, again]
    queue_client.upkeep.renew()
    assert not is_lost(queue_client, again)


# --- the heartbeat ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_ticks")
def test_leases_that_come_and_go_are_each_kept_while_they_are_here(make_study: MakeStudy) -> None:
    study = make_study(trials=6)
    queue_client, leases = opened(study, 3, lease_seconds=2.0)
    with Heartbeat(queue_client):
        first = until(study)
        leases += more(queue_client, 3)
        gone = leases[1]
        queue_client.held.remove(gone)
        wait_for(lambda: until(study)[1] is None)  # it ran out, and this very heartbeat took it; nobody reports
        now = until(study)
        assert [end is not None for end in now] == [True, False, True, True, True, True]
        assert (now[0] or 0) > (first[0] or 0)
    assert not any(lease.is_lost for lease in leases)


@pytest.mark.usefixtures("fast_ticks")
def test_a_trial_whose_time_is_up_is_told_apart_from_those_beside_it(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    queue_client, leases = opened(study, 3, lease_seconds=3.0)
    called: list[int] = []
    leases[1].seconds_left = -10.0

    def overdue(lease: Lease) -> None:
        called.append(lease.claim.number)
        raise RuntimeError("it may raise")

    with Heartbeat(queue_client, overdue=overdue):
        wait_for(lambda: len(called) >= 3)
    assert set(called) == {1}


@pytest.mark.both
@pytest.mark.usefixtures("fast_ticks")
def test_curves_are_right_whatever_befalls_trials_and_storage(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials come go and are lost while the storage fails now and then and every curve is right."""
    study = make_study(trials=60)
    faults, drawn = random.Random(7), random.Random(8)
    for name in ("report", "renew_all", "commands_of", "write_metrics"):
        monkeypatch.setattr(Ledger, name, failing_at_times(getattr(Ledger, name), faults))
    monkeypatch.setattr(client, "METRICS_SECONDS", 0.05)
    queue_client, thief = client_of(study.ledger("w", lease_seconds=30.0), Retry(60.0)), study.ledger("thief")
    at: dict[Lease, int] = {}
    ended: list[Lease] = []
    stolen: list[Claim] = []
    with Heartbeat(queue_client):
        while True:
            claims = claiming.claim_many(queue_client.ledger, 8 - len(at), stack_key="any") if len(at) < 8 else []
            if isinstance(claims, claiming.Idle):
                if not at:
                    break
                claims = []
            at |= {queue_client.hold(claim): 0 for claim in claims}
            at = {lease: step + 1 for lease, step in at.items()}
            queue_client.report([said(lease, step) for lease, step in at.items()])
            time.sleep(0.005)
            if len(at) > 4 and len(stolen) < 10:
                victim = drawn.choice(list(at))
                queue_client.ledger.park(victim.claim)
                taken = claiming.claim_many(thief, 1, stack_key="any")
                assert not isinstance(taken, claiming.Idle)
                stolen += taken
            for lease, step in list(at.items()):
                if not is_lost(queue_client, lease) and step < 5 + lease.claim.number % 7:
                    continue
                del at[lease]
                try:
                    queue_client.flush(lease)
                    finish_claim(queue_client.ledger, lease.claim, TrialState.COMPLETE, 1.0, outcome="complete")
                    ended.append(lease)
                except LostLease:
                    queue_client.ledger.drop(lease.claim, "lost")
                queue_client.held.remove(lease)
    assert queue_client.held.leases == []
    assert len(stolen) == 10
    trials = study.optuna.get_trials(deepcopy=False)
    assert len(ended) == 60 - len({claim.trial_id for claim in stolen})
    for lease in ended:
        wanted = list(range(1, 6 + lease.claim.number % 7))
        assert sorted(trials[lease.claim.number].intermediate_values) == wanted
        assert queue_client.ledger.curve(lease.claim, "value") == [float(step) for step in wanted]
    for claim in stolen:
        assert trials[claim.number].intermediate_values == {}
        assert thief.curve(claim, "value") == []
    assert queue_client.calls.retry(lambda: thief.renew_all(stolen)) == set()


def failing_at_times(real: Callable[..., Any], drawn: random.Random) -> Callable[..., Any]:
    """Let a method fail at one call in ten, before it is done or after."""

    def method(*arguments: Any, **settings: Any) -> Any:
        chance = drawn.random()
        if chance < 0.05:
            raise AN_OUTAGE
        answer = real(*arguments, **settings)
        if chance > 0.95:
            raise AN_OUTAGE
        return answer

    return method
