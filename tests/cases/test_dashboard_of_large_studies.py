"""The page of a large study: byte for byte what optuna-dashboard answers, made without its objects, sent as gzip."""

from __future__ import annotations

import gzip
import math
from datetime import datetime
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from hpo.storage.connect import Storage
from hpo.view import study_detail
from hpo.view.compressed import App, compressed

SPACE = {
    "lr": FloatDistribution(1e-5, 1.0, log=True),
    "drop": FloatDistribution(0.0, 0.5, step=0.25),
    "layers": IntDistribution(1, 8),
    "wide": IntDistribution(16, 64, step=16),
    'opt "quoted" ü': CategoricalDistribution(("sgd", "é\n", None, True, 2.5)),
}
NARROW = {"lr": FloatDistribution(1e-3, 0.1, log=True)}
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL)
START = datetime(2026, 11, 29, 12, 0, 0, 123456)


def params(number: int) -> dict[str, Any]:
    choices = ("sgd", "é\n", None, True, 2.5)
    return {
        "lr": 10.0 ** -(number % 5),
        "drop": 0.25 * (number % 3),
        "layers": 1 + number % 8,
        "wide": 16 * (1 + number % 4),
        'opt "quoted" ü': choices[number % 5],
    }


def fill(study: optuna.Study, count: int, *, steps: int = 4) -> None:
    """Add finished trials of several kinds, with whatever values and curves may hold."""
    objectives = len(study.directions)
    for number in range(count):
        state = STATES[number % 4]
        is_narrow = number % 7 == 0
        value = [math.inf, -math.inf, 0.5, 1e-300][number % 4] if number > 8 else 0.25
        attributes: dict[str, Any] = (
            {} if number % 3 else {"host": "gpu-0", "cost": number, "ok": True, "list": [1, "a"]}
        )
        study.add_trial(
            create_trial(
                state=state,
                values=None if state == TrialState.FAIL else [value, number % 5][:objectives],
                params={"lr": 0.01} if is_narrow else params(number),
                distributions=NARROW if is_narrow else SPACE,
                user_attrs=attributes,
                system_attrs={"completed_rung_0": 0.5} if number % 2 else {},
                intermediate_values={}
                if is_narrow
                else {step: [math.nan, math.inf, -0.0, 0.125][(step + number) % 4] for step in range(1, steps + 1)},
            )
        )


def exotic(study: optuna.Study) -> None:
    """Add what only optuna-dashboard knows how to show, and trials that have not ended."""
    study.add_trial(create_trial(values=[0.1, 0.1][: len(study.directions)], system_attrs={"constraints": [1.0, -1.0]}))
    study.enqueue_trial({"lr": 0.5, "opt": None})
    running = study.ask()  # takes the one that waits
    running.suggest_float("lr", 1e-5, 1.0, log=True)
    if len(study.directions) == 1:
        running.report(0.5, 3)
    study.enqueue_trial({"lr": 0.25})
    noted = study.get_trials(deepcopy=False)[3]
    study.set_user_attr("team", {"a": 1})
    storage = study._storage
    storage.set_study_system_attr(study._study_id, f"dashboard:{noted._trial_id}:note_ver", 1)
    storage.set_study_system_attr(study._study_id, f"dashboard:{noted._trial_id}:note_str:0", "*seen*")
    storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 1)
    storage.set_study_system_attr(study._study_id, "dashboard:note_str:0", "of the study")


def get(app: App, path: str, query: str, accept: str = "") -> tuple[str, dict[str, str], bytes]:
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query}
    environ["HTTP_ACCEPT_ENCODING"] = accept
    setup_testing_defaults(environ)
    told: list[Any] = []
    answer = app(environ, lambda status, headers, *_: told.extend([status, dict(headers)]))
    body = b"".join(answer)
    if hasattr(answer, "close"):
        answer.close()
    return told[0], told[1], body


@pytest.mark.parametrize("directions", [["minimize"], ["maximize"], ["minimize", "maximize"]])
def test_the_answer_is_optuna_dashboards_own(lite: Storage, directions: list[str]) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="demo", directions=directions)
    path = f"/api/studies/{study._study_id}"
    ours, theirs = study_detail.app(lite.optuna), optuna_dashboard.wsgi(lite.optuna)
    assert get(ours, path, "after=0")[2] == get(theirs, path, "after=0")[2]  # no trial
    fill(study, 40)
    exotic(study)
    ours, theirs = study_detail.app(lite.optuna), optuna_dashboard.wsgi(lite.optuna)  # both keep trials for seconds
    for query in ("after=0", "after=17", "after=42", "after=1000", ""):
        status, headers, body = get(ours, path, query)
        assert (status, headers["Content-Type"]) == ("200 OK", "application/json")
        assert body == get(theirs, path, query)[2]


@pytest.mark.parametrize(("path", "query"), [("/api/studies/99", "after=0"), ("/api/studies/1", "after=-1")])
def test_what_is_refused_is_refused_as_by_optuna_dashboard(lite: Storage, path: str, query: str) -> None:
    optuna.create_study(storage=lite.optuna, study_name="demo")
    ours, theirs = get(study_detail.app(lite.optuna), path, query), get(optuna_dashboard.wsgi(lite.optuna), path, query)
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]


def test_a_study_judged_by_a_person_is_left_to_optuna_dashboard(lite: Storage) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="demo")
    fill(study, 4)
    lite.optuna.set_study_system_attr(study._study_id, study_detail.PREFERENTIAL, True)
    path = f"/api/studies/{study._study_id}"
    body = get(study_detail.app(lite.optuna), path, "after=0")[2]
    assert b'"preference_history"' in body
    assert body == get(optuna_dashboard.wsgi(lite.optuna), path, "after=0")[2]


def test_objects_are_made_of_as_many_trials_as_differ_in_kind(lite: Storage) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="demo", direction="minimize")
    outline = study_detail.Outline(lite.optuna)
    fill(study, 90)
    few = outline.get_all_trials(study._study_id)
    fill(study, 90)
    more = outline.get_all_trials(study._study_id)
    # Two spaces, with and without attributes, failed or not; and the best.
    assert (len(few), len(more)) == (9, 9)
    assert study.best_trial.number in [trial.number for trial in more]


def test_what_is_new_is_shown_at_the_next_look(lite: Storage) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="demo")
    fill(study, 8)
    path, app = f"/api/studies/{study._study_id}", study_detail.app(lite.optuna)
    get(app, path, "after=0")
    fill(study, 4)
    body = get(app, path, "after=8")[2]
    assert body.count(b'"trial_id"') == 4 + body.partition(b'"best_trials"')[2].count(b'"trial_id"')


def test_json_goes_as_gzip_to_whoever_takes_it(lite: Storage) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="demo")
    fill(study, 100, steps=40)
    path = f"/api/studies/{study._study_id}"
    app = compressed(study_detail.app(lite.optuna))
    plain = get(app, path, "after=0")
    packed = get(app, path, "after=0", accept="gzip, deflate, br")
    assert "Content-Encoding" not in plain[1]
    assert packed[1] == {"Content-Type": "application/json", "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    assert gzip.decompress(packed[2]) == plain[2]
    assert 8 * len(packed[2]) < len(plain[2])
    assert get(app, path, "after=0", accept="br, gzip;q=0")[2] == plain[2]


def test_what_is_short_or_packed_already_is_left_as_it_is(lite: Storage) -> None:
    app = compressed(study_detail.app(lite.optuna))
    _, headers, body = get(app, "/api/meta", "", accept="gzip")
    assert "Content-Encoding" not in headers
    assert int(headers["Content-Length"]) == len(body)
    _, headers, body = get(app, "/static/bundle.js", "", accept="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert int(headers["Content-Length"]) == len(body)  # not packed twice
    assert gzip.decompress(body).startswith(b"/*!")
