"""What an outage kept from being recorded is taken up by the next attempt, as if there had been no outage."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease, StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report, ReportResult
from hpo.spec.failures import Failure, Kind
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_failures, hpo_trials, trial_system_attributes
from hpo.study import results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from hpo.worker import loop as worker_loop
from hpo.worker import pending_reports
from hpo.worker.attempt import open_trial
from hpo.worker.client import QueueClient
from hpo.worker.signals import StopSignal
from hpo.worker.stacked_runner import StackedRunner
from hpo.worker.trial import LeasedTrial
from tests.support.declared import DOCUMENT, made, work
from tests.support.trials import MakeStudy, claim_one, held

EPOCHS = 8
OF_NOTHING = hashlib.sha256(b"").hexdigest()
PATIENCE = 1.0  # seconds; a study file knows none shorter


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> MakeStudy:
    def make(name: str, **changes: Any) -> Study:
        training = {"epochs": EPOCHS, "batch_size": 64}
        recovery = {"outage_patience": "1s", **changes.pop("recovery", {})}
        document = {**DOCUMENT, "name": name, "budget": {"trials": 1}, "training": training, "recovery": recovery}
        return made(place, tmp_path, {**document, **changes})

    return make


def row_of(study: Study) -> Any:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)).one()


# --- in training ------------------------------------------------------------------------------------------------------


class Weather:
    """Counts the epochs that are trained, and takes the storage away after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[int] = []
        self.cut_after: int | None = None
        self.is_cut = False
        self.epoch_seconds = 0.0  # that each epoch takes longer in an outage
        close = Run.close_epoch

        def close_epoch(run: Run, *measured: Any) -> EpochResult:
            result = close(run, *measured)
            self.trained.append(result.epoch)
            if self.is_cut:
                time.sleep(self.epoch_seconds)
            self.is_cut = self.is_cut or result.epoch == self.cut_after
            return result

        monkeypatch.setattr(Run, "close_epoch", close_epoch)
        for name in ("report", "record_checkpoint", "renew_all"):
            self._let_fail(monkeypatch, name)

    def _let_fail(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(Ledger, name)

        def method(ledger: Ledger, *arguments: object, **settings: object) -> object:
            if self.is_cut:
                raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))
            return real(ledger, *arguments, **settings)

        monkeypatch.setattr(Ledger, name, method)

    def clear(self) -> None:
        self.is_cut, self.cut_after = False, None


class Asked(StopSignal):
    """A request to stop that comes when a condition is met, asked for before every batch."""

    def __init__(self, when: Callable[[], bool]) -> None:
        super().__init__()
        self._when = when

    def __call__(self) -> bool:
        return self.received is not None or self._when()


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Weather:
    return Weather(monkeypatch)


def in_the_epoch_after(epoch: int, weather: Weather, batches: int) -> StopSignal:
    """Ask to stop so many batches after the end of this epoch."""
    since: list[bool] = []

    def when() -> bool:
        if weather.trained and weather.trained[-1] >= epoch:
            since.append(True)
        return len(since) > batches

    return Asked(when)


def story(study: Study) -> tuple[dict[str, list[float]], dict[int, float], float | None, TrialState]:
    """Return everything that a trial's training leaves in the database, but for its times."""
    (trial,) = study.optuna.get_trials(deepcopy=False)
    raw = dict(results.best(study, number=0)[0].curves)
    del raw["seconds"]
    return raw, trial.intermediate_values, trial.value, trial.state


def notes(study: Study) -> list[str]:
    return sorted(note.name for note in study.trial_folder(0).glob("attempt-*-handover.json"))


def train_into_an_outage(study: Study, weather: Weather, end: str) -> None:
    """Train three epochs, lose the storage, train on, and let go for what `end` says; then the storage is back."""
    weather.trained.clear()
    weather.cut_after = 3
    if end == "its patience ends":
        weather.epoch_seconds = 0.4 * PATIENCE
        with pytest.raises(StorageError, match="the storage has failed for 1 s"):
            work(study)
        reaper.release_leases_of(study.ledger("launcher"), "w")
    else:
        batches = 0 if end == "asked between epochs" else 10
        assert work(study, in_the_epoch_after(5, weather, batches)) == 0
    assert 3 < weather.trained[-1] < EPOCHS
    assert [trial.state for trial in study.optuna.get_trials()] == [TrialState.RUNNING]
    assert row_of(study).lease_until is None
    weather.clear()


ENDS = ["its patience ends", "asked between epochs", "asked amid an epoch"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("checkpoint_every", ["0s", "30s"])  # one is recorded before the outage, or none
def test_a_trial_goes_on_from_where_an_outage_left_it(
    end: str, checkpoint_every: str, make_digits: MakeStudy, weather: Weather
) -> None:
    """A trial goes on from where an outage ended its attempt and no epoch is trained twice."""
    recovery = {"checkpoint_every": checkpoint_every}
    whole, broken = make_digits("whole", recovery=recovery), make_digits("broken", recovery=recovery)
    assert work(whole) == 0
    train_into_an_outage(broken, weather, end)
    reached = weather.trained[-1]
    assert (row_of(broken).checkpoint_epoch or 0) == (2 if checkpoint_every == "0s" else 0)
    (note,) = [json.loads((broken.trial_folder(0) / name).read_text()) for name in notes(broken)]
    assert note["checkpoint"]["epoch"] == reached
    assert Path(note["checkpoint"]["path"]).exists()
    assert work(broken) == 0
    assert weather.trained == list(range(1, EPOCHS + 1))
    assert story(broken) == story(whole)
    assert (row_of(broken).attempt, notes(broken)) == (2, [])


def test_without_a_note_epochs_are_trained_twice(make_digits: MakeStudy, weather: Weather) -> None:
    """Without what was left epochs are trained twice to the same curve."""
    whole, broken = make_digits("whole"), make_digits("broken")
    assert work(whole) == 0
    train_into_an_outage(broken, weather, "asked amid an epoch")
    for name in notes(broken):
        (broken.trial_folder(0) / name).unlink()
    assert work(broken) == 0
    assert weather.trained == [*range(1, 6), *range(1, EPOCHS + 1)]
    assert story(broken) == story(whole)


def test_an_attempt_killed_in_an_outage_goes_on(
    make_digits: MakeStudy, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was killed after an outage began is gone on from its last note."""
    whole, broken = make_digits("whole"), make_digits("broken", recovery={"checkpoint_every": "0s"})
    assert work(whole) == 0
    weather.trained.clear()
    weather.cut_after = 3

    class Killed(BaseException):
        pass

    def kill() -> bool:
        if weather.trained and weather.trained[-1] == 5:
            raise Killed
        return False

    def die(self: StackedRunner, error: BaseException) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(QueueClient, "must_end", lambda client, lease: kill())
        patched.setattr(StackedRunner, "_break_up", die)
        with pytest.raises(Killed):
            work(broken)
    weather.clear()
    assert reaper.fail_leases_of(broken.ledger("launcher"), "w", "killed by SIGKILL") == 1
    assert work(broken) == 0
    assert weather.trained == list(range(1, EPOCHS + 1))
    assert story(broken) == story(whole)


def test_an_outage_that_passes_leaves_no_note(make_digits: MakeStudy, weather: Weather) -> None:
    study = make_digits("passing", recovery={"checkpoint_every": "0s", "outage_patience": "60s"})
    found: list[str] = []

    def look() -> bool:
        if weather.trained and weather.trained[-1] == 5 and weather.is_cut:
            found.extend(notes(study))
            weather.clear()
            time.sleep(1.5)  # until the heartbeat's thread has got through
        return False

    weather.cut_after = 3
    assert work(study, Asked(look)) == 0
    assert found == ["attempt-1-handover.json"]
    assert notes(study) == []
    assert len(list(study.trial_folder(0).iterdir())) == 1
    assert weather.trained == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("end", ENDS)
def test_rungs_after_a_handover_are_those_of_an_unbroken_trial(
    end: str, make_digits: MakeStudy, weather: Weather
) -> None:
    """The rungs of a trial after a handover are those of an unbroken one."""
    pruner = {"name": "successive_halving", "reduction_factor": 2}
    recovery = {"checkpoint_every": "0s"}
    whole = make_digits("whole", pruner=pruner, recovery=recovery)
    broken = make_digits("broken", pruner=pruner, recovery=recovery)

    def rungs(study: Study) -> dict[str, float]:
        return study.optuna.get_trials()[0].system_attrs

    assert work(studies.join(whole.storage, whole.name)) == 0
    train_into_an_outage(studies.join(broken.storage, broken.name), weather, end)
    assert rungs(broken).keys() == {"completed_rung_0", "completed_rung_1"}  # that of epoch 4 fell into the outage
    assert work(studies.join(broken.storage, broken.name)) == 0
    assert weather.trained == list(range(1, EPOCHS + 1))
    assert rungs(broken).keys() == {"completed_rung_0", "completed_rung_1", "completed_rung_2"}
    assert rungs(broken) == rungs(whole)


def test_a_training_that_ended_in_the_outage_is_settled(make_digits: MakeStudy, weather: Weather) -> None:
    """A trial whose training ended in the outage is settled without training again."""
    whole, broken = make_digits("whole"), make_digits("broken")
    assert work(whole) == 0
    weather.trained.clear()
    weather.cut_after = EPOCHS - 2
    with pytest.raises(StorageError, match="the server closed the connection"):
        work(broken)
    weather.clear()
    reaper.release_leases_of(broken.ledger("launcher"), "w")
    assert weather.trained == list(range(1, EPOCHS + 1))
    assert work(broken) == 0
    assert weather.trained == list(range(1, EPOCHS + 1))
    assert story(broken) == story(whole)


def test_a_damaged_file_beside_a_note_costs_little(make_digits: MakeStudy, weather: Weather) -> None:
    """A damaged file beside a note costs only what the recorded checkpoint does not hold."""
    whole, broken = make_digits("whole"), make_digits("broken", recovery={"checkpoint_every": "0s"})
    assert work(whole) == 0
    train_into_an_outage(broken, weather, "asked amid an epoch")
    (name,) = notes(broken)
    Path(json.loads((broken.trial_folder(0) / name).read_text())["checkpoint"]["path"]).write_bytes(b"damaged")
    assert work(broken) == 0
    assert story(broken) == story(whole)
    assert weather.trained == [1, 2, 3, 4, 5, *range(3, EPOCHS + 1)]  # the recorded one is of epoch 2


# --- notes ------------------------------------------------------------------------------------------------------------


def opened(study: Study, worker_name: str = "w") -> LeasedTrial:
    """Take a trial up as a worker does."""
    ledger = study.ledger(worker_name)
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    return open_trial(study, *held(ledger, claim))


def leave(study: Study, trial: LeasedTrial, epoch: int, *values: float) -> Path:
    """Leave a note with these values as the epochs up to this one, none of which reached the database."""
    folder = study.trial_folder(trial.number)
    folder.mkdir(exist_ok=True)
    claim = trial.lease.claim
    file = folder / f"attempt-{claim.attempt}-epoch-{epoch}-1.pt"
    file.touch()
    first = epoch - len(values) + 1
    since = [Report(claim=claim, step=first + n, value=v, metrics={"value": v}) for n, v in enumerate(values)]
    trial.curve.extend(values)
    trial.lease.unrecorded = since
    found = Checkpoint(epoch=epoch, path=str(file), digest=OF_NOTHING)
    return study.checkpoints / pending_reports.leave(study.store, trial, found)


def park(trial: LeasedTrial) -> None:
    trial.client.ledger.park(trial.lease.claim)


def reached(trial: LeasedTrial) -> tuple[int, list[float]]:
    """Return from which epoch a trial goes on, and with which curve."""
    checkpoint = trial.lease.claim.checkpoint
    return 0 if checkpoint is None else checkpoint.epoch, trial.curve


def test_a_note_is_taken_up_with_all_it_holds(make_study: MakeStudy) -> None:
    """A note is taken up with its reports its curve and its checkpoint."""
    study = make_study(trials=1)
    note = leave(study, first := opened(study), 2, 0.5, 0.25)
    park(first)
    trial = opened(study)
    assert reached(trial) == (2, [0.5, 0.25])
    assert study.optuna.get_trials()[0].intermediate_values == {1: 0.5, 2: 0.25}
    assert trial.client.ledger.curve(trial.lease.claim, "value") == [0.5, 0.25]
    row = row_of(study)
    assert (row.checkpoint_epoch, row.checkpoint_digest, row.attempt) == (2, OF_NOTHING, 2)
    assert not note.exists()
    with pytest.warns(UserWarning, match="step 2 was reported already"):
        trial.report(9.0, 2)
    trial.report(0.125, 3)
    assert study.optuna.get_trials()[0].intermediate_values == {1: 0.5, 2: 0.25, 3: 0.125}


@pytest.mark.both
def test_values_that_are_no_finite_numbers_survive_a_note(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    values = [math.nan, math.inf, -math.inf, 0.1 + 0.2]
    leave(study, first := opened(study), 4, *values)
    park(first)
    trial = opened(study)
    assert [repr(value) for value in trial.curve] == [repr(value) for value in values]
    stored = study.optuna.get_trials()[0].intermediate_values
    assert [repr(stored[step]) for step in (1, 2, 3, 4)] == [repr(value) for value in values]
    raw = trial.client.ledger.curve(trial.lease.claim, "value")
    assert [repr(value) for value in raw] == [repr(value) for value in values]


def test_a_curve_over_an_outage_is_one(make_study: MakeStudy) -> None:
    """What was recorded before an outage and what was not are one curve."""
    study = make_study(trials=1)
    first = opened(study)
    first.report(0.5, 1)
    assert first.client.record_checkpoint(first.lease, Checkpoint(epoch=1, path="/c.pt", digest="d"))
    leave(study, first, 3, 0.25, 0.125)
    park(first)
    assert reached(opened(study)) == (3, [0.5, 0.25, 0.125])
    assert study.optuna.get_trials()[0].intermediate_values == {1: 0.5, 2: 0.25, 3: 0.125}


def test_a_note_from_before_any_report_is_taken(make_study: MakeStudy) -> None:
    """A user's own loop may train epochs before it reports."""
    study = make_study(trials=1)
    note = leave(study, first := opened(study), -1)
    park(first)
    assert reached(opened(study)) == (-1, [])
    assert row_of(study).checkpoint_epoch == -1
    assert not note.exists()


def test_a_note_of_the_recorded_epoch_is_taken(make_study: MakeStudy) -> None:
    """A note of the epoch that is recorded is taken for it is of later batches."""
    study = make_study(trials=1)
    first = opened(study)
    first.report(0.5, 1)
    assert first.client.record_checkpoint(first.lease, Checkpoint(epoch=1, path="/c.pt", digest="d"))
    note = leave(study, first, 1)
    park(first)
    trial = opened(study)
    assert reached(trial) == (1, [0.5])
    assert trial.lease.claim.checkpoint is not None
    assert trial.lease.claim.checkpoint.path != "/c.pt"
    assert not note.exists()


def test_a_note_of_an_attempt_two_before_is_taken(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    note = leave(study, first := opened(study), 2, 0.5, 0.25)
    park(first)
    second = claim_one(study.ledger("killed before it opened the trial"))
    assert isinstance(second, Claim)
    assert reaper.fail_leases_of(study.ledger("launcher"), "killed before it opened the trial", "killed") == 1
    trial = opened(study)
    assert trial.lease.claim.attempt == 3
    assert reached(trial) == (2, [0.5, 0.25])
    assert not note.exists()


@pytest.mark.parametrize("usable", ["newest", "only the older"])
def test_of_several_notes_the_newest_that_is_of_use_is_taken(usable: str, make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    leave(study, first := opened(study), 1, 0.5)
    park(first)
    for _ in range(9):  # to an attempt of two digits, which comes before "9" by its name
        claim = claim_one(study.ledger("w"))
        assert isinstance(claim, Claim)
        study.ledger("w").park(claim)
    newest = study.trial_folder(0) / "attempt-10-handover.json"
    left = json.loads((study.trial_folder(0) / "attempt-1-handover.json").read_text())
    file = study.trial_folder(0) / "attempt-10-epoch-2-1.pt"
    left["checkpoint"] |= {"epoch": 2, "path": str(file)}
    left |= {"curve": [0.5, 0.25], "reports": [[1, 0.5, {"value": 0.5}], [2, 0.25, {"value": 0.25}]]}
    newest.write_text(json.dumps(left))
    if usable == "newest":
        file.touch()
    assert reached(opened(study)) == ((2, [0.5, 0.25]) if usable == "newest" else (1, [0.5]))


def with_another_accumulation(study: Study, trial: LeasedTrial, note: Path) -> None:
    out = Failure(kind=Kind.OUT_OF_MEMORY, message="CUDA out of memory")
    trial.client.ledger.fail(trial.lease.claim, out, accumulation=2)


def without_its_file(study: Study, trial: LeasedTrial, note: Path) -> None:
    Path(json.loads(note.read_text())["checkpoint"]["path"]).unlink()
    park(trial)


def older_than_what_is_recorded(study: Study, trial: LeasedTrial, note: Path) -> None:
    for step, value in enumerate((0.5, 0.25, 0.125), start=1):
        trial.report(value, step)
    assert trial.client.record_checkpoint(trial.lease, Checkpoint(epoch=3, path="/c.pt", digest="d"))
    park(trial)


def holding(content: bytes) -> Callable[[Study, LeasedTrial, Path], None]:
    def spoil(study: Study, trial: LeasedTrial, note: Path) -> None:
        note.write_bytes(content)
        park(trial)

    return spoil


def that_is_a_folder(study: Study, trial: LeasedTrial, note: Path) -> None:
    note.unlink()
    note.mkdir()
    park(trial)


def named(name: str) -> Callable[[Study, LeasedTrial, Path], None]:
    def rename(study: Study, trial: LeasedTrial, note: Path) -> None:
        note.rename(note.with_name(name))
        park(trial)

    return rename


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        pytest.param(with_another_accumulation, (0, []), id="another accumulation"),
        pytest.param(without_its_file, (0, []), id="no file"),
        pytest.param(older_than_what_is_recorded, (3, [0.5, 0.25, 0.125]), id="older"),
        pytest.param(that_is_a_folder, (0, []), id="a folder"),
        pytest.param(holding(b""), (0, []), id="empty"),
        pytest.param(holding(b'{"checkpoint": {"epo'), (0, []), id="cut off"),
        pytest.param(holding(b"\xff\xfe\x00"), (0, []), id="no text"),
        pytest.param(holding(b"[]"), (0, []), id="no table"),
        pytest.param(holding(b"{}"), (0, []), id="without its keys"),
        pytest.param(named("attempt-1 (copy)-handover.json"), (0, []), id="a copy"),
        pytest.param(named("attempt-one-handover.json"), (0, []), id="no number"),
    ],
)
def test_a_note_that_is_of_no_use_is_passed_over(
    spoil: Callable[[Study, LeasedTrial, Path], None], expected: tuple[int, list[float]], make_study: MakeStudy
) -> None:
    study = make_study(trials=1)
    first = opened(study)
    spoil(study, first, leave(study, first, 2, 9.0, 8.0))
    first.curve.clear()
    trial = opened(study)
    assert reached(trial) == expected
    assert trial.client.ledger.curve(trial.lease.claim, "value") == expected[1]


def test_a_note_is_no_reason_to_fail_a_trial(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    note = leave(study, first := opened(study), 2, 9.0, 8.0)
    park(first)
    note.write_text("{}")
    assert worker_loop.work(study, lambda trial: 1.0, study.ledger("w"), StopSignal()) == 0
    assert study.optuna.get_trials()[0].value == 1.0


def test_a_note_written_over_is_the_last_one(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    first = opened(study)
    leave(study, first, 1, 0.5)
    leave(study, first, 2, 0.25)
    assert [file.name for file in study.trial_folder(0).glob("*.json")] == ["attempt-1-handover.json"]
    assert list(study.trial_folder(0).glob(".*")) == []


def test_a_trial_lost_while_its_note_is_taken_up_is_dropped(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1)
    note = leave(study, first := opened(study), 2, 0.5, 0.25)
    park(first)
    report = Ledger.report

    def lose_first(ledger: Ledger, reports: list[Report], **settings: Any) -> ReportResult:
        ledger.park(reports[0].claim)
        return report(ledger, reports, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "report", lose_first)
        with pytest.raises(LostLease):
            opened(study)
    assert note.exists()  # for whoever has the trial
    assert study.optuna.get_trials()[0].intermediate_values == {}


def fail_twice(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real, failures = getattr(Ledger, name), iter(range(2))

    def method(ledger: Ledger, *arguments: object, **settings: object) -> object:
        if next(failures, None) is not None:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))
        return real(ledger, *arguments, **settings)

    monkeypatch.setattr(Ledger, name, method)


def test_a_storage_that_fails_while_a_note_is_taken_up_is_waited_for(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1, recovery={"outage_patience": "30s"})
    leave(study, first := opened(study), 2, 0.5, 0.25)
    park(first)
    for name in ("report", "record_checkpoint"):
        fail_twice(monkeypatch, name)
    seen: list[tuple[int, list[float]]] = []

    def objective(trial: LeasedTrial) -> float:
        seen.append(reached(trial))
        return 1.0

    assert worker_loop.work(study, objective, study.ledger("w"), StopSignal()) == 0
    assert seen == [(2, [0.5, 0.25])]
    with study.storage.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_failures)).all() == []


def test_the_pruner_is_asked_again_for_every_epoch_of_a_note(make_study: MakeStudy) -> None:
    study = make_study(trials=1, pruner={"name": "successive_halving", "reduction_factor": 2})
    study = studies.join(study.storage, study.name)
    leave(study, first := opened(study), 5, 0.5, 0.4, 0.3, 0.2, 0.1)
    park(first)
    opened(study)
    with study.storage.engine.connect() as connection:
        rows = connection.execute(sa.select(trial_system_attributes)).all()
    assert {row.key: json.loads(row.value_json) for row in rows} == {
        "completed_rung_0": 0.5,
        "completed_rung_1": 0.4,
        "completed_rung_2": 0.2,
    }
