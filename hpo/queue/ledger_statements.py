"""The SQL statements of the ledger on our rows of trials, each made once for a dialect.

A claim *stands* while its trial is not settled, taken over or given back, and its study exists. Only rows of standing
claims are changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue import lease_clock
from hpo.queue.rows import locked, stands
from hpo.storage import sql
from hpo.storage.tables import hpo_studies, hpo_trials, trials


@cache
def of_claim() -> sa.ColumnElement[bool]:
    """Return the condition that selects a claim's row while the claim stands.

    The trial is not settled, taken over or given back, and its study still exists.
    """
    return sa.and_(
        hpo_trials.c.study_uid == sa.bindparam("uid"),
        hpo_trials.c.trial_id == sa.bindparam("of_trial"),
        hpo_trials.c.attempt == sa.bindparam("of_attempt"),
        stands(sa.bindparam("uid_json")),
    )


@cache
def _runs() -> sa.ColumnElement[bool]:
    return sa.exists().where(trials.c.trial_id == hpo_trials.c.trial_id, trials.c.state == TrialState.RUNNING)


def _lease(dialect: str) -> dict[str, Any]:
    return lease_clock.lease(dialect, sa.bindparam("lease_seconds", type_=sa.Double))


@cache
def update(dialect: str, names: tuple[str, ...]) -> sa.Update:
    """Set these columns of a claim's row and renew its lease, if the trial still runs."""
    new = {name: sa.bindparam(f"new_{name}", type_=hpo_trials.c[name].type) for name in names}
    return hpo_trials.update().where(of_claim(), _runs()).values(**_lease(dialect), **new)


@cache
def renew(dialect: str) -> Any:
    """Renew the leases of these claims that stand, and return their tokens."""
    tokens: sa.BindParameter[Any] = sa.bindparam("tokens", expanding=True)
    held = locked(
        sa.select(hpo_trials.c.trial_id).where(
            hpo_trials.c.trial_id.in_(sa.bindparam("of_trials", expanding=True)),  # uses the index
            sa.tuple_(hpo_trials.c.trial_id, hpo_trials.c.attempt).in_(tokens),
        )
    )
    renewed = hpo_trials.update().where(_is_held(held)).values(**_lease(dialect))
    return renewed.returning(hpo_trials.c.trial_id, hpo_trials.c.attempt)


def _is_held(held: sa.CTE) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_trials.c.study_uid == sa.bindparam("uid"), hpo_trials.c.trial_id == held.c.trial_id)


@cache
def commands() -> Any:
    """Select what people have ordered for these trials."""
    return (
        sa.select(
            hpo_trials.c.trial_id,
            hpo_trials.c.attempt,
            hpo_trials.c.settled,
            hpo_trials.c.lease_until,
            hpo_trials.c.stop_requested,
            hpo_studies.c.hold,
            hpo_studies.c.orders,
        )
        .join(hpo_studies, hpo_studies.c.uid == hpo_trials.c.study_uid)
        .where(
            hpo_trials.c.study_uid == sa.bindparam("uid"),
            hpo_trials.c.trial_id.in_(sa.bindparam("of_trials", expanding=True)),
        )
    )


@cache
def orders() -> Any:
    """Select the version of a study's orders."""
    return sa.select(hpo_studies.c.orders).where(hpo_studies.c.uid == sa.bindparam("uid"))


_ENDS: dict[str, sa.types.TypeEngine[Any]] = {
    "trial_id": sa.Integer(),
    "attempt": sa.Integer(),
    "outcome": hpo_trials.c.outcome.type,
    "reason": hpo_trials.c.reason.type,
}


@cache
def close(dialect: str, count: int) -> Any:
    """Settle so many trials whose claims stand, and return their tokens."""
    told = sql.told(dialect, _ENDS, count)
    in_file = sa.and_(told.c.trial_id == hpo_trials.c.trial_id, told.c.attempt == hpo_trials.c.attempt)
    held = locked(sa.select(hpo_trials.c.trial_id, told.c.outcome, told.c.reason).join(told, in_file))
    end = {"settled": True, **lease_clock.NO_LEASE, "outcome": held.c.outcome, "reason": held.c.reason}
    return (
        hpo_trials.update().where(_is_held(held)).values(**end).returning(hpo_trials.c.trial_id, hpo_trials.c.attempt)
    )


@cache
def lock() -> sa.Select[Any]:
    """Select a claim's row and lock it."""
    return sa.select(hpo_trials).where(of_claim()).with_for_update()
