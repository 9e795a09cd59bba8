from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.trial import TrialState

from hpo.errors import Fault, StudyError
from hpo.queue.models import Claim
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage, connect, plain_url
from hpo.study import study as studies
from hpo.study.status import FailureCount, summarize
from hpo.study.study import Study
from hpo.study.trial_history import history
from hpo.view import dashboard
from hpo.view import read_only as pages
from hpo.view.compressed import App
from tests.support.trials import claim_one, end_trial, opened
from tests.support.waiting import PATIENCE

COMPLETE = TrialState.COMPLETE


@pytest.fixture
def place(lite: Storage) -> Storage:
    return lite


@pytest.fixture
def demo(place: Storage, tmp_path: Path) -> Study:
    """A study with a complete trial, a running one and a parked one."""
    spec = StudySpec.from_document({"name": "demo", "objective": "x.py:f", "direction": "maximize"})
    made = studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="")
    claims = []
    for _ in range(3):
        ledger = made.ledger("w")
        claim = claim_one(ledger)
        assert isinstance(claim, Claim)
        made.optuna.get_trials(deepcopy=False)
        trial = opened(made, ledger, claim)
        trial.suggest_float("x", 0, 1)
        trial.report(0.25, 1)
        trial.report(0.5, 2)
        if claim.number == 0:
            end_trial(trial, TrialState.COMPLETE, 0.5)
        claims.append(claim)
    ledger.park(claims[2])
    return made


Call = Callable[..., tuple[int, bytes]]


def caller(app: App) -> Call:
    def call(
        method: str, path: str, body: Any = None, host: str = "127.0.0.1:8080", origin: str | None = None
    ) -> tuple[int, bytes]:
        sent = b"" if body is None else json.dumps(body).encode()
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "HTTP_HOST": host,
            "HTTP_ACCEPT_ENCODING": "",
            "CONTENT_LENGTH": str(len(sent)),
            "CONTENT_TYPE": "application/json",
            "wsgi.input": io.BytesIO(sent),
        } | ({"HTTP_ORIGIN": origin} if origin else {})
        setup_testing_defaults(environ)
        told: list[str] = []
        answer = app(environ, lambda status, *_: told.append(status))
        found = b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
        return int(told[0].split()[0]), found

    return call


@pytest.fixture
def read_only(place: Storage, demo: Study) -> Call:
    return caller(dashboard.app(place, write=False))


@pytest.fixture
def writable(place: Storage, demo: Study) -> Call:
    return caller(dashboard.app(place, write=True))


def test_pages_and_data_are_served(read_only: Call, demo: Study) -> None:
    assert read_only("GET", "/")[0] == 302
    assert read_only("GET", "/dashboard")[0] == 200
    status, body = read_only("GET", "/api/studies")
    assert status == 200
    assert [one["study_name"] for one in json.loads(body)["study_summaries"]] == ["demo"]
    status, body = read_only("GET", f"/api/studies/{demo.study_id}")
    assert status == 200
    assert [trial["state"] for trial in json.loads(body)["trials"]] == ["Complete", "Running", "Running"]
    assert json.loads(body)["trials"][1]["intermediate_values"] == [
        {"step": 1, "value": 0.25},
        {"step": 2, "value": 0.5},
    ]
    assert json.loads(body)["best_trials"][0]["number"] == 0


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/trials/2/tell", {"state": "Fail"}),
        ("DELETE", "/api/studies/1", {}),
        ("POST", "/api/studies/1/rename", {"study_name": "other"}),
        ("POST", "/api/studies", {"study_name": "other", "directions": ["minimize"]}),
        ("PUT", "/api/studies/1/note", {"body": "x", "version": 1}),
        ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"a": "1"}}),
        ("PATCH", "/api/studies/1", None),
    ],
)
def test_whatever_may_change_something_is_forbidden_and_changes_nothing(
    read_only: Call, demo: Study, method: str, path: str, body: Any
) -> None:
    before = summarize(demo, clock=lambda: 0.0), read_only("GET", "/api/studies/1")
    status, answer = read_only(method, path, body)
    assert status == 403
    assert json.loads(answer) == {"reason": "the dashboard is read-only; `hpo dashboard --write` allows changes"}
    assert (summarize(demo, clock=lambda: 0.0), read_only("GET", "/api/studies/1")) == before


def test_looking_on_disturbs_neither_lease_nor_ledger(read_only: Call, demo: Study) -> None:
    before = summarize(demo, clock=lambda: 0.0)
    for path in ("/api/studies", "/api/studies/1", "/api/studies/1/param_importances", "/csv/1", "/api/meta"):
        assert read_only("GET", path)[0] == 200, path
    assert summarize(demo, clock=lambda: 0.0) == before


@pytest.mark.parametrize("number", [1, 2])
def test_with_write_a_trial_is_failed_by_a_person(writable: Call, demo: Study, number: int) -> None:
    """Trial 1 runs, trial 2 is parked. The worker that has it records no failure of its own."""
    told = {"state": "Fail"}
    assert writable("POST", f"/api/trials/{number + 1}/tell", told) == (204, b"")
    found = history(demo, number)
    assert (found.state, found.outcome, found.reason) == ("fail", "stopped", "ended by a person, in the dashboard")
    demo.ledger("w").drop(Claim(trial_id=number + 1, number=number, attempt=1), "gone")
    assert (history(demo, number).failures, summarize(demo).counts["fail"]) == ([], 1)
    assert summarize(demo).failures == [FailureCount(kind="stopped", count=1, retried=0, message="ended by a person")]
    again = {"reason": "the trial has ended already: it is failed"}
    assert writable("POST", f"/api/trials/{number + 1}/tell", told) == (409, json.dumps(again).encode())


def test_a_trial_that_has_ended_or_is_unknown_cannot_be_failed(writable: Call, demo: Study) -> None:
    status, answer = writable("POST", "/api/trials/1/tell", {"state": "Fail"})
    assert (status, json.loads(answer)["reason"]) == (409, "the trial has ended already: it is complete")
    assert writable("POST", "/api/trials/9/tell", {"state": "Fail"})[0] == 404
    assert writable("POST", "/api/trials/2/tell", {"state": "Odd"})[0] == 400
    assert writable("POST", "/api/trials/2/tell", {"state": "Complete", "values": [1.0]})[0] == 204
    assert [trial.state for trial in demo.optuna.trials] == [COMPLETE, COMPLETE, TrialState.RUNNING]


def test_a_trial_of_optuna_s_own_is_failed_too(place: Storage, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/theirs.db"
    theirs = optuna.create_study(storage=url)
    theirs.ask()
    theirs.enqueue_trial({})
    writable = caller(dashboard.app(connect(url), write=True))
    for trial_id in (1, 2):
        assert writable("POST", f"/api/trials/{trial_id}/tell", {"state": "Fail"})[0] == 204
    assert [trial.state for trial in theirs.trials] == [TrialState.FAIL] * 2


def test_a_read_only_page_has_no_buttons_that_change_something(read_only: Call, writable: Call) -> None:
    """The names are those of the optuna-dashboard that is installed."""
    page, whole = read_only("GET", "/dashboard/studies/1")[1], writable("GET", "/dashboard/studies/1")[1]
    style = page[page.index(b"<style>button:has(svg") : page.index(b"</head>")]
    assert page.replace(style, b"") == whole
    script = read_only("GET", "/static/bundle.js")[1].decode()
    for name in pages.NAMES:
        assert f'"aria-label":"{name}"' in script
        assert f'button[aria-label="{name}"]' in style.decode()
    for icon in pages.ICONS:
        assert f'"{icon}")' in script
        assert f'data-testid="{icon}Icon"' in style.decode()
    assert pages.NOTICE in style.decode()


@pytest.mark.both
def test_with_write_a_study_is_deleted_with_our_rows_dead(writable: Call, demo: Study) -> None:
    assert writable("DELETE", "/api/studies/1", {})[0] == 204
    with pytest.raises(StudyError, match="was deleted"):
        summarize(demo)


@pytest.mark.parametrize(
    "host", ["evil.example:8080", "evil.example", "", "127.0.0.1.evil.example", "192.168.0.9", "["]
)
def test_a_request_under_a_foreign_name_is_refused(read_only: Call, writable: Call, host: str) -> None:
    for call in (read_only, writable):
        status, answer = call("GET", "/api/studies", host=host)
        assert status == 403
        assert "not served under the name" in json.loads(answer)["reason"]


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "LOCALHOST"])
def test_every_name_of_the_loopback_is_served(read_only: Call, host: str) -> None:
    assert read_only("GET", "/api/studies", host=host)[0] == 200


def test_the_served_host_is_let_in_and_all_addresses_when_all_are_served(place: Storage) -> None:
    named = caller(dashboard.app(place, False, {"box.lan"}))
    assert named("GET", "/api/studies", host="box.lan:8080")[0] == 200
    assert named("GET", "/api/studies", host="192.168.0.9:8080")[0] == 403
    everywhere = caller(dashboard.app(place, False, {"0.0.0.0"}))
    assert everywhere("GET", "/api/studies", host="192.168.0.9:8080")[0] == 200
    assert everywhere("GET", "/api/studies", host="evil.example:8080")[0] == 403


def test_a_page_of_another_site_may_not_change_anything(writable: Call) -> None:
    told = {"state": "Fail"}
    assert writable("POST", "/api/trials/2/tell", told, origin="https://evil.example")[0] == 403
    assert writable("POST", "/api/trials/2/tell", told, origin="null")[0] == 403
    assert writable("POST", "/api/trials/2/tell", told, origin="http://127.0.0.1:8080")[0] == 204


def test_a_port_in_use_is_a_clear_fault(place: Storage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=f"--port {port}: another program uses it on 127.0.0.1"):
            dashboard.serve(place, port=port)


def test_a_host_that_is_not_here_is_a_clear_fault(place: Storage) -> None:
    with pytest.raises(Fault, match=r"--host 192\.0\.2\.1: cannot be served on"):
        dashboard.serve(place, host="192.0.2.1", port=0)


SERVE = """
import sys
from hpo.storage.connect import connect
from hpo.view import dashboard
dashboard.serve(connect(sys.argv[1]), host=sys.argv[2], port=0)
"""


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_served_dashboard_answers_and_ends(place: Storage, demo: Study, host: str, warns: bool) -> None:
    """A served dashboard prints its url answers there and ends by ctrl c."""
    arguments = [sys.executable, "-c", SERVE, plain_url(place.url), host]
    served = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        line = served.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        with urllib.request.urlopen(url.replace("0.0.0.0", "127.0.0.1") + "api/studies", timeout=PATIENCE) as answer:
            assert json.load(answer)["study_summaries"][0]["study_name"] == demo.name
        request = urllib.request.Request(url.replace("0.0.0.0", "127.0.0.1") + "api/studies/1", method="DELETE")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=PATIENCE)
    finally:
        os.kill(served.pid, signal.SIGINT)
        try:
            _, errors = served.communicate(timeout=PATIENCE)
        finally:
            served.kill()  # it did not hear the signal
    assert served.returncode == 0
    assert ("the dashboard has no login" in errors) == warns
    assert "read-only" in line
