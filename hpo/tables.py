"""Our tables beside Optuna's, in the same database, and the handles on Optuna's own.

Each row of ours carries the study's random uid, which also stands in the study's user attributes. A row whose uid is
not there is dead: SQLite gives the ids of a deleted study to the next one, and nothing of the old may be inherited.
"""

from __future__ import annotations

import json
import math

import sqlalchemy as sa
from optuna.storages._rdb import models  # Optuna's schema, version 12; the only place that imports it

UID_KEY = "hpo:uid"  # the user attribute that ties a study of Optuna's to our rows

studies = models.StudyModel.__table__
study_user_attributes = models.StudyUserAttributeModel.__table__
study_directions = models.StudyDirectionModel.__table__
trials = models.TrialModel.__table__
trial_values = models.TrialValueModel.__table__
trial_params = models.TrialParamModel.__table__
trial_system_attributes = models.TrialSystemAttributeModel.__table__
intermediate_values = models.TrialIntermediateValueModel.__table__
VALUE_TYPE = models.TrialValueModel.TrialValueType
INTERMEDIATE_TYPE = models.TrialIntermediateValueModel.TrialIntermediateValueType

metadata = sa.MetaData()


def stored(value: float) -> tuple[float | None, INTERMEDIATE_TYPE]:
    """Return a value and its type as Optuna's table of intermediate values holds them."""
    if math.isnan(value):
        return None, INTERMEDIATE_TYPE.NAN
    if math.isinf(value):
        return None, INTERMEDIATE_TYPE.INF_POS if value > 0 else INTERMEDIATE_TYPE.INF_NEG
    return value, INTERMEDIATE_TYPE.FINITE


def restored(value: float | None, kind: INTERMEDIATE_TYPE) -> float:
    """Return the value that `stored` took apart."""
    special = {
        INTERMEDIATE_TYPE.NAN: math.nan,
        INTERMEDIATE_TYPE.INF_POS: math.inf,
        INTERMEDIATE_TYPE.INF_NEG: -math.inf,
    }
    return special[kind] if value is None else value


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
    sa.Column("spec", sa.Text, nullable=False),  # JSON, defaults filled
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("trials", sa.Integer, nullable=False),  # the budget: rows in any state but WAITING
    sa.Column("imported", sa.Integer, nullable=False, default=0),  # rows a fork brought along; not charged
    sa.Column("stop_reason", sa.Text),  # set: no new trial is started
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
    sa.Column("lease_until", sa.Double),  # seconds since 1970 by the database's clock; NULL is parked
    sa.Column("checkpoint_epoch", sa.Integer),
    sa.Column("checkpoint_path", sa.Text),
    sa.Column("checkpoint_digest", sa.String(64)),
    sa.Column("checkpoint_attributes", sa.Text),  # JSON: the trial's system attributes at that epoch
    sa.Column("outcome", sa.String(40)),  # why it ended: complete, pruned, diverged, exception, ...
    sa.Column("reason", sa.Text),  # in words; a traceback for an exception
    sa.Column("receipt", sa.Text),  # JSON: seeds, versions, device, ... of the last attempt
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


def create(engine: sa.Engine) -> None:
    """Make our tables where they are missing."""
    metadata.create_all(engine)


def living_row(connection: sa.Connection, study_id: int) -> sa.Row[tuple[object, ...]] | None:
    """Return our row of a study, None if it has none or only a dead one."""
    uid = sa.select(study_user_attributes.c.value_json).where(
        study_user_attributes.c.study_id == study_id, study_user_attributes.c.key == UID_KEY
    )
    text = connection.execute(uid).scalar_one_or_none()
    if text is None:
        return None
    return connection.execute(
        sa.select(hpo_studies).where(hpo_studies.c.study_id == study_id, hpo_studies.c.uid == json.loads(text))
    ).one_or_none()
