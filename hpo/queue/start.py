"""The start of trials: their suggested parameters and their receipts, written for many trials in one transaction.

The caller has locked both rows of each trial. It has seen that the claims stand and that Optuna's trials are RUNNING.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.queue.models import Claim
from hpo.storage import sql
from hpo.storage.tables import hpo_trials, trial_params, trial_system_attributes


@dataclass(frozen=True, kw_only=True)
class SuggestedParams:
    """What a sampler suggested for a trial, as rows of Optuna's tables without the trial's id."""

    claim: Claim
    params: Sequence[Mapping[str, Any]]
    attributes: Sequence[
        Mapping[str, Any]
    ]  # system attributes that the sampler writes for the samplers of other trials


@dataclass(frozen=True, kw_only=True)
class TrialReceipt:
    """A trial's receipt: what its result is made from."""

    claim: Claim
    receipt: Mapping[str, Any]
    stack_key: str | None = None  # the kind of stack that it trains in; None if not known yet


def write_suggested(connection: sa.Connection, given: Sequence[SuggestedParams]) -> None:
    """Write the parameters and attributes that samplers suggested."""
    params = [{"trial_id": one.claim.trial_id, **row} for one in given for row in one.params]
    attributes = [{"trial_id": one.claim.trial_id, **row} for one in given for row in one.attributes]
    if params:
        sql.upsert(connection, trial_params, *params, key=["trial_id", "param_name"])
    if attributes:
        sql.upsert(connection, trial_system_attributes, *attributes, key=["trial_id", "key"])


def write_receipts(connection: sa.Connection, uid: str, made: Sequence[TrialReceipt]) -> None:
    """Write the receipts and stack keys of trials. An unknown stack key leaves the recorded one."""
    rows = [
        {
            "of_study": uid,
            "of_trial": one.claim.trial_id,
            "new_receipt": json.dumps(one.receipt),
            "new_stack_key": one.stack_key,
        }
        for one in made
    ]
    if rows:
        connection.execute(_receipts_statement(), rows)


@cache
def _receipts_statement() -> sa.Update:
    stack_key = sa.bindparam("new_stack_key", type_=hpo_trials.c.stack_key.type)
    return (
        hpo_trials.update()
        .where(hpo_trials.c.study_uid == sa.bindparam("of_study"), hpo_trials.c.trial_id == sa.bindparam("of_trial"))
        .values(
            receipt=sa.bindparam("new_receipt", type_=hpo_trials.c.receipt.type),
            stack_key=sa.func.coalesce(stack_key, hpo_trials.c.stack_key),
        )
    )
