"""The dashboard's largest answer, a study with all its trials, written from stored rows and sent in pieces.

optuna-dashboard builds objects, dicts and the text of all trials at once. For 10,000 trials this takes seconds and hundreds of
megabytes per request. Here optuna-dashboard answers for an outline of the study: a few trials that represent all others. The
full list of trials is written here in the same format and replaces the list of the outline.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import optuna_dashboard
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.tables import as_local
from hpo.storage.trial_rows import TrialRow
from hpo.study.pareto import is_non_dominated
from hpo.view.compressed import App, Environ, StartResponse

PATH = re.compile(r"/api/studies/(\d+)/?")
PIECE = 200  # trials sent at once
MAX_ATTRIBUTE = 1024  # shown characters of an attribute that is a list or dict
SHOWN_OF_TRIAL = (
    "fixed_params",
    "constraints",
    "artifacts:",
)  # system attributes of a trial that the dashboard shows
SHOWN_OF_STUDY = re.compile(
    r"dashboard:(?:artifacts:)?(\d+):"
)  # system attributes of a study that belong to a trial, by id
PREFERENTIAL = "preference:is_preferential"  # the system attribute of a study with preferential optimization


class Outline(OptunaStorage):
    """A storage that shows only the trials that optuna-dashboard needs for everything but the list of trials.

    These are open trials, the best trials, and trials with a note or file. Of trials with the same search space and the same
    attribute names, the last one is shown.
    """

    def __init__(self, whole: OptunaStorage) -> None:
        super().__init__(whole.engine)
        self.whole = whole

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        del deepcopy  # the trials are new objects at each call
        shown = self.shown(study_id, self.whole.rows(study_id))
        return [row.frozen() for row in shown if states is None or row.state in states]

    def shown(self, study_id: int, rows: Sequence[TrialRow]) -> list[TrialRow]:
        """Return the trials of a study that are in the outline."""
        told = {int(found[1]) for key in self.get_study_system_attrs(study_id) if (found := SHOWN_OF_STUDY.match(key))}
        last = {_likeness(row): row.trial_id for row in rows}
        wanted = told.union(last.values(), _best(rows, self.get_study_directions(study_id)))
        return [row for row in rows if row.trial_id in wanted or not _is_plain(row)]


def _likeness(row: TrialRow) -> Any:
    attributes = tuple(
        (key, text[0] in "-0123456789NI") for key, text in row.user_attributes.items()
    )  # a number, or not
    return id(row.space), row.state == TrialState.FAIL, bool(row.steps), attributes


def _best(rows: Sequence[TrialRow], directions: Sequence[StudyDirection]) -> set[int]:
    """Return the ids of the best COMPLETE trials: the first best one, or the Pareto front of several objectives."""
    complete = [row for row in rows if row.state == TrialState.COMPLETE]
    if not complete:
        return set()
    signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions]
    losses = np.array([row.values for row in complete]) * signs
    leads = [losses[:, 0].argmin()] if len(signs) == 1 else np.flatnonzero(is_non_dominated(losses))
    return {complete[position].trial_id for position in leads}


def _is_plain(row: TrialRow) -> bool:
    """Return whether a trial has finished and has no attribute that only optuna-dashboard can format."""
    return row.is_finished and not any(key.startswith(SHOWN_OF_TRIAL) for key in row.system_attributes)


def app(storage: OptunaStorage) -> App:
    """Return the dashboard of a storage as a WSGI application. The list of a study's trials is written here."""
    whole: App = optuna_dashboard.wsgi(storage)
    outline = Outline(storage)
    outlined: App = optuna_dashboard.wsgi(outline)

    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        asked = PATH.fullmatch(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "GET" else None
        after = dict(parse_qsl(environ.get("QUERY_STRING", ""))).get("after", "0")
        if asked is None or not after.isdecimal():
            return whole(environ, start_response)
        detail = _detail(outline, outlined, int(asked[1]), int(after), environ, start_response)
        return whole(environ, start_response) if detail is None else detail

    return answer


def _detail(
    outline: Outline, outlined: App, study_id: int, after: int, environ: Environ, start_response: StartResponse
) -> Iterable[bytes] | None:
    """Return the answer for a study. None leaves the answer to optuna-dashboard: for preferential and for missing studies."""
    try:
        if outline.get_study_system_attrs(study_id).get(PREFERENTIAL):
            return None
        rows = outline.whole.rows(study_id)
    except KeyError:
        return None
    told: list[Any] = []
    head = json.loads(b"".join(outlined({**environ, "QUERY_STRING": "after=0"}, lambda *given: told.extend(given))))
    if not told[0].startswith("200"):
        return None
    start_response(told[0], [("Content-Type", "application/json")])
    return _body(head, study_id, rows[after:])


def _body(head: dict[str, Any], study_id: int, rows: Sequence[TrialRow]) -> Iterator[bytes]:
    """Yield optuna-dashboard's answer for the outline, with these trials in place of the outline's."""
    shown = {trial["trial_id"]: trial for trial in head["trials"]}
    place = uuid.uuid4().hex
    before, after = json.dumps(head | {"trials": place}).split(f'"{place}"')
    yield f"{before}[".encode()
    writer = TrialWriter(study_id)
    texts = (json.dumps(shown[row.trial_id]) if row.trial_id in shown else writer.text(row) for row in rows)
    joint = ""
    while piece := list(islice(texts, PIECE)):
        yield (joint + ", ".join(piece)).encode()
        joint = ", "
    yield f"]{after}".encode()


# --- a trial as optuna-dashboard writes it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialWriter:
    """Writes trials as JSON like optuna-dashboard. For trials without note, files, constraints and fixed parameters only."""

    study_id: int
    _spaces: dict[int, list[ParamWriter]] = field(
        default_factory=dict
    )  # by the id of the space object, which trials share

    def text(self, row: TrialRow) -> str:
        """Return a trial as JSON."""
        writers = self._spaces.get(id(row.space))
        if writers is None:
            writers = self._spaces[id(row.space)] = [ParamWriter.of(*named) for named in row.space.items()]
        params = ", ".join([writer.text(value) for writer, value in zip(writers, row.params, strict=True)])
        curve = ", ".join(
            [f'{{"step": {step}, "value": {_number(value)}}}' for step, value in zip(row.steps, row.curve, strict=True)]
        )
        attributes = json.dumps([_attribute(key, json.loads(text)) for key, text in row.user_attributes.items()])
        values = "" if row.values is None else f', "values": [{", ".join(map(_number, row.values))}]'
        times = {"datetime_start": as_local(row.started), "datetime_complete": as_local(row.completed)}
        return (
            f'{{"trial_id": {row.trial_id}, "study_id": {self.study_id}, "number": {row.number}, '
            f'"state": "{row.state.name.capitalize()}", "params": [{params}], "fixed_params": [], '
            f'"user_attrs": {attributes}, "note": {{"version": 0, "body": ""}}, "artifacts": [], "constraints": [], '
            f'"intermediate_values": [{curve}]{values}'
            + "".join(f', "{key}": "{moment.isoformat()}"' for key, moment in times.items() if moment)
            + "}"
        )


@dataclass(frozen=True)
class ParamWriter:
    """Writes values of one parameter as JSON."""

    distribution: BaseDistribution
    before: str
    after: str
    _choices: dict[float, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, distribution: BaseDistribution) -> ParamWriter:
        """Return the writer for a parameter."""
        described = json.dumps(_described(distribution))
        return cls(distribution, f'{{"name": {json.dumps(name)}, ', f', "distribution": {described}}}')

    def text(self, value: float) -> str:
        """Return the parameter with this stored value as JSON."""
        known = self._choices.get(value)
        if known is not None:
            return known
        external = self.distribution.to_external_repr(value)
        text = (
            f'{self.before}"param_internal_value": {json.dumps(self.distribution.to_internal_repr(external))}, '
            f'"param_external_value": {json.dumps(str(external))}, "param_external_pytyp": "{type(external)}"{self.after}'
        )
        if isinstance(self.distribution, CategoricalDistribution):
            self._choices[value] = text
        return text


def _described(distribution: BaseDistribution) -> dict[str, Any]:
    kind = {"type": type(distribution).__name__}
    if isinstance(distribution, CategoricalDistribution):
        choices = [{"pytype": str(type(choice)), "value": str(choice)} for choice in distribution.choices]
        return kind | {"choices": choices}
    return kind | {key: getattr(distribution, key) for key in ("low", "high", "step", "log")}


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return '"nan"' if math.isnan(value) else '"inf"' if value > 0 else '"-inf"'


def _attribute(key: str, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"key": key, "value": value}
    is_number = isinstance(value, int | float)  # includes booleans
    return {"key": key, "value": str(value) if is_number else json.dumps(value)[:MAX_ATTRIBUTE]}
