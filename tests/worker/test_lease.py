"""A worker's hold on a trial: reports in their order through every failure, and why a trial must let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease, NoAnswer, Outage, Parked, Signal, Stopped, TimeUp
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report, ReportResult
from hpo.storage import clock
from hpo.storage.retry import Retry
from hpo.storage.tables import hpo_trials
from hpo.study import control
from hpo.study.study import Study
from hpo.worker import client, storage_calls
from hpo.worker.client import QueueClient
from hpo.worker.signals import StopSignal
from tests.support.trials import AN_OUTAGE, MakeStudy, claim_one, client_of, refused, said
from tests.support.waiting import PATIENCE, wait_for


class Holding:
    """A trial that a client of its own holds."""

    def __init__(self, client: QueueClient, claim: Claim) -> None:
        self.client = client
        self.lease = client.hold(claim)

    def tell(self, step: int) -> None:
        """Report as a trial does."""
        self.client.report([said(self.lease, step)])
        self.lease.check()


def held(study: Study, worker: str = "w", **settings: Any) -> Holding:
    client = client_of(study.ledger(worker), **settings)
    claim = claim_one(client.ledger)
    assert isinstance(claim, Claim)
    return Holding(client, claim)


def stored(holding: Holding, study: Study) -> list[float]:
    """Return what both tables hold of the trial's reports, in order of steps."""
    curve = holding.client.ledger.curve(holding.lease.claim, "value")
    assert study.optuna.get_trials(deepcopy=False)[0].intermediate_values == {int(step): step for step in curve}
    return curve


def seen(study: Study) -> dict[int, float]:
    """Return what Optuna has of the trial's reports."""
    return study.optuna.get_trials(deepcopy=False)[0].intermediate_values


def recorded(study: Study) -> tuple[int | None, str | None]:
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_trials)).one()
        return row.checkpoint_epoch, row.checkpoint_path


def lose(holding: Holding) -> None:
    """Let another worker have the trial."""
    ledger, claim = holding.client.ledger, holding.lease.claim
    ledger.park(claim)
    taken = claim_one(replace(ledger, worker="thief"))
    assert isinstance(taken, Claim)
    assert taken.trial_id == claim.trial_id


def at(epoch: int) -> Checkpoint:
    return Checkpoint(epoch=epoch, path=f"/epoch-{epoch}.pt", digest="abc")


class Hanging:
    """A method of the ledger whose first calls do not answer until they are told to; what they do is done then."""

    def __init__(self, patched: pytest.MonkeyPatch, name: str, *, calls: int = 1) -> None:
        self.answer = threading.Event()
        self.entered = 0
        self.left = 0
        real = getattr(Ledger, name)

        def method(ledger: Ledger, *arguments: object, **settings: object) -> object:
            self.entered += 1
            if self.entered <= calls:
                assert self.answer.wait(PATIENCE)
            try:
                return real(ledger, *arguments, **settings)
            finally:
                self.left += 1

        patched.setattr(Ledger, name, method)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hanging]]:
    made: list[Hanging] = []

    def of(name: str) -> Hanging:
        monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 0.2)
        made.append(Hanging(monkeypatch, name))
        return made[-1]

    yield of
    for hanging in made:
        hanging.answer.set()
        wait_for(lambda hanging=hanging: hanging.left == hanging.entered)  # before the database goes


# --- reports ----------------------------------------------------------------------------------------------------------


def test_reports_reach_the_database_as_they_are_made(make_study: MakeStudy) -> None:
    study = make_study()
    holding = held(study)
    for step in (1, 2, 3):
        holding.tell(step)
        assert seen(study) == {n: float(n) for n in range(1, step + 1)}
    assert not holding.client.calls.is_cut_off


def test_raw_metrics_wait_for_more_of_them_but_not_for_ever(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    holding = held(study)
    for step in (1, 2, 3):
        holding.tell(step)
    holding.client.send_metrics()  # as the heartbeat does at every tick
    assert holding.client.ledger.curve(holding.lease.claim, "value") == []
    with monkeypatch.context() as patched:
        patched.setattr(client, "METRICS_SECONDS", 0.0)
        holding.client.send_metrics()
        assert holding.client.ledger.curve(holding.lease.claim, "value") == [1.0, 2.0, 3.0]
    holding.tell(4)
    holding.tell(5)
    assert holding.client.record_checkpoint(holding.lease, at(5))
    assert stored(holding, study) == [1.0, 2.0, 3.0, 4.0, 5.0]
    holding.tell(6)
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_raw_metrics_of_a_trial_that_was_lost_are_not_written(make_study: MakeStudy) -> None:
    study = make_study()
    holding = held(study)
    for step in (1, 2):
        holding.tell(step)
    lose(holding)
    with pytest.raises(LostLease):
        holding.client.flush(holding.lease)
    assert holding.client.ledger.curve(holding.lease.claim, "value") == []  # the other attempt began at epoch 0


def test_a_report_renews_the_lease_once_a_third_of_it_has_gone(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    holding = held(study)
    renewals = []
    report = Ledger.report

    def noting(ledger: Ledger, reports: Sequence[Report], *, renew: bool, **settings: Any) -> ReportResult:
        renewals.append(renew)
        return report(ledger, reports, renew=renew, **settings)

    monkeypatch.setattr(Ledger, "report", noting)
    now = clock.awake_or_asleep()
    for step, later in enumerate((0.0, 19.0, 20.5, 21.0, 41.0), start=1):  # of a lease of 60 s
        monkeypatch.setattr(clock, "awake_or_asleep", lambda later=later: now + later)
        holding.tell(step)
    assert renewals == [False, False, True, False, True]


def test_reports_keep_their_order_through_failures(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    written: list[int] = []
    report = Ledger.report

    def noting(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        lost = report(ledger, reports, **settings)
        written.extend(one.step for one in reports)
        return lost

    for step in range(1, 10):
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "report", refused if step % 3 == 2 else noting)
            if holding.client.calls.is_cut_off and step % 3 == 1:
                holding.client.send()  # as the heartbeat does
            holding.tell(step)
            assert holding.client.calls.is_cut_off == (step % 3 != 1)
    monkeypatch.setattr(Ledger, "report", noting)
    holding.client.flush(holding.lease)
    assert not holding.client.calls.is_cut_off
    assert written == list(range(1, 10))
    assert stored(holding, study) == [float(n) for n in range(1, 10)]


def test_a_failing_storage_is_asked_once_and_not_for_every_report(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    holding = held(make_study(), retry=Retry(60.0))
    asked: list[int] = []

    def failing(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        asked.append(len(reports))
        raise AN_OUTAGE

    monkeypatch.setattr(Ledger, "report", failing)
    for step in (1, 2, 3):
        holding.tell(step)
    assert asked == [1]
    assert caplog.text.count("the storage fails, training goes on: the server closed the connection") == 1
    with pytest.raises(sa.exc.OperationalError):  # to the heartbeat they are raised
        holding.client.send()
    assert asked == [1, 3]


@pytest.mark.both
def test_a_report_whose_answer_was_lost_is_in_the_database_once(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    report, answers = Ledger.report, iter([False])

    def unheard(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        lost = report(ledger, reports, **settings)
        if not next(answers, True):
            raise AN_OUTAGE
        return lost

    monkeypatch.setattr(Ledger, "report", unheard)
    holding.tell(1)
    assert holding.client.calls.is_cut_off
    holding.tell(2)
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0, 2.0]


def test_a_storage_that_hangs_gets_everything_once(make_study: MakeStudy, hang: Callable[[str], Hanging]) -> None:
    """A storage that hangs lets training go on and gets everything once and in order."""
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    hanging = hang("report")
    started = time.monotonic()
    holding.tell(1)
    assert holding.client.calls.is_cut_off
    holding.tell(2)
    holding.tell(3)
    assert time.monotonic() - started < 10
    assert hanging.entered == 1
    hanging.answer.set()
    wait_for(lambda: not holding.client.calls.is_cut_off)
    assert seen(study) == {1: 1.0, 2: 2.0, 3: 3.0}
    holding.tell(4)
    assert hanging.left == 3
    assert seen(study) == {n: float(n) for n in (1, 2, 3, 4)}
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0, 2.0, 3.0, 4.0]
    assert hanging.entered == 3


def test_two_senders_write_once(make_study: MakeStudy, hang: Callable[[str], Hanging]) -> None:
    """While one sender waits for an answer another gets none instead of writing twice."""
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    hanging = hang("report")
    holding.tell(1)
    with pytest.raises(NoAnswer):
        holding.client.send()
    assert hanging.entered == 1
    hanging.answer.set()
    wait_for(lambda: not holding.client.calls.is_cut_off)
    holding.client.send()
    assert hanging.entered == 1  # nothing was left to send
    assert seen(study) == {1: 1.0}


def test_flushing_waits_for_a_sender_that_hangs(make_study: MakeStudy, hang: Callable[[str], Hanging]) -> None:
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    hanging = hang("report")
    holding.tell(1)
    holding.tell(2)
    threading.Timer(0.3, hanging.answer.set).start()
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0, 2.0]


def test_flushing_a_storage_that_stays_away_is_an_outage(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    holding = held(study, retry=Retry(0.2))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        holding.tell(1)
        with pytest.raises(Outage, match="the server closed the connection"):
            holding.client.flush(holding.lease)
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0]


def refusing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the database refuse this step for good, and with it the transaction that it comes in."""
    report = Ledger.report

    def selective(ledger: Ledger, reports: Sequence[Report], **settings: Any) -> ReportResult:
        if step in [one.step for one in reports]:
            raise sa.exc.DataError("INSERT", {}, Exception("integer out of range"))
        return report(ledger, reports, **settings)

    monkeypatch.setattr(Ledger, "report", selective)


@pytest.mark.both
def test_a_report_refused_for_good_is_raised(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that the database refuses for good is raised and forgotten."""
    study = make_study()
    holding = held(study)
    refusing(monkeypatch, 2)
    holding.tell(1)
    with pytest.raises(sa.exc.DataError):
        holding.tell(2)
    assert not holding.client.calls.is_cut_off
    holding.tell(3)
    holding.client.flush(holding.lease)
    assert holding.client.ledger.curve(holding.lease.claim, "value") == [1.0, 3.0]


def test_what_was_kept_beside_a_refused_report_is_written(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept beside a report that the database refuses is written."""
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        for step in (1, 2, 3):
            holding.tell(step)
    refusing(monkeypatch, 2)
    holding.client.send()
    with pytest.raises(sa.exc.DataError):  # whoever sent it, the trial learns of it, once
        holding.lease.check()
    holding.client.flush(holding.lease)
    assert holding.client.ledger.curve(holding.lease.claim, "value") == [1.0, 3.0]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_recorded_after_its_reports(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is recorded after the reports that it holds and not while cut off."""
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        holding.tell(1)
        assert not holding.client.record_checkpoint(holding.lease, at(1))
    assert recorded(study) == (None, None)
    assert not holding.client.record_checkpoint(holding.lease, at(1))  # the heartbeat did not get through yet
    holding.client.send()
    assert holding.client.record_checkpoint(holding.lease, at(1))
    assert recorded(study) == (1, "/epoch-1.pt")
    assert stored(holding, study) == [1.0]


def test_a_storage_that_fails_at_a_checkpoint_is_a_storage_that_fails(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record_checkpoint", refused)
        assert not holding.client.record_checkpoint(holding.lease, at(1))
    assert holding.client.calls.is_cut_off
    holding.client.send()  # nothing to send: it renews the lease, and so finds the storage back
    assert not holding.client.calls.is_cut_off
    assert holding.client.record_checkpoint(holding.lease, at(1))


def test_a_checkpoint_of_a_lost_trial_is_not_recorded(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    holding = held(study)
    lose(holding)
    with pytest.raises(LostLease):
        holding.client.record_checkpoint(holding.lease, at(1))
    assert recorded(study) == (None, None)


def test_a_checkpoint_that_hung_replaces_no_later_one(
    make_study: MakeStudy, hang: Callable[[str], Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose recording hung does not take the place of a later one."""
    study = make_study()
    holding = held(study, retry=Retry(60.0))
    hanging = hang("record_checkpoint")
    assert not holding.client.record_checkpoint(holding.lease, at(5))
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 10.0)
    holding.client.send()  # over another connection the storage answers
    assert holding.client.record_checkpoint(holding.lease, at(8))
    hanging.answer.set()
    wait_for(lambda: hanging.left == 2)
    assert recorded(study) == (8, "/epoch-8.pt")  # the file of epoch 5 was removed when that of epoch 8 was recorded


# --- why a trial must let go ------------------------------------------------------------------------------------------


def raised_by(holding: Holding) -> type[Signal] | None:
    """Return the kind of Signal that tells the trial to let go."""
    try:
        holding.client.let_go(holding.lease)
    except Signal as signal:
        assert holding.client.must_end(holding.lease)
        return type(signal)
    assert not holding.client.must_end(holding.lease)
    return None


def test_a_trial_that_nobody_wants_anything_of_goes_on(make_study: MakeStudy) -> None:
    holding = held(make_study())
    holding.client.upkeep.poll_commands()
    holding.client.upkeep.renew()
    holding.lease.check()
    assert raised_by(holding) is None
    assert holding.lease.keeps_its_place


def test_of_several_reasons_to_let_go_the_gravest_counts(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1)
    holding = held(study, retry=Retry(0.0))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        holding.tell(1)
    assert raised_by(holding) is Outage
    holding.lease.seconds_left = -1.0
    assert raised_by(holding) is TimeUp
    control.pause(study)
    holding.client.upkeep.poll_commands()
    assert raised_by(holding) is Parked
    assert holding.lease.keeps_its_place
    assert not control.stop_trial(study, 0)
    holding.client.upkeep.poll_commands()
    assert raised_by(holding) is Stopped
    assert not holding.lease.keeps_its_place
    holding.lease.check()
    study.optuna.tell(0, state=TrialState.FAIL)
    holding.client.upkeep.renew()
    assert raised_by(holding) is LostLease
    assert not holding.lease.keeps_its_place


def test_a_worker_asked_to_stop_parks_first(make_study: MakeStudy) -> None:
    """A worker that was asked to stop parks its trial before anything but its end."""
    study = make_study()
    stopping = StopSignal()
    holding = held(study, stopping=stopping)
    holding.lease.seconds_left = -1.0
    assert raised_by(holding) is TimeUp
    stopping.request()
    assert raised_by(holding) is Parked
    assert holding.lease.keeps_its_place
    assert not control.stop_trial(study, 0)
    holding.client.upkeep.poll_commands()
    assert raised_by(holding) is Stopped


def test_when_an_outage_ends_a_trial(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage ends a trial only after the storage failed for too long."""
    holding = held(make_study(), retry=Retry(PATIENCE))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        holding.tell(1)
    assert raised_by(holding) is None
    holding.client.calls._failing_since = time.monotonic() - PATIENCE - 1
    assert raised_by(holding) is Outage
    assert holding.lease.keeps_its_place
    holding.client.send()  # it came back just in time
    assert raised_by(holding) is None


@pytest.mark.parametrize("seen_by", ["report", "renew", "poll_commands"])
def test_a_lost_lease_is_raised_wherever_the_trial_looks_up(seen_by: str, make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    holding = held(study)
    lose(holding)
    holding.lease.check()  # nobody has told it yet
    if seen_by == "report":
        with pytest.raises(LostLease):
            holding.tell(1)
    else:
        getattr(holding.client.upkeep, seen_by)()
    for look in (
        holding.lease.check,
        lambda: holding.client.let_go(holding.lease),
        lambda: holding.client.flush(holding.lease),
        lambda: holding.tell(2),
    ):
        with pytest.raises(LostLease, match="trial 0: another process has claimed or ended it"):
            look()
    assert holding.client.must_end(holding.lease)
    assert not holding.lease.keeps_its_place
    assert holding.client.ledger.curve(holding.lease.claim, "value") == []


def test_a_lease_that_is_found_lost_stays_lost(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    holding = held(study)
    other = study.ledger("other")
    holding.client.ledger.park(holding.lease.claim)
    holding.client.upkeep.renew()
    taken = claim_one(other)
    assert isinstance(taken, Claim)
    other.park(taken)
    holding.client.upkeep.poll_commands()
    with pytest.raises(LostLease):
        holding.lease.check()


@pytest.mark.both
def test_a_lease_lost_during_an_outage_is_found_so(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that was lost during an outage is found so when the storage is back."""
    study = make_study(trials=1)
    holding = held(study, retry=Retry(60.0))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        holding.tell(1)
    lose(holding)
    holding.tell(2)
    holding.client.send()
    with pytest.raises(LostLease):
        holding.lease.check()
    assert holding.client.ledger.curve(holding.lease.claim, "value") == []


def test_a_report_of_a_trial_that_a_person_ended_is_still_written(make_study: MakeStudy) -> None:
    study = make_study()
    holding = held(study)
    assert not control.stop_trial(study, 0)
    holding.client.upkeep.poll_commands()
    holding.tell(1)
    holding.client.flush(holding.lease)
    assert stored(holding, study) == [1.0]
