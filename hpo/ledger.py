"""The hot writes: claim, report, checkpoint, park, finish. Each is one transaction on Optuna's tables and ours together.

A trial of ours is *settled* (finished), *leased* (a live lease) or *parked* (RUNNING, no live lease). The attempt number
is the lease's fencing token: whoever takes a trial up raises it, and a write with an older one changes nothing and raises
LostLease. Trials without a row in our table are foreign: counted by the budget, never touched.

A row of ours is always locked before the row of Optuna's that it belongs to, and the study's row before either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.dialects import postgresql, sqlite

from hpo import storage
from hpo.errors import LostLease, StudyError
from hpo.tables import (
    UID_KEY,
    VALUE_TYPE,
    hpo_curves,
    hpo_studies,
    hpo_test_openings,
    hpo_trials,
    intermediate_values,
    living_row,
    stored,
    studies,
    study_user_attributes,
    trial_system_attributes,
    trial_values,
    trials,
)

LEASE_SECONDS = 60.0  # renewed three times as often; a worker silent for longer loses its trial
GRID_KEY = "grid_id"  # the system attribute in which Optuna's GridSampler keeps a trial's point
RUNG_KEYS = "completed_rung_%"  # what Optuna's halving pruners leave in a trial's system attributes


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file to go on from: epochs finished when it was written, where it lies, its SHA-256."""

    epoch: int
    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to one trial, for as long as the lease is renewed and nobody takes it over."""

    trial_id: int
    number: int
    attempt: int
    checkpoint: Checkpoint | None = None


class Idle(Enum):
    """Why there is nothing to claim."""

    WAIT = "wait"  # others still run trials of ours; one of them may yet be parked
    DONE = "done"  # the budget is spent or the study stopped, and no trial of ours is RUNNING


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial has to say after an epoch: the value for Optuna at this step, and the raw metrics."""

    claim: Claim
    step: int
    value: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The writes of one worker to one study."""

    engine: sa.Engine
    study_id: int
    uid: str
    worker: str
    lease_seconds: float = LEASE_SECONDS
    grid_points: int | None = None  # how many points there are, if the study's sampler is a grid

    # --- claim ------------------------------------------------------------------------------------------------------

    def claim(self) -> Claim | Idle:
        """Take up a trial: one that is parked, else the oldest queued one, else a new one if the budget allows it.

        Raises StudyError if the study was deleted meanwhile.
        """
        with storage.writing(self.engine) as connection:
            study = self._lock_study(connection)
            if taken := self._take_over(connection):
                return taken
            if study.stop_reason is None and self._spent(connection) < study.trials + study.imported:
                if found := self._queued(connection) or self._new(connection):
                    return self._lease_out(connection, *found)
                if not self._running(connection):
                    self._write_stop(connection, "every point of the grid was tried")
            return Idle.WAIT if self._running(connection) else Idle.DONE

    def _lease_out(self, connection: sa.Connection, trial_id: int, number: int) -> Claim:
        connection.execute(
            hpo_trials.insert().values(
                study_uid=self.uid,
                trial_id=trial_id,
                attempt=1,
                settled=False,
                worker=self.worker,
                lease_until=self._lease(connection),
            )
        )
        return Claim(trial_id=trial_id, number=number, attempt=1)

    def _lock_study(self, connection: sa.Connection) -> Any:
        """Lock the study's row, as Optuna does for a new trial, and return our row; StudyError if it is gone."""
        connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == self.study_id).with_for_update())
        row = living_row(connection, self.study_id)
        if row is None or row.uid != self.uid:
            raise StudyError("the study was deleted while this worker ran; start `hpo run` again to make a new one")
        return row

    def _take_over(self, connection: sa.Connection) -> Claim | None:
        row = connection.execute(
            sa.select(hpo_trials, trials.c.number)
            .join(trials, trials.c.trial_id == hpo_trials.c.trial_id)
            .where(
                hpo_trials.c.study_uid == self.uid,
                hpo_trials.c.settled.is_(False),
                sa.or_(hpo_trials.c.lease_until.is_(None), hpo_trials.c.lease_until < storage.now(connection)),
                trials.c.state == TrialState.RUNNING,
            )
            .order_by(trials.c.number)
            .limit(1)
            # Locked as it is read: its owner may wake up and record another checkpoint. What it holds just now is skipped.
            .with_for_update(of=hpo_trials, skip_locked=True)
        ).one_or_none()
        if row is None:
            return None
        connection.execute(
            hpo_trials.update()
            .where(hpo_trials.c.study_uid == self.uid, hpo_trials.c.trial_id == row.trial_id)
            .values(attempt=row.attempt + 1, worker=self.worker, lease_until=self._lease(connection))
        )
        self._cut_back(connection, row)
        checkpoint = None
        if row.checkpoint_epoch is not None:
            checkpoint = Checkpoint(epoch=row.checkpoint_epoch, path=row.checkpoint_path, digest=row.checkpoint_digest)
        return Claim(trial_id=row.trial_id, number=row.number, attempt=row.attempt + 1, checkpoint=checkpoint)

    def _cut_back(self, connection: sa.Connection, row: Any) -> None:
        """Forget what was reported after the checkpoint, and what the pruner remembers of it."""
        epoch = row.checkpoint_epoch or 0
        connection.execute(
            intermediate_values.delete().where(
                intermediate_values.c.trial_id == row.trial_id, intermediate_values.c.step > epoch
            )
        )
        connection.execute(
            hpo_curves.delete().where(
                hpo_curves.c.study_uid == self.uid,
                hpo_curves.c.trial_id == row.trial_id,
                hpo_curves.c.epoch > epoch,
            )
        )
        of_trial = trial_system_attributes.c.trial_id == row.trial_id
        if row.checkpoint_attributes is None:
            connection.execute(
                trial_system_attributes.delete().where(of_trial, trial_system_attributes.c.key.like(RUNG_KEYS))
            )
            return
        kept: dict[str, str] = json.loads(row.checkpoint_attributes)
        connection.execute(trial_system_attributes.delete().where(of_trial))
        if kept:
            connection.execute(
                trial_system_attributes.insert(),
                [{"trial_id": row.trial_id, "key": key, "value_json": value} for key, value in kept.items()],
            )

    def _spent(self, connection: sa.Connection) -> int:
        rows = sa.select(sa.func.count()).where(
            trials.c.study_id == self.study_id, trials.c.state != TrialState.WAITING
        )
        return int(connection.execute(rows).scalar_one())

    def _running(self, connection: sa.Connection) -> int:
        rows = (
            sa.select(sa.func.count())
            .select_from(hpo_trials.join(trials, trials.c.trial_id == hpo_trials.c.trial_id))
            .where(
                hpo_trials.c.study_uid == self.uid,
                hpo_trials.c.settled.is_(False),
                trials.c.state == TrialState.RUNNING,
            )
        )
        return int(connection.execute(rows).scalar_one())

    def _queued(self, connection: sa.Connection) -> tuple[int, int] | None:
        """Claim the oldest WAITING trial; a plain Optuna process may be after it too, so the state is checked by the write."""
        waiting = connection.execute(
            sa.select(trials.c.trial_id, trials.c.number)
            .where(trials.c.study_id == self.study_id, trials.c.state == TrialState.WAITING)
            .order_by(trials.c.number)
        ).all()
        for trial_id, number in waiting:
            claimed = connection.execute(
                trials.update()
                .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
                .values(state=TrialState.RUNNING, datetime_start=_utc())
            )
            if claimed.rowcount == 1:
                return trial_id, number
        return None

    def _new(self, connection: sa.Connection) -> tuple[int, int] | None:
        """Insert a trial numbered max + 1: safe under the study's lock, since trial rows are never deleted.

        None if the study is a grid of which every point is dealt out.
        """
        if self.grid_points is not None and self._dealt(connection) >= self.grid_points:
            return None
        last = connection.execute(
            sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == self.study_id)
        ).scalar_one()
        number = 0 if last is None else last + 1
        inserted = connection.execute(
            trials.insert().values(
                number=number, study_id=self.study_id, state=TrialState.RUNNING, datetime_start=_utc()
            )
        )
        primary_key = inserted.inserted_primary_key
        assert primary_key is not None
        return primary_key[0], number

    def _dealt(self, connection: sa.Connection) -> int:
        """Count the grid points that a trial has or is about to get: Optuna deals a point out again while it runs."""
        of_study = trials.join(trial_system_attributes, trial_system_attributes.c.trial_id == trials.c.trial_id)
        points = (
            sa.select(sa.func.count(sa.distinct(trial_system_attributes.c.value_json)))
            .select_from(of_study)
            .where(trials.c.study_id == self.study_id, trial_system_attributes.c.key == GRID_KEY)
        )
        has_point = sa.exists().where(
            trial_system_attributes.c.trial_id == hpo_trials.c.trial_id, trial_system_attributes.c.key == GRID_KEY
        )
        about_to = (
            sa.select(sa.func.count())
            .select_from(hpo_trials)
            .where(hpo_trials.c.study_uid == self.uid, hpo_trials.c.settled.is_(False), ~has_point)
        )
        return int(connection.execute(points).scalar_one()) + int(connection.execute(about_to).scalar_one())

    def _lease(self, connection: sa.Connection) -> sa.ColumnElement[float]:
        return storage.now(connection) + self.lease_seconds

    # --- while it runs ----------------------------------------------------------------------------------------------

    def report(self, reports: Sequence[Report]) -> list[Claim]:
        """Write an epoch of every trial in one transaction and renew the leases; return the claims that were lost."""
        lost = []
        with storage.writing(self.engine) as connection:
            for report in reports:
                if not self._hold(connection, report.claim):
                    lost.append(report.claim)
                    continue
                self._write_report(connection, report)
        return lost

    def _write_report(self, connection: sa.Connection, report: Report) -> None:
        value, kind = stored(report.value)
        step = {"trial_id": report.claim.trial_id, "step": report.step}
        row = step | {"intermediate_value": value, "intermediate_value_type": kind}
        _upsert(connection, intermediate_values, [row], key=list(step))
        point = {"study_uid": self.uid, "trial_id": report.claim.trial_id, "epoch": report.step}
        rows = [
            {**point, "metric": metric, "value": None if math.isnan(number) else number}
            for metric, number in report.metrics.items()
        ]
        if rows:
            _upsert(connection, hpo_curves, rows, key=[*point, "metric"])

    def curve(self, claim: Claim, metric: str) -> list[float]:
        """Return a trial's raw curve of a metric by epoch, as far as it is stored."""
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

    def renew(self, claim: Claim) -> bool:
        """Renew a lease; False if it is no longer ours."""
        with storage.writing(self.engine) as connection:
            return self._hold(connection, claim)

    def _hold(self, connection: sa.Connection, claim: Claim) -> bool:
        """Renew the lease if the claim still stands and Optuna's trial still runs; the row stays locked until commit."""
        renewed = connection.execute(
            hpo_trials.update().where(self._of(claim)).values(lease_until=self._lease(connection))
        )
        if renewed.rowcount != 1:
            return False
        state = connection.execute(
            sa.select(trials.c.state).where(trials.c.trial_id == claim.trial_id)
        ).scalar_one_or_none()
        return bool(state == TrialState.RUNNING)

    def _of(self, claim: Claim) -> sa.ColumnElement[bool]:
        """Select the claim's row while the claim stands: not settled, taken over or given back, its study still there."""
        study_is_alive = sa.exists().where(
            trials.c.trial_id == claim.trial_id,  # SQLite gives the ids of a deleted study's trials to the next one's
            study_user_attributes.c.study_id == trials.c.study_id,
            study_user_attributes.c.key == UID_KEY,
            study_user_attributes.c.value_json == json.dumps(self.uid),
        )
        return sa.and_(
            hpo_trials.c.study_uid == self.uid,
            hpo_trials.c.trial_id == claim.trial_id,
            hpo_trials.c.attempt == claim.attempt,
            hpo_trials.c.settled.is_(False),
            hpo_trials.c.lease_until.is_not(None),
            study_is_alive,
        )

    def record_checkpoint(self, claim: Claim, checkpoint: Checkpoint) -> None:
        """Record a checkpoint file with the trial's system attributes as they are now; LostLease if the claim fell."""
        with storage.writing(self.engine) as connection:
            self._hold_or_raise(connection, claim)
            rows = connection.execute(
                sa.select(trial_system_attributes.c.key, trial_system_attributes.c.value_json).where(
                    trial_system_attributes.c.trial_id == claim.trial_id
                )
            )
            connection.execute(
                hpo_trials.update()
                .where(self._of(claim))
                .values(
                    checkpoint_epoch=checkpoint.epoch,
                    checkpoint_path=checkpoint.path,
                    checkpoint_digest=checkpoint.digest,
                    checkpoint_attributes=json.dumps({row.key: row.value_json for row in rows}),
                )
            )

    def record_receipt(self, claim: Claim, receipt: Mapping[str, Any]) -> None:
        """Record what the trial is being made from; LostLease if the claim fell."""
        with storage.writing(self.engine) as connection:
            self._hold_or_raise(connection, claim)
            connection.execute(hpo_trials.update().where(self._of(claim)).values(receipt=json.dumps(receipt)))

    def _hold_or_raise(self, connection: sa.Connection, claim: Claim) -> None:
        if not self._hold(connection, claim):
            raise LostLease(f"trial {claim.number}: another worker has taken it up")

    # --- its end ----------------------------------------------------------------------------------------------------

    def park(self, claim: Claim) -> None:
        """Give the lease back; the trial stays RUNNING and whoever claims next goes on with it."""
        with storage.writing(self.engine) as connection:
            connection.execute(hpo_trials.update().where(self._of(claim)).values(lease_until=None))

    def park_all_of(self, worker: str) -> None:
        """Give back every lease of a worker that is known to be dead."""
        with storage.writing(self.engine) as connection:
            connection.execute(
                hpo_trials.update()
                .where(
                    hpo_trials.c.study_uid == self.uid,
                    hpo_trials.c.settled.is_(False),
                    hpo_trials.c.worker == worker,
                )
                .values(lease_until=None)
            )

    def start_over(self, claim: Claim) -> None:
        """Forget a checkpoint that cannot be read, and the curve with it; LostLease if the claim fell."""
        with storage.writing(self.engine) as connection:
            self._hold_or_raise(connection, claim)
            forgotten = {"checkpoint_epoch": None, "checkpoint_path": None, "checkpoint_digest": None}
            connection.execute(
                hpo_trials.update().where(self._of(claim)).values(**forgotten, checkpoint_attributes=None)
            )
            row = connection.execute(
                sa.select(hpo_trials).where(hpo_trials.c.study_uid == self.uid, hpo_trials.c.trial_id == claim.trial_id)
            ).one()
            self._cut_back(connection, row)

    def finish(
        self, claim: Claim, state: TrialState, value: float | None, *, outcome: str, reason: str | None = None
    ) -> None:
        """Settle a trial: its state, its value if it has a finite one, and why; LostLease if the claim fell.

        Raises LostLease before anything is written.
        """
        with storage.writing(self.engine) as connection:
            settled = connection.execute(
                hpo_trials.update()
                .where(self._of(claim))
                .values(settled=True, lease_until=None, outcome=outcome, reason=reason and _storable(reason))
            )
            finished = connection.execute(
                trials.update()
                .where(trials.c.trial_id == claim.trial_id, trials.c.state == TrialState.RUNNING)
                .values(state=state, datetime_complete=_utc())
            )
            if settled.rowcount != 1 or finished.rowcount != 1:
                raise LostLease(f"trial {claim.number}: was taken up or ended by another process")
            if value is not None:
                row = {"trial_id": claim.trial_id, "objective": 0, "value": value, "value_type": VALUE_TYPE.FINITE}
                _upsert(connection, trial_values, [row], key=["trial_id", "objective"])

    # --- the study --------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Start no new trial in this study from now on; what runs or is parked is still finished."""
        with storage.writing(self.engine) as connection:
            self._write_stop(connection, reason)

    def _write_stop(self, connection: sa.Connection, reason: str) -> None:
        connection.execute(
            hpo_studies.update()
            .where(hpo_studies.c.uid == self.uid, hpo_studies.c.stop_reason.is_(None))
            .values(stop_reason=_storable(reason))
        )

    def announce_test_opening(self, trial_number: int | None, folder: str) -> None:
        """Record that a training in this folder is about to open the test split."""
        with storage.writing(self.engine) as connection:
            connection.execute(
                hpo_test_openings.insert().values(
                    study_uid=self.uid,
                    study_id=self.study_id,
                    trial_number=trial_number,
                    opened_at=storage.now(connection),
                    folder=folder,
                )
            )

    def complete_test_opening(self, trial_number: int | None, folder: str, metrics: Mapping[str, float]) -> None:
        """Record the result of the latest opening that has none yet, if there is such a one."""
        with storage.writing(self.engine) as connection:
            latest = connection.execute(
                sa.select(sa.func.max(hpo_test_openings.c.opening_id)).where(
                    hpo_test_openings.c.study_uid == self.uid,
                    hpo_test_openings.c.trial_number == trial_number,
                    hpo_test_openings.c.folder == folder,
                    hpo_test_openings.c.metrics.is_(None),
                )
            ).scalar_one()
            connection.execute(
                hpo_test_openings.update()
                .where(hpo_test_openings.c.opening_id == latest)
                .values(metrics=json.dumps(metrics))
            )


def _utc() -> datetime:
    """Return the time as Optuna 5 stores it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def _storable(text: str) -> str:
    """Return the text without what a database cannot hold: Postgres no NUL, neither of them a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _upsert(
    connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], *, key: Sequence[str]
) -> None:
    """Insert rows, or overwrite the ones that have the same key: writing twice is writing once."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(rows)
    overwritten = {name: statement.excluded[name] for name in rows[0] if name not in key}
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=overwritten))
