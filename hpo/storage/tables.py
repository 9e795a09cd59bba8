"""Our tables beside Optuna's, in the same database, and the handles on Optuna's own.

Each row of ours carries the study's random uid, which also stands in the study's user attributes. A row whose uid is
not there is dead: SQLite gives the ids of a deleted study to the next one, and nothing of the old may be inherited.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb import models  # Optuna's schema, version 12; the only place that imports it
from optuna.trial import TrialState

#: Of what our rows mean; processes of two of them do not work on one study side by side. 1: up to November 2026.
SCHEMA = 2
UID_KEY = "hpo:uid"  # the user attribute that ties a study of Optuna's to our rows

studies = models.StudyModel.__table__
study_user_attributes = models.StudyUserAttributeModel.__table__
study_system_attributes = models.StudySystemAttributeModel.__table__
study_directions = models.StudyDirectionModel.__table__
trials = models.TrialModel.__table__
trial_values = models.TrialValueModel.__table__
trial_params = models.TrialParamModel.__table__
trial_user_attributes = models.TrialUserAttributeModel.__table__
trial_system_attributes = models.TrialSystemAttributeModel.__table__
intermediate_values = models.TrialIntermediateValueModel.__table__
trial_heartbeats = models.TrialHeartbeatModel.__table__
#: Ours, on Optuna's table, so that nobody looks at all trials for the next number, for what is new,
trials_by_number = sa.Index("ix_hpo_trials_study_id_number", trials.c.study_id, trials.c.number)
trials_by_state = sa.Index(
    "ix_hpo_trials_study_id_state", trials.c.study_id, trials.c.state
)  # or for the few that are open
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
VALUE_TYPE = models.TrialValueModel.TrialValueType
INTERMEDIATE_TYPE = models.TrialIntermediateValueModel.TrialIntermediateValueType

SPECIAL = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}  # Optuna's names of what a column cannot hold

SCHEMA_VERSION = "v3.2.0.a"  # of Optuna's tables, as its own migrations call it
_migrations = sa.table("alembic_version", sa.column("version_num"))

metadata = sa.MetaData()


def stored(value: float) -> tuple[float | None, INTERMEDIATE_TYPE]:
    """Return a value and its type as Optuna's table of intermediate values holds them."""
    if math.isnan(value):
        return None, INTERMEDIATE_TYPE.NAN
    if math.isinf(value):
        return None, INTERMEDIATE_TYPE.INF_POS if value > 0 else INTERMEDIATE_TYPE.INF_NEG
    return value, INTERMEDIATE_TYPE.FINITE


def restored(value: float | None, kind: INTERMEDIATE_TYPE | VALUE_TYPE) -> float:
    """Return the value that `stored` took apart, or a trial's own."""
    return SPECIAL[kind.name] if value is None else value


def _study_key() -> sa.Column[int]:
    return sa.Column("study_id", sa.ForeignKey(studies.c.study_id, ondelete="CASCADE"), nullable=False, index=True)


def _trial_key() -> sa.Column[int]:
    # Cascading: a plain foreign key makes Optuna's delete_study a silent no-op on Postgres.
    return sa.Column("trial_id", sa.ForeignKey(trials.c.trial_id, ondelete="CASCADE"), primary_key=True)


hpo_studies = sa.Table(
    "hpo_studies",
    metadata,
    sa.Column("uid", sa.String(32), primary_key=True),
    _study_key(),
    sa.Column("schema", sa.Integer),  # SCHEMA of those who work on it; NULL is 1
    sa.Column("spec", sa.Text, nullable=False),  # JSON, defaults filled
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("trials", sa.Integer, nullable=False),  # the budget: rows in any state but WAITING
    sa.Column("imported", sa.Integer, nullable=False, default=0),  # rows a fork brought along; not charged
    sa.Column("stop_reason", sa.Text),  # set: no new trial is started
    sa.Column("hold", sa.String(10)),  # set: nothing is claimed at all; see `Hold`
    sa.Column("streak_kind", sa.String(40)),  # the kind of failure that ended the last trials,
    sa.Column("streak", sa.Integer, nullable=False, server_default="0"),  # so many of them one after the other
    sa.Column("code_folder", sa.Text, nullable=False),  # where the user's own code was found when the study was made
    sa.Column("code_digest", sa.String(64), nullable=False),
    sa.Column("code_changes", sa.Text, nullable=False, default="[]"),  # JSON: other digests that were let in
    sa.Column("data_digest", sa.String(64)),
    sa.Column("checkpoints", sa.Text, nullable=False),  # folder
)

hpo_trials = sa.Table(
    "hpo_trials",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    _trial_key(),
    sa.Column("attempt", sa.Integer, nullable=False),  # how often the trial was taken up: the lease's fencing token
    sa.Column("settled", sa.Boolean, nullable=False),  # finished by us; nothing may take it up again
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("lease_until", sa.Double),  # seconds by the clock that `lease_clock` names; NULL is parked
    sa.Column("lease_clock", sa.String(300)),  # NULL is the database's own, since 1970; see `queue.lease_clock`
    sa.Column("stop_requested", sa.Boolean, nullable=False, server_default=sa.false()),  # by a person
    sa.Column("accumulation", sa.Integer, nullable=False, server_default="1"),  # micro-batches to a batch
    sa.Column("checkpoint_epoch", sa.Integer),
    sa.Column("checkpoint_path", sa.Text),
    sa.Column("checkpoint_digest", sa.String(64)),
    sa.Column("checkpoint_attributes", sa.Text),  # JSON: the trial's system attributes at that epoch
    sa.Column("costs", sa.Text),  # JSON: what of its end is known before it is trained; see `objectives.KnownCosts`
    sa.Column("outcome", sa.String(40)),  # why it ended: complete, pruned, stopped, or the kind of its last failure
    sa.Column("reason", sa.Text),  # in words, a line
    sa.Column("receipt", sa.Text),  # JSON: seeds, versions, device, ... of the last attempt
    # Which kind of stack it trains in, called `partition` in the database. NULL until somebody has opened it.
    sa.Column("partition", sa.Text, key="stack_key"),
)

hpo_failures = sa.Table(
    "hpo_failures",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    _trial_key(),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(40), primary_key=True),
    sa.Column("verdict", sa.String(10), nullable=False),
    sa.Column("failed_at", sa.Double, nullable=False),
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("message", sa.Text, nullable=False),  # a line
    sa.Column("traceback", sa.Text),
)

hpo_workers = sa.Table(
    "hpo_workers",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    sa.Column("worker", sa.String(200), primary_key=True),
    _study_key(),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),  # seconds by the clock that `clock` names,
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("left_at", sa.Double),
    sa.Column("clock", sa.String(300)),  # as leases do
    # Seconds that its wall clock is ahead: of Postgres's; on SQLite of itself as it was when this process started.
    sa.Column("clock_skew", sa.Double, nullable=False),
    sa.Column("booted_at", sa.Double),  # on SQLite: when its machine started, by its wall clock as that was then
    sa.Column("versions", sa.Text, nullable=False),  # JSON
)

hpo_curves = sa.Table(
    "hpo_curves",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    _trial_key(),
    sa.Column("metric", sa.String(100), primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Double),  # NULL is not a number (SQLite stores NaN so)
)

hpo_test_openings = sa.Table(
    "hpo_test_openings",
    metadata,
    sa.Column("opening_id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.String(32), nullable=False, index=True),
    _study_key(),
    sa.Column("trial_number", sa.Integer),
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("metrics", sa.Text),  # JSON; NULL if the training was cut off between opening the split and here
)


class Hold(StrEnum):
    """Why nothing of a study is claimed, not even what is parked."""

    PAUSED = "paused"  #: by a person: running trials are parked, workers wait
    BROKEN = "broken"  #: too many trials failed in a row: running ones may end, workers leave
    FORKING = "forking"  #: trials of another study are still being copied into it


def has_known_schema(engine: sa.Engine) -> bool:
    """Say whether Optuna's tables are those that we know."""
    try:
        with engine.connect() as connection:
            return connection.execute(sa.select(_migrations.c.version_num)).scalars().all() == [SCHEMA_VERSION]
    except (sa.exc.ProgrammingError, sa.exc.OperationalError):  # there is no such table, for one
        return False


def create(engine: sa.Engine) -> None:
    """Make our tables where they are missing, and the columns that those of an earlier version lack."""
    metadata.create_all(engine)
    for index in (trials_by_number, trials_by_state):
        index.create(engine, checkfirst=True)
    for column in missing(engine):
        described = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {described}")


def missing(engine: sa.Engine) -> list[sa.Column[Any]]:
    """Return the columns that our tables, where they are there, do not have yet."""
    inspector = sa.inspect(engine)
    there = set(inspector.get_table_names())
    return [
        column
        for table in metadata.sorted_tables
        if table.name in there
        for known in [{found["name"] for found in inspector.get_columns(table.name)}]
        for column in table.columns
        if column.name not in known
    ]


def utc() -> datetime:
    """Return the time as Optuna 5 stores it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def as_utc(moment: datetime | None) -> datetime | None:
    """Return a time as Optuna's objects have it, of this machine's zone, as it is stored."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)


def as_local(moment: datetime | None) -> datetime | None:
    """Return a stored time as Optuna's objects have it: of this machine's zone, without saying so."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def running_ids(study_id: int) -> sa.Select[Any]:
    """Select the ids of a study's RUNNING trials."""
    return sa.select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.state == TrialState.RUNNING)


def living_row(
    connection: sa.Connection, study_id: int, *more: sa.ColumnElement[Any], **parameters: Any
) -> sa.Row[Any] | None:
    """Return our row of a study, None if it has none or only a dead one.

    Args:
        more: columns to return with it, always the same objects.
        parameters: of these columns.
    """
    return connection.execute(_living(*more), {"of_study": study_id, **parameters}).one_or_none()


@cache
def _living(*more: sa.ColumnElement[Any]) -> Any:
    return (
        sa.select(hpo_studies, *more)
        .join(study_user_attributes, study_user_attributes.c.study_id == hpo_studies.c.study_id)
        .where(
            hpo_studies.c.study_id == sa.bindparam("of_study"),
            study_user_attributes.c.key == UID_KEY,
            study_user_attributes.c.value_json == sa.literal('"').concat(hpo_studies.c.uid).concat('"'),
        )
    )
