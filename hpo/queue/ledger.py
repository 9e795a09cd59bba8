"""What the holder of a trial writes: reports, checkpoints, its end. Each is one transaction on Optuna's tables and ours.

A trial of ours is *settled* (finished), *leased* (it has a lease) or *parked* (RUNNING without a lease). The attempt
number is the lease's fencing token, and each claim of a trial raises it. A write with an older number changes nothing,
and returns so or raises LostLease. A trial without a row in our table is foreign: the budget counts it, and no worker
changes it. `claiming.py` claims trials. `reaper.py` takes them from workers that are gone.

Rows are locked in a fixed order. Optuna's row of the study is the first. Our row of a trial is locked before Optuna's
row of that trial. Our row of the study is the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from hpo.errors import LostLease
from hpo.queue import finish, lease_clock, ledger_statements
from hpo.queue.cut_back import cut_back
from hpo.queue.finish import NO_CHECKPOINT, End
from hpo.queue.models import Checkpoint, Claim, Commands, HasClaim, Post, Token
from hpo.queue.report import Report, ReportResult, write_metrics, write_values
from hpo.queue.start import SuggestedParams, TrialReceipt, write_receipts, write_suggested
from hpo.spec.failures import Failure, Kind, Policies, Verdict
from hpo.spec.objectives import KnownCosts
from hpo.storage import sql, trial_writes
from hpo.storage.tables import (
    COST_PREFIX,
    STOPPED,
    Hold,
    hpo_curves,
    hpo_failures,
    hpo_studies,
    hpo_trials,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
)

_HasClaim = TypeVar("_HasClaim", bound=HasClaim)
LEASE_SECONDS = 60.0  # the default where no study gives another
DEFAULT_POLICIES = Policies()  # likewise


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The writes of one worker to one study."""

    engine: sa.Engine
    study_id: int
    uid: str
    worker: str
    lease_seconds: float = LEASE_SECONDS
    grid_points: int | None = None  # the number of points, if the study's sampler is a grid
    policies: Policies = DEFAULT_POLICIES
    post: Post | None = None  # for which an engine has started the worker

    # --- while it runs ----------------------------------------------------------------------------------------------

    def report(self, reports: Sequence[Report], *, metrics: bool = True, renew: bool = True) -> ReportResult:
        """Write epochs of trials in one transaction. For claims that are lost nothing is written.

        Args:
            metrics: also write the raw metrics.
            renew: also renew the leases.
        """
        transaction = sql.writing if metrics or renew else sql.writing_once
        with transaction(self.engine) as connection:
            answer = write_values(connection, self.uid, self.study_id, reports)
            held = {report.claim for report in reports} - set(answer.lost)
            if metrics:
                write_metrics(connection, self.uid, [report for report in reports if report.claim in held])
            if renew and held:
                ids = [claim.trial_id for claim in held]
                of_held = sa.and_(hpo_trials.c.study_uid == self.uid, hpo_trials.c.trial_id.in_(ids))
                connection.execute(hpo_trials.update().where(of_held).values(**self.lease(connection)))
        return answer

    def write_metrics(self, reports: Sequence[Report]) -> set[Claim]:
        """Write the raw metrics of reports whose values are already written, and renew the leases.

        Returns the lost claims, for which nothing is written.
        """
        return self._write_and_renew(reports, lambda connection, held: write_metrics(connection, self.uid, held))

    def _write_and_renew(
        self, told: Sequence[_HasClaim], write: Callable[[sa.Connection, list[_HasClaim]], None]
    ) -> set[Claim]:
        """Renew the leases of the claims that stand, and write what is told of these, in one transaction.

        Returns the lost claims.
        """
        claims = {one.claim for one in told}
        if not claims:
            return set()
        with sql.writing(self.engine) as connection:
            held = self._renew(connection, claims)
            write(connection, [one for one in told if one.claim.token in held])
        return _fallen(claims, held)

    def curve(self, claim: Claim, metric: str) -> list[float]:
        """Return the stored raw values of a metric, in the order of the epochs."""
        with self.engine.connect() as connection:
            rows = connection.execute(
                sa.select(hpo_curves.c.value)
                .where(
                    hpo_curves.c.study_uid == self.uid,
                    hpo_curves.c.trial_id == claim.trial_id,
                    hpo_curves.c.metric == metric,
                )
                .order_by(hpo_curves.c.epoch)
            )
            return [math.nan if value is None else value for (value,) in rows]

    def renew_all(self, claims: Collection[Claim]) -> set[Claim]:
        """Renew leases in one statement. Return the lost claims."""
        if not claims:
            return set()
        with sql.writing_once(self.engine) as connection:
            return _fallen(claims, self._renew(connection, claims))

    def _renew(self, connection: sa.Connection, claims: Collection[Claim]) -> set[Token]:
        """Lock both rows of each trial whose claim stands, and renew its lease. Return the tokens of these claims."""
        parameters = {
            "uid": self.uid,
            "uid_json": json.dumps(self.uid),
            "tokens": [claim.token for claim in claims],
            "of_trials": [claim.trial_id for claim in claims],
            "lease_seconds": self.lease_seconds,
        }
        return set(map(tuple, connection.execute(ledger_statements.renew(connection.dialect.name), parameters)))

    def commands_of(self, claims: Collection[Claim]) -> dict[Claim, Commands]:
        """Read which claims are lost and what people have ordered, in one statement without a lock.

        It need not be read again before `orders` changes.
        """
        if not claims:
            return {}
        parameters = {"uid": self.uid, "of_trials": [claim.trial_id for claim in claims]}
        with sql.reading(self.engine) as connection:
            rows = {row.trial_id: row for row in connection.execute(ledger_statements.commands(), parameters)}
        return {claim: _commands(claim, rows.get(claim.trial_id)) for claim in claims}

    def orders(self) -> int | None:
        """Return the version of the study's orders; None if the study was deleted. It is the cheapest read there is."""
        with sql.reading(self.engine) as connection:
            found: int | None = connection.execute(ledger_statements.orders(), {"uid": self.uid}).scalar_one_or_none()
            return found

    def _update_and_renew(self, connection: sa.Connection, claim: Claim, **values: Any) -> bool:
        """Set columns of the claim's row and renew its lease.

        Returns False, and writes nothing, if the claim is lost or Optuna's trial is not RUNNING.
        """
        new = {f"new_{name}": value for name, value in values.items()}
        parameters = {**self._whose(claim), **new, "lease_seconds": self.lease_seconds}
        updated = connection.execute(ledger_statements.update(connection.dialect.name, tuple(values)), parameters)
        return bool(updated.rowcount == 1)

    def _whose(self, claim: Claim) -> dict[str, Any]:
        """Return the parameters of `ledger_statements.of_claim`."""
        return {
            "uid": self.uid,
            "uid_json": json.dumps(self.uid),
            "of_trial": claim.trial_id,
            "of_attempt": claim.attempt,
        }

    def lease(self, connection: sa.Connection) -> dict[str, Any]:
        """Return the columns of a lease that starts now."""
        return lease_clock.lease(connection.dialect.name, self.lease_seconds)

    def record_checkpoint(self, claim: Claim, checkpoint: Checkpoint) -> None:
        """Record a checkpoint file with the trial's present system attributes. Raises LostLease if the claim is lost.

        A checkpoint of an earlier epoch than the recorded one is ignored, because its file is already deleted.
        """
        with sql.writing(self.engine) as connection:
            self._update_or_raise(connection, claim)
            rows = connection.execute(
                sa.select(trial_system_attributes.c.key, trial_system_attributes.c.value_json).where(
                    trial_system_attributes.c.trial_id == claim.trial_id
                )
            )
            recorded = hpo_trials.c.checkpoint_epoch
            connection.execute(
                hpo_trials.update()
                .where(ledger_statements.of_claim(), sa.or_(recorded.is_(None), recorded <= checkpoint.epoch))
                .values(
                    checkpoint_epoch=checkpoint.epoch,
                    checkpoint_path=checkpoint.path,
                    checkpoint_digest=checkpoint.digest,
                    checkpoint_attributes=json.dumps({row.key: row.value_json for row in rows}),
                ),
                self._whose(claim),
            )

    def record_receipts(self, made: Sequence[TrialReceipt]) -> set[Claim]:
        """Record the receipts of trials. Return the lost claims, for which nothing is written."""
        return self._write_and_renew(made, lambda connection, held: write_receipts(connection, self.uid, held))

    def _update_or_raise(self, connection: sa.Connection, claim: Claim, **values: Any) -> None:
        if not self._update_and_renew(connection, claim, **values):
            raise LostLease(f"trial {claim.number}: another process has claimed or ended it")

    def write_suggested(self, given: Sequence[SuggestedParams]) -> set[Claim]:
        """Write suggested parameters. Return the lost claims, for which nothing is written."""
        return self._write_and_renew(given, write_suggested)

    def record_costs(self, claim: Claim, costs: Mapping[str, float], known: KnownCosts) -> None:
        """Record a trial's costs as user attributes, and the part of its end that follows from them.

        Raises LostLease if the claim is lost.
        """
        attributes = trial_writes.attribute_rows({f"{COST_PREFIX}{name}": cost for name, cost in costs.items()})
        with sql.writing(self.engine) as connection:
            self._update_or_raise(connection, claim, costs=known.to_json())
            rows = [{"trial_id": claim.trial_id, **attribute} for attribute in attributes]
            if rows:
                sql.upsert(connection, trial_user_attributes, *rows, key=["trial_id", "key"])

    def start_over(self, claim: Claim) -> None:
        """Forget a checkpoint that cannot be read, and the curve with it. Raises LostLease if the claim is lost."""
        with sql.writing(self.engine) as connection:
            self._update_or_raise(connection, claim, **NO_CHECKPOINT)
            cut_back(connection, [self._row(connection, claim)])

    # --- its end ----------------------------------------------------------------------------------------------------

    def park(self, claim: Claim, *, stack_key: str | None = None) -> None:
        """Give the lease back. The trial stays RUNNING, and a later claim continues it.

        Args:
            stack_key: the kind of stack that it trains in; None leaves the recorded one.
        """
        with sql.writing(self.engine) as connection:
            row = self._lock(connection, claim)
            if row is not None:
                finish.release(connection, row, stack_key=stack_key)

    def hand_back(self, claim: Claim, given: Collection[str]) -> None:
        """Undo a claim as if the trial had never begun. The trial is queued again and does not count for the budget.

        A trial with an earlier attempt is parked instead. Nothing happens if the claim is lost.

        Args:
            given: the names of the parameters that this attempt was given. They are deleted.
        """
        with sql.writing(self.engine) as connection:
            row = self._lock(connection, claim)
            if row is None:
                return
            of_trial = trial_params.c.trial_id == claim.trial_id
            connection.execute(trial_params.delete().where(of_trial, trial_params.c.param_name.in_(given)))
            if claim.attempt > 1 or row.stop_requested:
                finish.release(connection, row)
                return
            cut_back(connection, [row])
            finish.queue_again(connection, row)

    def finish_all(self, ends: Sequence[End]) -> set[Claim]:
        """Settle trials that did not fail, in one transaction. Return the lost claims, for which nothing is written.

        The call is idempotent. A second one, after a commit whose answer was lost, changes nothing and returns the
        same.
        """
        if not ends:
            return set()
        with sql.writing(self.engine) as connection:
            closed = self._close(connection, ends)
            if closed:
                finish.succeed(connection, self.uid, [end for end in ends if end.claim.token in closed])
            others = [end for end in ends if end.claim.token not in closed]
            rows = self._rows(connection, [end.claim for end in others])
            return {end.claim for end in others if not self._has_ended(rows, end.claim, end.outcome)}

    def _close(self, connection: sa.Connection, ends: Sequence[End]) -> set[Token]:
        """Lock both rows of each trial and close ours, where the claim stands and Optuna's trial is RUNNING.

        Returns the tokens of these claims.
        """
        told = [
            {
                "trial_id": end.claim.trial_id,
                "attempt": end.claim.attempt,
                "outcome": end.outcome,
                "reason": end.reason and sql.storable(end.reason),
            }
            for end in ends
        ]
        parameters = {"uid": self.uid, "uid_json": json.dumps(self.uid), **sql.numbered(told)}
        statement = ledger_statements.close(connection.dialect.name, len(told))
        return set(map(tuple, connection.execute(statement, parameters)))

    def fail(self, claim: Claim, failure: Failure, *, accumulation: int | None = None) -> Verdict:
        """Record a failed attempt, then park or settle the trial as the study's policy says. Return which.

        Raises LostLease if the claim is lost. The call is idempotent. A second one, after a commit whose answer was
        lost, changes nothing and returns the same.
        """
        with sql.writing(self.engine) as connection:
            row = self._lock(connection, claim)
            if row is not None:
                return finish.fail(connection, row, failure, self.policies, accumulation=accumulation)
            verdict = self._verdict(connection, claim, failure.kind)
            if verdict is None:
                raise LostLease(f"trial {claim.number}: another process has claimed or ended it")
            return verdict

    def end_as_stopped(self, claim: Claim) -> None:
        """Settle a trial that a person ended. Raises LostLease if the claim is lost."""
        with sql.writing(self.engine) as connection:
            row = self._lock(connection, claim)
            done = row is not None and finish.end_as_stopped(connection, row)
            if not done and not self._has_ended(self._rows(connection, [claim]), claim, STOPPED):
                raise LostLease(f"trial {claim.number}: another process has claimed or ended it")

    def drop(self, claim: Claim, message: str) -> None:
        """Record that this worker's claim is lost. Close our row if another program has ended the trial.

        A trial that a person has ended is no failure.
        """
        with sql.writing(self.engine) as connection:
            row = self._row(connection, claim)
            if row is not None and row.attempt == claim.attempt:
                if row.outcome == STOPPED:
                    return
                finish.close_if_ended_elsewhere(connection, row)
            if row is not None:
                failure = Failure(kind=Kind.LEASE_LOST, message=message)
                mine = {"trial_id": claim.trial_id, "attempt": claim.attempt, "worker": self.worker}
                finish.record(connection, failure, Verdict.DROP, study_uid=self.uid, **mine)

    def _lock(self, connection: sa.Connection, claim: Claim) -> Any:
        """Lock and return the claim's row; None if the claim is lost."""
        return connection.execute(ledger_statements.lock(), self._whose(claim)).one_or_none()

    def _has_ended(self, rows: Mapping[int, Any], claim: Claim, outcome: str) -> bool:
        """Return whether our rows of trials show that this claim has already ended with this outcome."""
        row = rows.get(claim.trial_id)
        if row is None or row.attempt != claim.attempt or row.worker != self.worker:
            return False
        return bool(row.settled and row.outcome == outcome)

    def _verdict(self, connection: sa.Connection, claim: Claim, kind: Kind) -> Verdict | None:
        """Return the recorded verdict on this claim's failure of this kind; None if there is none."""
        found = connection.execute(
            sa.select(hpo_failures.c.verdict).where(
                hpo_failures.c.study_uid == self.uid,
                hpo_failures.c.trial_id == claim.trial_id,
                hpo_failures.c.attempt == claim.attempt,
                hpo_failures.c.kind == kind,
                hpo_failures.c.worker == self.worker,
            )
        ).scalar_one_or_none()
        return None if found is None else Verdict(found)

    def _row(self, connection: sa.Connection, claim: Claim) -> Any:
        return self._rows(connection, [claim]).get(claim.trial_id)

    def _rows(self, connection: sa.Connection, claims: Sequence[Claim]) -> dict[int, Any]:
        """Return our rows of the claims' trials by the trial's id. A trial without a row is left out."""
        if not claims:
            return {}
        of_trials = hpo_trials.c.trial_id.in_([claim.trial_id for claim in claims])
        rows = connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == self.uid, of_trials))
        return {row.trial_id: row for row in rows}

    # --- the study --------------------------------------------------------------------------------------------------

    def code_has_changed(self) -> bool:
        """Return whether the study has accepted other code than its first."""
        with sql.reading(self.engine) as connection:
            of_study = sa.select(hpo_studies.c.code_changes).where(hpo_studies.c.uid == self.uid)
            return bool(json.loads(connection.execute(of_study).scalar() or "[]"))

    def stop(self, reason: str) -> None:
        """Start no new trials in this study from now on. Leased and parked trials are still finished."""
        with sql.writing(self.engine) as connection:
            finish.write_stop(connection, self.uid, reason)


def _fallen(claims: Iterable[Claim], held: Container[Token]) -> set[Claim]:
    return {claim for claim in claims if claim.token not in held}


def _commands(claim: Claim, row: Any) -> Commands:
    if row is None or row.attempt != claim.attempt or row.settled or row.lease_until is None:
        return Commands(lost=True, stop=False, park=False)
    park = row.hold in (Hold.PAUSED, Hold.SPENT)
    return Commands(lost=False, stop=row.stop_requested, park=park, orders=row.orders)
