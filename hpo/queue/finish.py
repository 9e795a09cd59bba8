"""The end of an attempt, in the transaction of the one that ends it: the trial's holder, a reaper or a person.

The caller has locked our row of the trial. Only `Ledger.drop` does not, because it records what it found. A trial that
has already ended, by us or by another program, is left unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue.lease_clock import NO_LEASE
from hpo.queue.models import Claim
from hpo.spec.failures import Failure, Kind, MemoryPolicy, Policies, Verdict
from hpo.spec.objectives import NOTHING, Beside, KnownCosts
from hpo.storage import sql, trial_writes
from hpo.storage.tables import (
    CONSTRAINTS,
    DIVERGED_KEY,
    INTERMEDIATE_TYPE,
    STOPPED,
    VALUE_TYPE,
    Hold,
    hpo_failures,
    hpo_studies,
    hpo_trials,
    intermediate_values,
    study_directions,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)

NO_CHECKPOINT = {
    "checkpoint_epoch": None,
    "checkpoint_path": None,
    "checkpoint_digest": None,
    "checkpoint_attributes": None,
}
BY_HAND = "by `hpo stop`"
IN_DASHBOARD = "ended by a person, in the dashboard"
ELSEWHERE = "ended elsewhere"  # the outcome of a trial that another program ended
STATES = {Verdict.PRUNE: TrialState.PRUNED, Verdict.FAIL: TrialState.FAIL}


@dataclass(frozen=True, kw_only=True)
class End:
    """How a trial that did not fail ends."""

    claim: Claim
    state: TrialState
    value: float | None  # of the first objective; None if there is no finite one
    outcome: str  # one word
    reason: str | None = None  # one line
    beside: Beside = NOTHING


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What an end writes into Optuna's tables."""

    state: TrialState
    value: float | None
    beside: Beside


def _is_open(connection: sa.Connection, row: Any) -> bool:
    """Lock Optuna's row of the trial. Return whether the trial is RUNNING there and not settled in our row."""
    state = connection.execute(
        sa.select(trials.c.state).where(trials.c.trial_id == row.trial_id).with_for_update()
    ).scalar_one_or_none()
    return bool(state == TrialState.RUNNING) and not row.settled


def _settle(
    connection: sa.Connection, row: Any, state: TrialState, value: float | None, *, outcome: str, reason: str | None
) -> bool:
    """Write the end of a trial. Return False if it had already ended."""
    if row.settled or not _end(connection, {row.trial_id: _result(connection, row, state, value)}):
        return False
    close(connection, row, outcome=outcome, reason=reason)
    return True


def _result(connection: sa.Connection, row: Any, state: TrialState, value: float | None) -> _Result:
    """Return what Optuna's tables get if all that the writer knows of the trial is our row.

    With several objectives all values are written or none. If only the first is known, the trial ends without a value.
    """
    if row.costs is not None:
        return _Result(state=state, value=value, beside=KnownCosts.from_json(row.costs).beside(value))
    if value is not None and _objectives(connection, row.trial_id) > 1:
        value = None
    return _Result(state=state, value=value, beside=NOTHING)


def _objectives(connection: sa.Connection, trial_id: int) -> int:
    of_study = sa.select(trials.c.study_id).where(trials.c.trial_id == trial_id).scalar_subquery()
    counted = sa.select(sa.func.count()).where(study_directions.c.study_id == of_study)
    return int(connection.execute(counted).scalar_one())


def close(connection: sa.Connection, row: Any, *, outcome: str, reason: str | None) -> None:
    """Close our row of a trial. It cannot be claimed again."""
    reason = reason and sql.storable(reason)
    whose = {"of_study": row.study_uid, "of_trial": row.trial_id}
    connection.execute(_CLOSE, {**whose, "new_outcome": outcome, "new_reason": reason})


_CLOSE = (
    hpo_trials.update()
    .where(hpo_trials.c.study_uid == sa.bindparam("of_study"), hpo_trials.c.trial_id == sa.bindparam("of_trial"))
    .values(settled=True, **NO_LEASE, outcome=sa.bindparam("new_outcome"), reason=sa.bindparam("new_reason"))
)
_END_OF_STREAK = (
    hpo_studies.update().where(hpo_studies.c.uid == sa.bindparam("of_study"), hpo_studies.c.streak > 0).values(streak=0)
)


def close_if_ended_elsewhere(connection: sa.Connection, row: Any) -> None:
    """Close our row of a trial that another program has ended, for example the dashboard."""
    state = connection.execute(sa.select(trials.c.state).where(trials.c.trial_id == row.trial_id)).scalar_one_or_none()
    if not row.settled and state is not None and state.is_finished():
        close(connection, row, outcome=ELSEWHERE, reason=None)


def release(connection: sa.Connection, row: Any, *, stack_key: str | None = None) -> None:
    """Park a trial. If a person has stopped it meanwhile, end it instead.

    Args:
        stack_key: the kind of stack that it trains in; None leaves the recorded one.
    """
    known = {} if stack_key is None else {"stack_key": stack_key}
    if row.stop_requested:
        end_as_stopped(connection, row)
    else:
        connection.execute(hpo_trials.update().where(_of(row)).values(**NO_LEASE, **known))


def queue_again(connection: sa.Connection, row: Any) -> None:
    """Put a trial back into the queue as if it had never begun."""
    connection.execute(
        trials.update()
        .where(trials.c.trial_id == row.trial_id, trials.c.state == TrialState.RUNNING)
        .values(state=TrialState.WAITING, datetime_start=None)
    )
    connection.execute(hpo_trials.delete().where(_of(row)))


def succeed(connection: sa.Connection, study_uid: str, ends: Sequence[End]) -> None:
    """Write the ends of trials that did not fail, and end the study's streak of failures.

    The caller has also locked Optuna's rows of the trials and has seen them RUNNING.
    """
    _end(
        connection,
        {end.claim.trial_id: _Result(state=end.state, value=end.value, beside=end.beside) for end in ends},
    )
    connection.execute(_END_OF_STREAK, {"of_study": study_uid})


def _end(connection: sa.Connection, ends: Mapping[int, _Result]) -> set[int]:
    """Write ends into Optuna's tables. Return the ids of the trials that were RUNNING.

    Args:
        ends: by the trial's id.
    """
    ended: set[int] = set()
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        ids = sorted(trial_id for trial_id, end in ends.items() if end.state == state)
        if ids:
            ended |= trial_writes.set_states(connection, ids, state, once=(TrialState.RUNNING,))
    written = {trial_id: end for trial_id, end in ends.items() if trial_id in ended}
    rows = [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": VALUE_TYPE.FINITE}
        for trial_id, end in written.items()
        if end.value is not None
        for objective, value in enumerate((end.value, *end.beside.values))
    ]
    if rows:
        sql.upsert(connection, trial_values, *rows, key=["trial_id", "objective"])
    said = [
        {"trial_id": trial_id, **attribute}
        for trial_id, end in written.items()
        for attribute in trial_writes.attribute_rows(
            {f"{CONSTRAINTS}:{name}": violation for name, violation in end.beside.constraints.items()}
        )
    ]
    if said:
        sql.upsert(connection, trial_system_attributes, *said, key=["trial_id", "key"])
    return ended


def fail(
    connection: sa.Connection, row: Any, failure: Failure, policies: Policies, *, accumulation: int | None = None
) -> Verdict:
    """Record a failed attempt and apply the policy: park the trial for another attempt, or settle it.

    Returns DROP if the trial had already ended. Returns DROP, too, if a person has stopped it: then it ends as stopped.

    Args:
        accumulation: micro-batches per batch for an attempt after memory ran out; None if the batch cannot be halved.
    """
    if not _is_open(connection, row):
        return Verdict.DROP
    policy = policies.of(failure.kind)
    if row.stop_requested:
        verdict = Verdict.DROP
    elif _failed_before(connection, row, failure.kind) < policy.retries:
        verdict = Verdict.RETRY
    else:
        verdict = Verdict.PRUNE if policy.then == "prune" else Verdict.FAIL
    identity = {"study_uid": row.study_uid, "trial_id": row.trial_id, "attempt": row.attempt, "worker": row.worker}
    record(connection, failure, verdict, **identity)
    if verdict is Verdict.DROP:
        end_as_stopped(connection, row)
    elif verdict is Verdict.RETRY:
        halved = isinstance(policy, MemoryPolicy) and policy.halve and accumulation is not None
        # With another accumulation the trial starts at epoch 0: a curve must come from one way of training.
        restart = {"accumulation": accumulation, "stack_key": None, **NO_CHECKPOINT} if halved else {}
        connection.execute(hpo_trials.update().where(_of(row)).values(**NO_LEASE, **restart))
    else:
        value = last_finite(connection, row.trial_id) if verdict is Verdict.PRUNE else None
        if failure.kind is Kind.DIVERGED and verdict is Verdict.PRUNE:
            _mark_as_diverged(connection, row.trial_id, failure.message)
        _settle(connection, row, STATES[verdict], value, outcome=failure.kind, reason=failure.message)
        _count(connection, row.study_uid, failure, policies.in_a_row)
    return verdict


def _mark_as_diverged(connection: sa.Connection, trial_id: int, why: str) -> None:
    """Note at Optuna's trial that it diverged, for samplers: its values are those from before, and may be good."""
    told = {"trial_id": trial_id, **trial_writes.attribute_rows({DIVERGED_KEY: sql.storable(why)})[0]}
    sql.upsert(connection, trial_user_attributes, told, key=["trial_id", "key"])


def record(connection: sa.Connection, failure: Failure, verdict: Verdict, **identity: Any) -> None:
    """Record a failure, once per attempt and kind.

    Args:
        identity: study_uid, trial_id, attempt and worker of the attempt that failed.
    """
    found = {
        **identity,
        "kind": failure.kind,
        "verdict": verdict,
        "message": sql.storable(failure.message),
        "traceback": failure.traceback and sql.storable(failure.traceback),
    }
    moment = {"failed_at": sql.now(connection)}
    sql.upsert(connection, hpo_failures, found, key=["study_uid", "trial_id", "attempt", "kind"], computed=moment)


def end_as_stopped(connection: sa.Connection, row: Any) -> bool:
    """Settle a trial that a person ended: PRUNED with its last finite value, or FAIL if it has none.

    Returns False if it had already ended.
    """
    value = last_finite(connection, row.trial_id)
    state = TrialState.FAIL if value is None else TrialState.PRUNED
    return _settle(connection, row, state, value, outcome=STOPPED, reason=BY_HAND)


def end_as_failed(connection: sa.Connection, row: Any) -> bool:
    """Settle a trial as FAIL for a person at the dashboard. Return False if the trial was no longer open."""
    return _settle(connection, row, TrialState.FAIL, None, outcome=STOPPED, reason=IN_DASHBOARD)


def last_finite(connection: sa.Connection, trial_id: int) -> float | None:
    """Return the last finite value that was reported to Optuna, or None. A pruned trial ends with it."""
    return connection.execute(
        sa.select(intermediate_values.c.intermediate_value)
        .where(
            intermediate_values.c.trial_id == trial_id,
            intermediate_values.c.intermediate_value_type == INTERMEDIATE_TYPE.FINITE,
        )
        .order_by(intermediate_values.c.step.desc())
        .limit(1)
    ).scalar_one_or_none()


def write_stop(connection: sa.Connection, uid: str, reason: str, *, hold: Hold | None = None) -> None:
    """Start no new trials in this study from now on. The first reason is kept."""
    connection.execute(
        hpo_studies.update()
        .where(hpo_studies.c.uid == uid, hpo_studies.c.stop_reason.is_(None))
        .values(stop_reason=sql.storable(reason), hold=sa.func.coalesce(hpo_studies.c.hold, hold))
    )


def _count(connection: sa.Connection, uid: str, failure: Failure, in_a_row: int) -> None:
    """Count a trial that ended by a failure. Stop the study after too many of one kind in a row."""
    of_study = hpo_studies.c.uid == uid
    longer = sa.case((hpo_studies.c.streak_kind == failure.kind, hpo_studies.c.streak + 1), else_=1)
    connection.execute(hpo_studies.update().where(of_study).values(streak=longer, streak_kind=failure.kind))
    streak = connection.execute(sa.select(hpo_studies.c.streak).where(of_study)).scalar_one()
    if streak >= in_a_row:
        reason = f"{streak} trials in a row ended by {failure.kind}, the last: {failure.message}"
        write_stop(connection, uid, reason, hold=Hold.BROKEN)


def _failed_before(connection: sa.Connection, row: Any, kind: Kind) -> int:
    """Count the failures of a kind in earlier attempts of the trial."""
    earlier = (
        sa.select(sa.func.count())
        .select_from(hpo_failures)
        .where(
            hpo_failures.c.study_uid == row.study_uid,
            hpo_failures.c.trial_id == row.trial_id,
            hpo_failures.c.kind == kind,
            hpo_failures.c.attempt < row.attempt,
        )
    )
    return int(connection.execute(earlier).scalar_one())


def _of(row: Any) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_trials.c.study_uid == row.study_uid, hpo_trials.c.trial_id == row.trial_id)
