"""Reports against others who write at the same time: kept ones, late ones, ends in flight, deleted studies, refused ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.queue.report import Report, ReportResult
from hpo.storage import sql
from hpo.storage.connect import FAILURES, OUTAGES, Storage, connect, plain_url
from hpo.storage.retry import Retry
from hpo.storage.tables import trials
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.trial import LeasedTrial
from tests.support.trials import begin, claim_one, held, make, opened, suggested
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.both


def said(claim: Claim, step: int, value: float = 0.5, **metrics: float) -> Report:
    return Report(claim=claim, step=step, value=value, metrics=metrics or {"value": value})


def values(study: Study, number: int = 0) -> dict[int, float]:
    return study.optuna.get_trials(deepcopy=False)[number].intermediate_values


def test_a_thousand_kept_reports_are_sent(place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(place, tmp_path)
    ledger, claim, _ = begin(study)
    client, _ = held(ledger, claim)

    def refused(*arguments: object, **settings: object) -> Any:
        raise sa.exc.OperationalError("INSERT", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", refused)
        for step in range(1, 1001):
            client.report([said(claim, step, float(step))])
        assert client.calls.is_cut_off
    client.flush()
    assert values(study) == {step: float(step) for step in range(1, 1001)}
    assert len(ledger.curve(claim, "value")) == 1000


def test_no_reports_are_no_statement(place: Storage, tmp_path: Path) -> None:
    ledger, _, _ = begin(make(place, tmp_path))
    assert ledger.report([]) == ReportResult(lost=[], finished=None)


def test_finished_trials_are_counted_without_being_read(tmp_path: Path) -> None:
    """The first trial is open, so nothing is known of those after it. SQLite says what it executes."""
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    study = make(place, tmp_path)
    ledger, claim, _ = begin(study)
    instructions = 0

    def step() -> int:
        nonlocal instructions
        instructions += 1
        return 0

    def cost(finished: int) -> int:
        nonlocal instructions
        with sql.writing(place.engine) as connection:
            first = connection.execute(sa.select(sa.func.max(trials.c.number))).scalar_one() + 1
            rows = [
                {"number": number, "study_id": study.study_id, "state": "PRUNED"}
                for number in range(first, finished + 1)
            ]
            connection.execute(trials.insert(), rows)
        ledger.report([said(claim, 1)])  # the open connection reads the schema again
        instructions = 0
        with place.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(step, 1)
        found = ledger.report([said(claim, finished)])
        driver.set_progress_handler(None, 1)
        assert found == ReportResult(lost=[], finished=finished)
        return instructions

    few = cost(1)
    assert few > 0
    assert cost(300) - few < 299  # less than one for each further trial


def test_parameters_of_two_owners_are_not_mixed(place: Storage, tmp_path: Path) -> None:
    """Parameters suggested before a trial was lost are not mixed with the new owner's."""
    study = make(place, tmp_path)
    ledger, claim, frozen = begin(study, "frozen")
    elsewhere = worker_loop.with_retry(study, Retry(60.0))

    def take_over() -> float:
        ledger.park(claim)  # as a reaper does, while the worker is frozen
        other = elsewhere.ledger("other")
        taken = claim_one(other)
        assert isinstance(taken, Claim)
        owner = opened(elsewhere, other, taken)
        return suggested(owner, lambda trial: trial.suggest_float("x", 0, 1))

    def suggest(trial: LeasedTrial) -> None:
        for name in ("x", "only_mine"):
            trial.suggest_float(name, 0, 1)
        drawn.append(take_over())

    drawn: list[float] = []
    with pytest.raises(LostLease):
        suggested(frozen, suggest)
    (trial,) = study.optuna.get_trials()
    assert trial.params == {"x": drawn[0]}


def test_suggestions_that_end_in_an_error_write_nothing(place: Storage, tmp_path: Path) -> None:
    study = make(place, tmp_path)
    _, _, trial = begin(study)

    def suggest(trial: LeasedTrial) -> None:
        trial.suggest_float("x", 0, 1)
        raise ValueError("the objective's own")

    with pytest.raises(ValueError, match="the objective's own"):
        suggested(trial, suggest)
    assert study.optuna.get_trials()[0].params == {}


def test_a_report_waits_for_an_end_elsewhere(postgres_url: str, tmp_path: Path) -> None:
    """A report waits for an end that another program is writing and then writes nothing."""
    place = connect(postgres_url, create=True)
    study = make(place, tmp_path)
    ledger, claim, _ = begin(study)
    ledger.report([said(claim, 1)])
    other = connect(postgres_url)
    found: list[ReportResult] = []
    with other.engine.connect() as dashboard:
        dashboard.execute(trials.update().values(state=TrialState.COMPLETE))
        reporting = threading.Thread(target=lambda: found.append(ledger.report([said(claim, 2)])))
        reporting.start()
        reporting.join(0.5)
        assert reporting.is_alive()
        dashboard.commit()
    reporting.join(PATIENCE)
    assert [answer.lost for answer in found] == [[claim]]
    assert values(study) == {1: 0.5}
    other.close()
    place.close()


def report_on(ledger: Ledger, claim: Claim, going: threading.Event, answers: list[ReportResult]) -> None:
    """Report until the claim is lost."""
    for step in range(1, 5000):
        answers.append(ledger.report([said(claim, step)]))
        going.set()
        if answers[-1].lost:
            return


def test_a_study_is_deleted_beside_its_reporting_workers(place: Storage, tmp_path: Path) -> None:
    other = connect(plain_url(place.url))
    for round in range(5):
        study = make(place, tmp_path, name=f"study-{round}")
        ledger, claim, _ = begin(study)
        going, answers = threading.Event(), list[ReportResult]()
        reporting = threading.Thread(target=report_on, args=(ledger, claim, going, answers))
        reporting.start()
        assert going.wait(PATIENCE)
        optuna.delete_study(study_name=study.name, storage=other.optuna)
        reporting.join(PATIENCE)
        assert answers[-1].lost == [claim]
    assert optuna.get_all_study_names(place.optuna) == []
    other.close()


def test_a_damaged_file_is_a_failing_storage_and_no_outage(tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    place.close()
    for file in tmp_path.glob("studies.db*"):
        file.write_bytes(b"no database at all" * 1000)
    with pytest.raises(FAILURES) as raised, sql.writing(place.engine):
        pass
    assert not isinstance(raised.value, OUTAGES)
    place.close()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the database refuse raw metrics of this value for good."""
    write_metrics = Ledger.write_metrics

    def refuse(value: float) -> None:
        def writing(ledger: Ledger, reports: Sequence[Report]) -> set[Claim]:
            if any(value in one.metrics.values() for one in reports):
                raise sa.exc.DataError("INSERT", {}, Exception("value out of range"))
            return write_metrics(ledger, reports)

        monkeypatch.setattr(Ledger, "write_metrics", writing)

    return refuse


def test_raw_metrics_that_are_refused_for_good_cost_no_later_report(
    place: Storage, tmp_path: Path, refusing: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(place, tmp_path)
    ledger, claim, _ = begin(study)
    client, _ = held(ledger, claim)
    refusing(1e300)
    monkeypatch.setattr("hpo.worker.client.METRICS_SECONDS", 0.0)
    client.report([said(claim, 1, metric=1e300)])
    for step in (2, 3):
        client.report([said(claim, step, metric=0.25)])
    client.flush()
    assert values(study) == {1: 0.5, 2: 0.5, 3: 0.5}
    assert ledger.curve(claim, "metric") == [0.25, 0.25]
