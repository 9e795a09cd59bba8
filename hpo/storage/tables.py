"""Our tables beside Optuna's in the same database, and declarations of Optuna's own tables.

Each row of ours holds the study's random uid, which is also a user attribute of the study. A row whose uid is not there
is dead. SQLite gives the ids of a deleted study to the next one, which must not inherit the old rows.
"""

from __future__ import annotations

import enum
import json
import math
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any

import sqlalchemy as sa

#: The version of our rows. Processes of two versions do not work on one study together. 1 was used until November 2026.
SCHEMA = 2
UID_KEY = "hpo:uid"  # the user attribute with the study's uid
FOLD_KEY = "hpo:fold"  # user attribute of a trial that is validated on another fold than the one of its study
FORKED_FROM_KEY = "hpo:forked_from"  # user attribute of a trial that a study took from another one: its number there
QUEUED_KEY = "fixed_params"  # Optuna's system attribute of a queued trial: the values that it was queued with
CONSTRAINTS = "constraints"  # prefix of Optuna's system attributes with a trial's constraints
UNREAD_KEY = "hpo:unread_epochs"  # user attribute of a command's trial: pairs of the epochs around a gap in its curve
DIVERGED_KEY = "hpo:diverged"  # user attribute of a PRUNED trial that diverged: why
COST_PREFIX = "hpo:cost:"  # prefix of user attributes with costs, known before a trial's first epoch
FINISHED = ("COMPLETE", "PRUNED", "FAIL")  # the states of trials that have ended, by name
OPEN = ("WAITING", "RUNNING")  # the other states
STOPPED = "stopped"  # the outcome of a trial of ours that a person ended

SPECIAL = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}  # by Optuna's name; no column can hold them

# --- Optuna's own tables. A test compares them with Optuna's models. They are declared here, so that reading a study
# --- need not load Optuna, which takes longer than the reading.

VERSION_TABLE = "version_info"  # filled by Optuna, not read here
SCHEMA_VERSION = "v3.2.0.a"  # the version in Optuna's migrations


class _Named(sa.types.TypeDecorator[Any]):
    """A column with a member of one of Optuna's enumerations. A parameter may be a member or its name."""

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        return value if value is None or isinstance(value, str) else value.name

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        return None if value is None else self.kind()[value]

    @staticmethod
    def kind() -> Any:
        """Return the enumeration."""
        raise NotImplementedError


class State(_Named):
    """The state of a trial, Optuna's TrialState."""

    cache_ok = True
    impl = sa.Enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", name="trialstate")

    @staticmethod
    @cache
    def kind() -> Any:
        from optuna.trial import TrialState

        return TrialState


class Direction(_Named):
    """The direction of an objective, Optuna's StudyDirection."""

    cache_ok = True
    impl = sa.Enum("NOT_SET", "MINIMIZE", "MAXIMIZE", name="studydirection")

    @staticmethod
    @cache
    def kind() -> Any:
        from optuna.study import StudyDirection

        return StudyDirection


class VALUE_TYPE(enum.Enum):
    FINITE = 1
    INF_POS = 2
    INF_NEG = 3


class INTERMEDIATE_TYPE(enum.Enum):
    FINITE = 1
    INF_POS = 2
    INF_NEG = 3
    NAN = 4


optunas = sa.MetaData()


def _id(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, primary_key=True)


def _of_study(**options: Any) -> sa.Column[int]:
    return sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id"), **options)


def _of_trial(**options: Any) -> sa.Column[int]:
    return sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), **options)


def _attributes(name: str, owner: sa.Column[int]) -> sa.Table:
    """Return a table of attributes, JSON by key."""
    return sa.Table(
        f"{name}s",
        optunas,
        _id(f"{name}_id"),
        owner,
        sa.Column("key", sa.String(512)),
        sa.Column("value_json", sa.Text),
        sa.UniqueConstraint(owner, "key"),
    )


studies = sa.Table(
    "studies",
    optunas,
    _id("study_id"),
    sa.Column("study_name", sa.String(512), index=True, unique=True, nullable=False),
)
study_directions = sa.Table(
    "study_directions",
    optunas,
    _id("study_direction_id"),
    sa.Column("direction", Direction, nullable=False),
    _of_study(nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.UniqueConstraint("study_id", "objective"),
)
study_user_attributes = _attributes("study_user_attribute", _of_study())
study_system_attributes = _attributes("study_system_attribute", _of_study())
trials = sa.Table(
    "trials",
    optunas,
    _id("trial_id"),
    sa.Column("number", sa.Integer),
    _of_study(index=True),
    sa.Column("state", State, nullable=False),
    sa.Column("datetime_start", sa.DateTime),
    sa.Column("datetime_complete", sa.DateTime),
)
trial_user_attributes = _attributes("trial_user_attribute", _of_trial())
trial_system_attributes = _attributes("trial_system_attribute", _of_trial())
trial_params = sa.Table(
    "trial_params",
    optunas,
    _id("param_id"),
    _of_trial(),
    sa.Column("param_name", sa.String(512)),
    sa.Column("param_value", sa.Float(precision=53)),
    sa.Column("distribution_json", sa.Text),
    sa.UniqueConstraint("trial_id", "param_name"),
)
trial_values = sa.Table(
    "trial_values",
    optunas,
    _id("trial_value_id"),
    _of_trial(nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.Column("value", sa.Float(precision=53)),
    sa.Column("value_type", sa.Enum(VALUE_TYPE, name="trialvaluetype"), nullable=False),
    sa.UniqueConstraint("trial_id", "objective"),
)
intermediate_values = sa.Table(
    "trial_intermediate_values",
    optunas,
    _id("trial_intermediate_value_id"),
    _of_trial(nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("intermediate_value", sa.Float(precision=53)),
    sa.Column("intermediate_value_type", sa.Enum(INTERMEDIATE_TYPE, name="trialintermediatevaluetype"), nullable=False),
    sa.UniqueConstraint("trial_id", "step"),
)
trial_heartbeats = sa.Table(
    "trial_heartbeats",
    optunas,
    _id("trial_heartbeat_id"),
    _of_trial(nullable=False),
    sa.Column("heartbeat", sa.DateTime, nullable=False, default=sa.func.current_timestamp()),
    sa.UniqueConstraint("trial_id"),
)
alembic_version = sa.Table("alembic_version", optunas, sa.Column("version_num", sa.String(32), primary_key=True))
#: Our own index on Optuna's table. It finds the next number and new trials without reading all trials.
trials_by_number = sa.Index("ix_hpo_trials_study_id_number", trials.c.study_id, trials.c.number)
#: Likewise. It finds the open trials.
trials_by_state = sa.Index("ix_hpo_trials_study_id_state", trials.c.study_id, trials.c.state)

metadata = sa.MetaData()


def stored(value: float) -> tuple[float | None, INTERMEDIATE_TYPE]:
    """Return a value and its type as Optuna's table of intermediate values holds them."""
    if math.isnan(value):
        return None, INTERMEDIATE_TYPE.NAN
    if math.isinf(value):
        return None, INTERMEDIATE_TYPE.INF_POS if value > 0 else INTERMEDIATE_TYPE.INF_NEG
    return value, INTERMEDIATE_TYPE.FINITE


def restored(value: float | None, kind: INTERMEDIATE_TYPE | VALUE_TYPE) -> float:
    """Return the value of a row of intermediate values or of trial values."""
    return SPECIAL[kind.name] if value is None else value


def restored_param(value: float, distribution: str) -> Any:
    """Return a parameter's value as an objective sees it, from both columns of a row of parameters."""
    described = _described(distribution)
    match described.get("name"):
        case "FloatDistribution":
            return value
        case "IntDistribution":
            return int(value)
        case "CategoricalDistribution":
            return described["attributes"]["choices"][int(value)]
    from optuna.distributions import json_to_distribution  # of an earlier Optuna

    return json_to_distribution(distribution).to_external_repr(value)


def restored_choices(distribution: str) -> list[Any] | None:
    """Return the choices of a categorical parameter, None for another parameter."""
    found: list[Any] | None = _described(distribution).get("attributes", {}).get("choices")
    return found


@lru_cache(maxsize=4096)
def _described(distribution: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(distribution)
    return found


def _study_key() -> sa.Column[int]:
    return sa.Column("study_id", sa.ForeignKey(studies.c.study_id, ondelete="CASCADE"), nullable=False, index=True)


def _trial_key() -> sa.Column[int]:
    # CASCADE: with a plain foreign key, Optuna's delete_study silently does nothing on Postgres.
    return sa.Column("trial_id", sa.ForeignKey(trials.c.trial_id, ondelete="CASCADE"), primary_key=True)


hpo_studies = sa.Table(
    "hpo_studies",
    metadata,
    sa.Column("uid", sa.String(32), primary_key=True),
    _study_key(),
    sa.Column("schema", sa.Integer),  # SCHEMA of its workers; NULL is 1
    sa.Column("spec", sa.Text, nullable=False),  # JSON, with all defaults
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("trials", sa.Integer, nullable=False),  # the budget: how many rows may leave WAITING
    sa.Column("imported", sa.Integer, nullable=False, default=0),  # rows that a fork copied; not charged to the budget
    sa.Column("stop_reason", sa.Text),  # if set, no new trial is started
    sa.Column("hold", sa.String(10)),  # if set, nothing is claimed; see `Hold`
    sa.Column(
        "orders", sa.Integer, nullable=False, server_default="0"
    ),  # their version, by which workers know of new ones
    sa.Column("streak_kind", sa.String(40)),  # the kind of failure that ended the last trials
    sa.Column("streak", sa.Integer, nullable=False, server_default="0"),  # how many trials in a row it ended
    sa.Column("code_folder", sa.Text, nullable=False),  # the folder of the user's code when the study was made
    sa.Column("code_digest", sa.String(64), nullable=False),
    sa.Column("code_changes", sa.Text, nullable=False, default="[]"),  # JSON: other code digests that were accepted
    sa.Column("data_digest", sa.String(64)),
    sa.Column("checkpoints", sa.Text, nullable=False),  # folder
)

hpo_trials = sa.Table(
    "hpo_trials",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    _trial_key(),
    sa.Column("attempt", sa.Integer, nullable=False),  # number of claims: the lease's fencing token
    sa.Column("settled", sa.Boolean, nullable=False),  # finished by us; it is never claimed again
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("lease_until", sa.Double),  # seconds by the clock `lease_clock`; NULL is parked
    sa.Column("lease_clock", sa.String(300)),  # NULL is the database's clock, since 1970; see `queue.lease_clock`
    sa.Column("stop_requested", sa.Boolean, nullable=False, server_default=sa.false()),  # by a person
    sa.Column("accumulation", sa.Integer, nullable=False, server_default="1"),  # micro-batches per batch
    sa.Column("checkpoint_epoch", sa.Integer),
    sa.Column("checkpoint_path", sa.Text),
    sa.Column("checkpoint_digest", sa.String(64)),
    sa.Column("checkpoint_attributes", sa.Text),  # JSON: the trial's system attributes at that epoch
    sa.Column("costs", sa.Text),  # JSON; see `objectives.KnownCosts`
    sa.Column("outcome", sa.String(40)),  # why it ended: complete, pruned, stopped, or the kind of its last failure
    sa.Column("reason", sa.Text),  # one line of text
    sa.Column("receipt", sa.Text),  # JSON: seeds, versions, device and so on of the last attempt
    # Its name in the database is `partition`. NULL until a worker has opened the trial.
    sa.Column("partition", sa.Text, key="stack_key"),
)

#: Finds parked trials, and leases that have passed, without reading all that run. See `queue.rows.open_trials`. Settled
#: trials are left out of it, which `create` says for the dialect in use: an option for another one would load that one.
open_by_lease = sa.Index(
    "ix_hpo_trials_open",
    hpo_trials.c.study_uid,
    hpo_trials.c.lease_until,
    hpo_trials.c.trial_id,
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
    sa.Column("message", sa.Text, nullable=False),  # one line
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
    sa.Column("started_at", sa.Double, nullable=False),  # this and the next two: seconds by the clock `clock`
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("left_at", sa.Double),
    sa.Column("clock", sa.String(300)),  # as `lease_clock`
    # Seconds that its wall clock is ahead of Postgres's clock. On SQLite: ahead of itself at the start of this process.
    sa.Column("clock_skew", sa.Double, nullable=False),
    sa.Column("booted_at", sa.Double),  # on SQLite: when its machine booted, by its wall clock at the worker's start
    sa.Column("versions", sa.Text, nullable=False),  # JSON
    sa.Column("launch", sa.Integer),  # of `hpo_launches`; NULL for a worker that no engine started, as the next
    sa.Column("slot", sa.Integer),  # its place in the launch
    sa.Column("gpus", sa.Text),  # CUDA_VISIBLE_DEVICES; NULL without it, and before December 2026
)

hpo_launches = sa.Table(
    "hpo_launches",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    sa.Column("launch", sa.Integer, primary_key=True, autoincrement=False),  # 1, 2, ... within the study
    _study_key(),
    sa.Column("engine", sa.String(40), nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),  # workers that were asked for, those of `hpo scale` included
    sa.Column("retired", sa.Text, nullable=False),  # JSON: slots whose workers leave for good
    sa.Column("handles", sa.Text, nullable=False),  # JSON: a list of what the engine knows the jobs by
    sa.Column("asked", sa.Text, nullable=False),  # JSON: what was asked for, to ask for more
    sa.Column("launched_by", sa.Text, nullable=False),  # user@host
    sa.Column("launched_at", sa.Double, nullable=False),  # by the database's clock
    sa.Column("recalled_at", sa.Double),  # if set, all its workers leave for good
    sa.Column("refused", sa.Text),  # why its last refused worker was refused
)

hpo_curves = sa.Table(
    "hpo_curves",
    metadata,
    sa.Column("study_uid", sa.String(32), primary_key=True),
    _trial_key(),
    sa.Column("metric", sa.String(100), primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Double),  # NULL is NaN: SQLite stores NaN as NULL
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
    sa.Column("metrics", sa.Text),  # JSON; NULL if the training ended after the opening and before the result
    sa.Column("opened_by", sa.Text),  # user@host; NULL before December 2026, as the two below
    sa.Column("trainings", sa.Integer),  # models that were tested in this opening
    sa.Column("trials_tried", sa.Integer),  # of the study, from which the config was chosen; NULL if unknown
)
#: Columns that a database of an earlier version may lack for good, if nobody may add them.
DISPENSABLE = (
    hpo_workers.c.launch,
    hpo_workers.c.slot,
    hpo_workers.c.gpus,
    hpo_test_openings.c.opened_by,
    hpo_test_openings.c.trainings,
    hpo_test_openings.c.trials_tried,
)
#: Likewise, for a process that only reads. Workers need them, and so does who gives orders.
DISPENSABLE_TO_READERS = (*DISPENSABLE, hpo_studies.c.orders)


class Hold(StrEnum):
    """Why no trial of a study is claimed, not even a parked one."""

    PAUSED = "paused"  #: by a person: running trials are parked, and workers wait
    BROKEN = "broken"  #: too many trials failed in a row: running ones may end, and workers leave
    FORKING = "forking"  #: trials of another study are still being copied into it
    SPENT = "spent"  #: a limit of time is spent: running trials are parked, and workers leave
    COPIED = "copied"  #: `hpo copy` has made a copy of it elsewhere, which goes on instead; workers leave


def has_known_schema(engine: sa.Engine) -> bool:
    """Return whether Optuna's tables have the schema that is declared here."""
    try:
        with engine.connect() as connection:
            return connection.execute(sa.select(alembic_version.c.version_num)).scalars().all() == [SCHEMA_VERSION]
    except (sa.exc.ProgrammingError, sa.exc.OperationalError):  # for example the table does not exist
        return False


def create(engine: sa.Engine) -> None:
    """Make our missing tables and indices, and add missing columns to tables of an earlier version."""
    open_by_lease.dialect_options[engine.dialect.name]["where"] = hpo_trials.c.settled.is_(False)
    metadata.create_all(engine)
    for index in (trials_by_number, trials_by_state, open_by_lease):
        index.create(engine, checkfirst=True)
    for column in missing(engine):
        described = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {described}")


#: The columns of all tables that this connection finds by their names alone. SQLAlchemy's inspection would ask table by table.
COLUMNS = {
    "sqlite": """
        SELECT m.name, c.name FROM sqlite_master m JOIN pragma_table_info(m.name) c WHERE m.type = 'table'
    """,
    "postgresql": """
        SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
    """,
}


def missing(engine: sa.Engine) -> list[sa.Column[Any]]:
    """Return the columns that our existing tables lack."""
    known: dict[str, set[str]] = {}
    with engine.connect() as connection:
        for table, column in connection.exec_driver_sql(COLUMNS[engine.dialect.name]):
            known.setdefault(table, set()).add(column)
    return [
        column
        for table in metadata.sorted_tables
        if table.name in known
        for column in table.columns
        if column.name not in known[table.name]
    ]


def utc() -> datetime:
    """Return the current time as Optuna 5 stores it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def as_utc(moment: datetime | None) -> datetime | None:
    """Return a local time of Optuna's objects as it is stored: UTC, without a zone."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)


def as_local(moment: datetime | None) -> datetime | None:
    """Return a stored time as Optuna's objects have it: local, without a zone."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
