"""What a study holds, read only: a summary for the eye, the trials that newly finished, the best ones in full.

Plain statements on Optuna's tables and ours, a fixed few of them however many trials there are; nothing here writes,
takes a lock or loads all trials as objects.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import TrialState

from hpo import space, storage
from hpo import study as studies_of_hpo
from hpo.errors import StudyError
from hpo.storage import Storage
from hpo.study import Study
from hpo.tables import (
    INTERMEDIATE_TYPE,
    UID_KEY,
    VALUE_TYPE,
    hpo_curves,
    hpo_studies,
    hpo_trials,
    intermediate_values,
    study_user_attributes,
    trial_params,
    trial_values,
    trials,
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
ORDINARY = ("complete", "pruned")  # outcomes that nobody needs to be told the reason of
WINDOW = 128  # finished trials from which the speed is taken: some waves of a machine full of GPUs
CHUNK = 500  # ids in one IN (...); SQLite takes 999 parameters at the least


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best COMPLETE trial."""

    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial under a live lease."""

    number: int
    epochs: int
    worker: str
    attempt: int
    curve: list[float]  # what pruners see, by step
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ParkedTrial:
    """A trial that waits for a worker, and the epoch from which it will go on."""

    number: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A kind of ending other than complete or pruned: how often, and the last line of the last one's reason."""

    outcome: str
    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One study at one moment."""

    name: str
    direction: str
    sampler: str
    pruner: str
    counts: dict[str, int]  # complete, pruned, fail, running, parked, foreign, waiting: every trial in one of them
    budget: int  # rows that may be spent in all, those that a fork brought along included
    spent: int  # rows in any state but WAITING
    best: Best | None
    stop_reason: str | None
    running: list[RunningTrial]
    parked: list[ParkedTrial]
    failures: list[Failure]
    seconds: float  # from the first trial's start to now, or to the last trial's end if none runs
    seconds_per_trial: float | None  # of the last ones, side by side as they ran; None until two have finished
    seconds_left: float | None  # likewise

    @property
    def finished(self) -> int:
        return self.counts["complete"] + self.counts["pruned"] + self.counts["fail"]


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """A trial that ended, in a line."""

    number: int
    state: str
    value: float | None
    outcome: str
    epochs: int
    seconds: float
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A finished trial in full."""

    number: int
    state: str
    value: float
    params: dict[str, Any]
    curves: dict[str, list[float]]  # raw, by epoch; of a trial that was not ours: none
    receipt: dict[str, Any]
    attempt: int  # 0 for a trial that was not ours


@dataclass(kw_only=True)
class Cursor:
    """How far `finished` has told: every trial up to `low`, and those in `seen` beyond it.

    Not a time: clocks differ between workers, and a trial may end long after those that were started later.
    """

    low: int = 0
    seen: set[int] = field(default_factory=set)


# --- one study at one moment ------------------------------------------------------------------------------------


def summarize(study: Study, previous: Summary | None = None, *, clock: Callable[[], float] = time.time) -> Summary:
    """Read a study's summary; StudyError if it was deleted meanwhile.

    Args:
        previous: an earlier summary; what only finished trials decide is taken from it while none has finished since.
    """
    with study.storage.engine.connect() as connection:
        row = _study_row(connection, study)
        states = _states(connection, study)
        open_trials = _open_trials(connection, study)
        live = [trial for trial in open_trials if trial.live]
        parked = [trial for trial in open_trials if trial.ours and not trial.live]
        curves = _judged_curves(connection, [trial.trial_id for trial in live])
        counts = {
            "complete": states[TrialState.COMPLETE].count,
            "pruned": states[TrialState.PRUNED].count,
            "fail": states[TrialState.FAIL].count,
            "running": len(live),
            "parked": len(parked),
            "foreign": len(open_trials) - len(live) - len(parked),
            "waiting": states[TrialState.WAITING].count,
        }
        if previous and all(previous.counts[state] == counts[state] for state in ("complete", "pruned", "fail")):
            best_one, failures, pace = previous.best, previous.failures, previous.seconds_per_trial
        else:
            best_one, failures = _best(connection, study), _failures(connection, study)
            pace = _pace(_spans(connection, study))
    budget = row.trials + row.imported
    return Summary(
        name=study.name,
        direction=str(study.spec.direction),
        sampler=str(study.spec.sampler.get("name")),
        pruner=str(study.spec.pruner.get("name")),
        counts=counts,
        budget=budget,
        spent=sum(counts.values()) - counts["waiting"],
        best=best_one,
        stop_reason=row.stop_reason,
        running=[
            RunningTrial(
                number=trial.number,
                epochs=max(curves[trial.trial_id], default=0),
                worker=trial.worker,
                attempt=trial.attempt,
                curve=[value for _, value in sorted(curves[trial.trial_id].items())],
                seconds=max(0.0, clock() - _timestamp(trial.started)),
            )
            for trial in live
        ],
        parked=[ParkedTrial(number=trial.number, epoch=trial.checkpoint_epoch or 0) for trial in parked],
        failures=failures,
        seconds=_elapsed(states.values(), clock() if live else None),
        seconds_per_trial=pace,
        seconds_left=_seconds_left(counts, budget, pace, stopped=row.stop_reason is not None),
    )


def statuses(place: Storage) -> list[Summary]:
    """Read the summary of every study of ours in a storage, in the order they were made."""
    return [summarize(studies_of_hpo.join(place, name)) for name in studies_of_hpo.names(place)]


def _study_row(connection: sa.Connection, study: Study) -> Any:
    """Return our row of the study as it is now: the budget may have grown since it was opened."""
    row = connection.execute(
        sa.select(hpo_studies.c.trials, hpo_studies.c.imported, hpo_studies.c.stop_reason)
        .join(study_user_attributes, study_user_attributes.c.study_id == hpo_studies.c.study_id)
        .where(
            hpo_studies.c.uid == study.uid,
            study_user_attributes.c.key == UID_KEY,
            study_user_attributes.c.value_json == json.dumps(study.uid),
        )
    ).one_or_none()
    if row is None:
        raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
    return row


@dataclass(frozen=True, kw_only=True)
class _State:
    count: int = 0
    first_start: datetime | None = None
    last_end: datetime | None = None


def _states(connection: sa.Connection, study: Study) -> dict[TrialState, _State]:
    rows = connection.execute(
        sa.select(
            trials.c.state,
            sa.func.count(),
            sa.func.min(trials.c.datetime_start),
            sa.func.max(trials.c.datetime_complete),
        )
        .where(trials.c.study_id == study.study_id)
        .group_by(trials.c.state)
    )
    found = {row[0]: _State(count=row[1], first_start=row[2], last_end=row[3]) for row in rows}
    return {state: found.get(state, _State()) for state in TrialState}


def _elapsed(states: Iterable[_State], until: float | None) -> float:
    found = list(states)
    starts = [state.first_start for state in found if state.first_start]
    ends = [_timestamp(state.last_end) for state in found if state.last_end]
    if not starts:
        return 0.0
    started = _timestamp(min(starts))
    return max(0.0, (until if until is not None else max(ends, default=started)) - started)


@dataclass(frozen=True, kw_only=True)
class _OpenTrial:
    trial_id: int
    number: int
    started: datetime | None
    ours: bool
    live: bool
    worker: str
    attempt: int
    checkpoint_epoch: int | None


def _open_trials(connection: sa.Connection, study: Study) -> list[_OpenTrial]:
    """Return every RUNNING trial, with what our ledger says of it, if anything."""
    now = storage.now(connection)
    rows = connection.execute(
        sa.select(
            trials.c.trial_id,
            trials.c.number,
            trials.c.datetime_start,
            hpo_trials.c.worker,
            hpo_trials.c.attempt,
            hpo_trials.c.checkpoint_epoch,
            sa.and_(hpo_trials.c.lease_until.is_not(None), hpo_trials.c.lease_until >= now).label("live"),
        )
        .outerjoin(
            hpo_trials,
            sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid),
        )
        .where(trials.c.study_id == study.study_id, trials.c.state == TrialState.RUNNING)
        .order_by(trials.c.number)
    )
    return [
        _OpenTrial(
            trial_id=row.trial_id,
            number=row.number,
            started=row.datetime_start,
            ours=row.attempt is not None,
            live=bool(row.live),
            worker=row.worker or "",
            attempt=row.attempt or 0,
            checkpoint_epoch=row.checkpoint_epoch,
        )
        for row in rows
    ]


def _judged_curves(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return {trial id: {step: value}} of what Optuna was told."""
    curves: dict[int, dict[int, float]] = {trial_id: {} for trial_id in ids}
    special = {
        INTERMEDIATE_TYPE.NAN: math.nan,
        INTERMEDIATE_TYPE.INF_POS: math.inf,
        INTERMEDIATE_TYPE.INF_NEG: -math.inf,
    }
    for chunk in _chunks(ids):
        for row in connection.execute(
            sa.select(
                intermediate_values.c.trial_id,
                intermediate_values.c.step,
                intermediate_values.c.intermediate_value,
                intermediate_values.c.intermediate_value_type,
            ).where(intermediate_values.c.trial_id.in_(chunk))
        ):
            value = special.get(row.intermediate_value_type, row.intermediate_value)
            curves[row.trial_id][row.step] = value
    return curves


def _best(connection: sa.Connection, study: Study) -> Best | None:
    rows = _ranked(connection, study, 1)
    return Best(number=rows[0].number, value=_external(rows[0])) if rows else None


def _failures(connection: sa.Connection, study: Study) -> list[Failure]:
    """Return how trials ended otherwise than complete or pruned, the most frequent kind first."""
    outcome = sa.func.coalesce(hpo_trials.c.outcome, "foreign")  # FAIL without a word from us: somebody else's trial
    unusual = connection.execute(
        sa.select(
            outcome.label("outcome"), sa.func.count().label("times"), sa.func.max(trials.c.trial_id).label("last")
        )
        .outerjoin(
            hpo_trials,
            sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid),
        )
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state.in_((TrialState.PRUNED, TrialState.FAIL)),
            sa.or_(trials.c.state == TrialState.FAIL, hpo_trials.c.outcome.not_in(ORDINARY)),
        )
        .group_by(outcome)
    ).all()
    reasons: dict[int, str | None] = {}
    if unusual:
        reasons = dict(
            connection.execute(
                sa.select(hpo_trials.c.trial_id, hpo_trials.c.reason).where(
                    hpo_trials.c.study_uid == study.uid, hpo_trials.c.trial_id.in_([row.last for row in unusual])
                )
            ).all()
        )
    found = [Failure(outcome=row.outcome, count=row.times, reason=_last_line(reasons.get(row.last))) for row in unusual]
    return sorted(found, key=lambda failure: (-failure.count, failure.outcome))


def _last_line(reason: str | None) -> str:
    lines = (reason or "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _spans(connection: sa.Connection, study: Study) -> list[tuple[float, float]]:
    """Return (start, end) of the last finished trials; not of those taken up twice, which hold a pause."""
    rows = connection.execute(
        sa.select(trials.c.datetime_start, trials.c.datetime_complete)
        .outerjoin(
            hpo_trials,
            sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid),
        )
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state.in_(FINISHED),
            trials.c.datetime_start.is_not(None),
            trials.c.datetime_complete.is_not(None),
            sa.func.coalesce(hpo_trials.c.attempt, 1) == 1,
        )
        .order_by(trials.c.trial_id.desc())
        .limit(WINDOW)
    )
    return [(_timestamp(start), _timestamp(end)) for start, end in rows]


def _pace(spans: Sequence[tuple[float, float]]) -> float | None:
    """Return the seconds per finished trial over the time in which at least one of them ran; None for fewer than two.

    Hours when nobody worked do not count, and trials side by side make it shorter.
    """
    if len(spans) < 2:
        return None
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / len(spans)


def _seconds_left(counts: Mapping[str, int], budget: int, pace: float | None, *, stopped: bool) -> float | None:
    """Return how long the trials ahead take at this pace; a running one counts as half done."""
    if pace is None:
        return None
    ahead = counts["running"] + counts["parked"]
    if not stopped:
        ahead = max(ahead, budget - counts["complete"] - counts["pruned"] - counts["fail"] - counts["foreign"])
    return max(0.0, ahead - counts["running"] / 2) * pace


# --- trials that newly finished ---------------------------------------------------------------------------------


def finished(study: Study, cursor: Cursor) -> list[FinishedTrial]:
    """Return the trials that finished since the cursor's last use, by their end, and move the cursor past them."""
    with study.storage.engine.connect() as connection:
        beyond = sa.and_(trials.c.study_id == study.study_id, trials.c.trial_id > cursor.low)
        # First how far all is finished, then what is: a trial that ends in between is told now or next time.
        first_open, last = connection.execute(
            sa.select(
                sa.func.min(sa.case((trials.c.state.not_in(FINISHED), trials.c.trial_id))),
                sa.func.max(trials.c.trial_id),
            ).where(beyond)
        ).one()
        if last is None:
            return []
        rows = connection.execute(
            sa.select(
                trials.c.trial_id,
                trials.c.number,
                trials.c.state,
                trials.c.datetime_start,
                trials.c.datetime_complete,
            ).where(beyond, trials.c.state.in_(FINISHED))
        ).all()
        new = [row for row in rows if row.trial_id not in cursor.seen]
        found = _finished_trials(connection, study, new)
    cursor.low = last if first_open is None else first_open - 1
    cursor.seen = {row.trial_id for row in rows if row.trial_id > cursor.low}
    return found


def _finished_trials(connection: sa.Connection, study: Study, rows: Sequence[Any]) -> list[FinishedTrial]:
    ids = [row.trial_id for row in rows]
    values: dict[int, float] = {}
    outcomes: dict[int, str | None] = {}
    epochs: dict[int, int] = {}
    for chunk in _chunks(ids):
        for row in connection.execute(
            sa.select(trial_values).where(trial_values.c.trial_id.in_(chunk), trial_values.c.objective == 0)
        ):
            values[row.trial_id] = _external(row)
        outcomes |= dict(
            connection.execute(
                sa.select(hpo_trials.c.trial_id, hpo_trials.c.outcome).where(
                    hpo_trials.c.study_uid == study.uid, hpo_trials.c.trial_id.in_(chunk)
                )
            ).all()
        )
        epochs |= dict(
            connection.execute(
                sa.select(intermediate_values.c.trial_id, sa.func.max(intermediate_values.c.step))
                .where(intermediate_values.c.trial_id.in_(chunk))
                .group_by(intermediate_values.c.trial_id)
            ).all()
        )
    params = _params(connection, study, ids)
    return [
        FinishedTrial(
            number=row.number,
            state=row.state.name.lower(),
            value=values.get(row.trial_id),
            outcome=outcomes.get(row.trial_id) or row.state.name.lower(),
            epochs=epochs.get(row.trial_id, 0),
            seconds=max(0.0, _timestamp(row.datetime_complete) - _timestamp(row.datetime_start)),
            params=params[row.trial_id],
        )
        for row in sorted(rows, key=lambda row: (_timestamp(row.datetime_complete), row.number))
    ]


# --- the best ones in full --------------------------------------------------------------------------------------


def best(study: Study, k: int = 1, number: int | None = None) -> list[TrialResult]:
    """Return the `k` best COMPLETE trials, best first, ties to the lower number; or the one asked for by number.

    Raises StudyError if no trial is COMPLETE, or if that number is neither COMPLETE nor PRUNED with a value.
    """
    with study.storage.engine.connect() as connection:
        rows = _ranked(connection, study, k) if number is None else [_numbered(connection, study, number)]
        if not rows:
            raise StudyError(
                f"study {study.name!r} has no finished trial yet ({_told(_states(connection, study))}); "
                f"let `hpo run` finish one, `hpo status {study.name}` shows how far it is"
            )
        ids = [row.trial_id for row in rows]
        params, curves = _params(connection, study, ids), _raw_curves(connection, study, ids)
        own = {
            row.trial_id: row
            for chunk in _chunks(ids)
            for row in connection.execute(
                sa.select(hpo_trials.c.trial_id, hpo_trials.c.attempt, hpo_trials.c.receipt).where(
                    hpo_trials.c.study_uid == study.uid, hpo_trials.c.trial_id.in_(chunk)
                )
            )
        }
    return [
        TrialResult(
            number=row.number,
            state=row.state.name.lower(),
            value=_external(row),
            params=params[row.trial_id],
            curves=curves[row.trial_id],
            receipt=json.loads(own[row.trial_id].receipt or "{}") if row.trial_id in own else {},
            attempt=own[row.trial_id].attempt if row.trial_id in own else 0,
        )
        for row in rows
    ]


_WITH_VALUE = sa.select(
    trials.c.trial_id, trials.c.number, trials.c.state, trial_values.c.value, trial_values.c.value_type
)


def _ranked(connection: sa.Connection, study: Study, k: int) -> Sequence[Any]:
    """Return the `k` best COMPLETE trials with their values; infinite ones (only foreign trials have them) in order."""
    rank = sa.case(
        (trial_values.c.value_type == VALUE_TYPE.INF_NEG, -1),
        (trial_values.c.value_type == VALUE_TYPE.INF_POS, 1),
        else_=0,
    )
    keys = [rank, trial_values.c.value]
    order = [key.desc() for key in keys] if study.spec.direction == "maximize" else [key.asc() for key in keys]
    return connection.execute(
        _WITH_VALUE.join(trial_values, trial_values.c.trial_id == trials.c.trial_id)
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state == TrialState.COMPLETE,
            trial_values.c.objective == 0,
        )
        .order_by(*order, trials.c.number)
        .limit(k)
    ).all()


def _numbered(connection: sa.Connection, study: Study, number: int) -> Any:
    row = connection.execute(
        _WITH_VALUE.outerjoin(
            trial_values,
            sa.and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0),
        ).where(trials.c.study_id == study.study_id, trials.c.number == number)
    ).one_or_none()
    if row is None:
        last = connection.execute(
            sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == study.study_id)
        ).scalar_one()
        known = "it has none yet" if last is None else f"its trials are 0 to {last}"
        raise StudyError(f"study {study.name!r} has no trial {number}; {known}")
    if row.state not in (TrialState.COMPLETE, TrialState.PRUNED) or row.value_type is None:
        raise StudyError(
            f"trial {number} of study {study.name!r} is {row.state.name} and has no result; "
            "name one that is COMPLETE or PRUNED, or leave the number out for the best"
        )
    return row


def _told(states: dict[TrialState, _State]) -> str:
    found = [f"{state.count} {name.name}" for name, state in states.items() if state.count]
    return ", ".join(found) or "no trial at all"


def _raw_curves(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    curves: dict[int, dict[str, list[float]]] = {trial_id: {} for trial_id in ids}
    for chunk in _chunks(ids):
        for row in connection.execute(
            sa.select(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.value)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id.in_(chunk))
            .order_by(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.epoch)
        ):
            value = math.nan if row.value is None else row.value
            curves[row.trial_id].setdefault(row.metric, []).append(value)
    return curves


# --- from columns to values -------------------------------------------------------------------------------------


def _params(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: {parameter: value}} in the order of suggestion, lists and tables as the study file has them."""
    params: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    if not ids:
        return params
    structured = {
        path: {space.encode(option): option for option in parameter.options if isinstance(option, list | dict)}
        for path, parameter in space.parameters(study.spec.tree)
        if isinstance(parameter, space.Choices)
    }
    for chunk in _chunks(ids):
        for row in connection.execute(
            sa.select(
                trial_params.c.trial_id,
                trial_params.c.param_name,
                trial_params.c.param_value,
                trial_params.c.distribution_json,
            )
            .where(trial_params.c.trial_id.in_(chunk))
            .order_by(trial_params.c.param_id)
        ):
            value = _distribution(row.distribution_json).to_external_repr(row.param_value)
            if isinstance(value, str):
                value = structured.get(row.param_name, {}).get(value, value)
            params[row.trial_id][row.param_name] = value
    return params


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _external(row: Any) -> float:
    """Return a trial's value as a float, infinite ones included."""
    if row.value_type == VALUE_TYPE.FINITE:
        return float(row.value)
    return math.inf if row.value_type == VALUE_TYPE.INF_POS else -math.inf


def _timestamp(moment: datetime | None) -> float:
    """Return seconds since 1970 for a time as Optuna stores it, UTC without a zone; a missing one is now."""
    return moment.replace(tzinfo=UTC).timestamp() if moment else time.time()


def _chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
