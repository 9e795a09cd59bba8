"""The dashboard's button FAIL TRIAL: the trial ends as one that a person ended, if it has not ended meanwhile."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable

from hpo.storage.connect import Storage
from hpo.study import control
from hpo.study.format import STATES
from hpo.view.compressed import App, Environ, StartResponse

PATH = re.compile(r"/api/trials/(\d+)/tell/?")


def app(dashboard: App, place: Storage) -> App:
    """Return the dashboard with our answer to FAIL TRIAL. optuna-dashboard fails with code 500 on a trial that has ended."""

    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        asked = PATH.fullmatch(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "POST" else None
        if asked is None:
            return dashboard(environ, start_response)
        sent = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if not _is_fail(sent):
            return dashboard({**environ, "wsgi.input": io.BytesIO(sent)}, start_response)
        status, why = _fail(place, int(asked[1]))
        body = json.dumps({"reason": why}).encode() if why else b""
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def _is_fail(sent: bytes) -> bool:
    try:
        return str(json.loads(sent)["state"]).upper() == "FAIL"
    except (ValueError, KeyError, TypeError):
        return False


def _fail(place: Storage, trial_id: int) -> tuple[str, str]:
    """Set a trial to FAIL. Return the HTTP status, and the reason if that could not be done."""
    was = control.fail_by_id(place, trial_id)
    if was is None:
        return "404 Not Found", f"there is no trial with the id {trial_id}"
    if was.is_finished():
        return "409 Conflict", f"the trial has ended already: it is {STATES[was.name.lower()]}"
    return "204 No Content", ""
