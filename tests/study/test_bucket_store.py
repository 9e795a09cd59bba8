"""Studies with checkpoints in a bucket, without a server: what is refused before a study is made, and what messages show.

tests/engines/test_object_storage.py has the tests with a real server.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpo
from hpo.errors import CheckpointError, SpecError, StorageError, StudyError
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage
from hpo.study import bucket_store
from hpo.study import study as studies
from hpo.study.bucket_store import BucketError, BucketStore
from hpo.study.checkpoint_store import FolderStore, digest_of
from tests.conftest import OWN_OBJECTIVE

URL = "s3://bucket/studies"
SAID = "a server may say anything"


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="needs the extra s3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "the-key",
        "AWS_SECRET_ACCESS_KEY": "the-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # nothing listens there
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket_store, "RETRIES", 0)


def make(place: Storage, folder: Path, **document: Any) -> studies.Study:
    spec = StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": URL, **document})
    return studies.create_or_join(place, spec, code_folder=folder, code_digest="")


def test_no_study_is_made_while_its_bucket_cannot_be_reached(lite: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused:
        make(lite, tmp_path)
    assert str(refused.value) == (
        "checkpoints s3://bucket/studies: the server cannot be reached (Connection refused); check the network and "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
    )
    assert optuna.get_all_study_names(lite.optuna) == []


@contextmanager
def answering(status: int, content: str, *, takes_writes: bool = False) -> Iterator[str]:
    """Run a server that gives each request this answer, but for writes if it takes them."""

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_taken = takes_writes and self.command in ("PUT", "POST")
            said = b"<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>" if is_taken else content.encode()
            self.send_response(200 if is_taken else status)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def of_amazon(code: str) -> str:
    """Return an error in the words of Amazon's server. SeaweedFS has none of these."""
    return f"<Error><Code>{code}</Code><Message>{SAID}</Message></Error>"


@pytest.mark.parametrize(
    ("status", "content", "kind", "told"),
    [
        (
            404,
            of_amazon("NoSuchBucket"),
            StudyError,
            "there is no such bucket; make it, or check its name and AWS_ACCESS_KEY_ID",
        ),
        (403, of_amazon("AccessDenied"), StudyError, "access is denied (AccessDenied); check AWS_ACCESS_KEY_ID"),
        (503, of_amazon("SlowDown"), StorageError, "the server fails at present (SlowDown); try again later"),
        (502, f"<html>{SAID}</html>", StorageError, "the server fails at present (502 Bad Gateway); try again later"),
        (429, "", StorageError, "the server fails at present (429 Too Many Requests); try again later"),
        (400, of_amazon("RequestTimeout"), StorageError, "the server fails at present (RequestTimeout); try again"),
        (405, f"<html>{SAID}</html>", StudyError, "the server refused (405 Method Not Allowed); check AWS_"),
        (
            400,
            of_amazon("AuthorizationHeaderMalformed"),
            StudyError,
            "the server refused (AuthorizationHeaderMalformed); check AWS_",
        ),
    ],
)
def test_what_a_server_refuses_is_told_before_a_study_is_made(
    status: int,
    content: str,
    kind: type[Exception],
    told: str,
    lite: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(status, content) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(kind) as refused:
            make(lite, tmp_path)
    assert str(refused.value).startswith(f"checkpoints s3://bucket/studies: {told}")
    assert SAID not in str(refused.value)
    assert optuna.get_all_study_names(lite.optuna) == []


def test_a_worker_tries_again_if_its_bucket_fails_while_it_joins(
    lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine never starts a worker again that was refused, and Kubernetes ends the whole Job."""
    with answering(503, "", takes_writes=True) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        study = make(lite, tmp_path)
        with pytest.raises(
            StorageError, match=r"the server fails at present \(503 Service Unavailable\); try again later"
        ):
            studies.check_worker(study, mine=None, code_digest="", allow_code_change=False)


def test_it_is_said_if_nobody_knows_whether_a_checkpoint_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BucketStore(URL, tmp_path, patience=5)
    assert [store.exists("t/a.pt"), store.exists("t/b.pt")] == [False, False]
    (said,) = caplog.messages
    assert said.startswith(f"it is not known whether {URL}/t/a.pt is there: {URL}: the server cannot be reached")


def test_objects_are_deleted_beside_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that failed may have left none. Google, Azure and obstore's store of files then refuse the whole."""
    from obstore.store import LocalStore

    (tmp_path / "bucket").mkdir()
    store = BucketStore(URL, tmp_path / "here", patience=5)
    monkeypatch.setattr(store, "_client", lambda: LocalStore(tmp_path / "bucket"))
    file = tmp_path / "state"
    file.write_bytes(b"state")
    for name in "abc":
        store.put(f"t/{name}.pt", file)
    (tmp_path / "bucket/t/a.pt").unlink()
    store.delete([f"t/{name}.pt" for name in "abc"])
    assert (store.sizes(), store.names("t")) == ({}, set())


def test_without_obstore_the_extra_is_named(lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StudyError, match=r"obstore is not installed; pip install 'hpo-torch\[s3\]'"):
        make(lite, tmp_path)
    assert optuna.get_all_study_names(lite.optuna) == []


def test_missing_credentials_are_told(lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"\(Connection refused\), and no AWS_ACCESS_KEY_ID is set; check the network"
    ):
        make(lite, tmp_path)


def test_a_command_cannot_have_its_folder_in_a_bucket(lite: Storage, tmp_path: Path) -> None:
    own = {"objective": None, "command": ["python", "t.py", "{x}"], "space": {"x": {"low": 0.0, "high": 1.0}}}
    with pytest.raises(
        SpecError, match="the program of `command` saves in a folder, which other machines would not see"
    ):
        make(lite, tmp_path, **own)


def test_the_environment_may_name_the_bucket_and_its_credentials_are_not_shown(
    lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_CHECKPOINTS", "s3://key:topsecret@bucket")
    with pytest.raises(SpecError, match="HPO_CHECKPOINTS: the s3:// URL has more than a bucket") as refused:
        make(lite, tmp_path, checkpoints=None)
    assert "topsecret" not in str(refused.value)
    monkeypatch.setenv("HPO_CHECKPOINTS", URL)
    with pytest.raises(StorageError, match="checkpoints s3://bucket/studies: the server cannot be reached"):
        make(lite, tmp_path, checkpoints=None)


def test_what_a_server_says_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    class GenericError(Exception):
        pass

    said = 'HTTP error\n inner: message: "cannot use the-secret of http://me:pw@host/x"'
    shown = str(bucket_store._explained(URL, GenericError(said)))
    assert "cannot use *** of http://***" in shown
    plain = str(bucket_store._explained(URL, GenericError("Generic S3 error: bad key the-key")))
    assert plain.startswith(f"{URL}: Generic S3 error: bad key ***;")


def test_after_a_failure_no_request_is_sent_for_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BucketStore(URL, tmp_path, patience=5)
    asked: list[str] = []
    monkeypatch.setattr(store, "_client", lambda: asked.append("asked"))
    assert (store.is_away, store.failing_seconds) == (False, 0.0)
    for _ in range(2):
        with pytest.raises(BucketError):
            store.sizes()
    assert (store.is_away, store.failing_seconds > 0, asked) == (True, True, ["asked"])
    monkeypatch.setattr(store, "_quiet_until", 0.0)
    with pytest.raises(BucketError):
        store.sizes()
    assert asked == ["asked"] * 2


def test_a_file_of_this_machine_with_the_digest_needs_no_request(tmp_path: Path) -> None:
    file = tmp_path / "trial-000000" / "attempt-1-epoch-1-1.pt"
    file.parent.mkdir()
    file.write_bytes(b"state")
    store = BucketStore(URL, tmp_path, patience=5)
    name = store.name_of(f"{URL}/trial-000000/attempt-1-epoch-1-1.pt")
    assert store.get(name, digest_of(file)) == file
    with pytest.raises(BucketError):
        store.get(name, "another")
    assert file.read_bytes() == b"state"


def test_weights_in_a_bucket_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint {URL}/t/a.pt cannot be read: the server cannot be reached"):
        hpo.load_weights(f"{URL}/t/a.pt")


def test_a_folder_takes_files_from_elsewhere(tmp_path: Path) -> None:
    """As a copy of a study's checkpoints needs it."""
    file = tmp_path / "file"
    file.write_bytes(b"state")
    store = FolderStore(tmp_path / "root" / "uid")
    store.put("trial-000000/attempt-1-epoch-1-1.pt", file)
    assert store.sizes() == {"trial-000000/attempt-1-epoch-1-1.pt": 5}
    assert store.get("trial-000000/attempt-1-epoch-1-1.pt").read_bytes() == b"state"
    store.delete(["trial-000000/attempt-1-epoch-1-1.pt", "trial-000000/none"])
    assert store.sizes() == {}
