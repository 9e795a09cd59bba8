"""A storage in memory, for one process: Optuna's tables and ours in SQLite, without a file."""

from __future__ import annotations

import sqlalchemy as sa

from hpo.storage import tables
from hpo.storage.optuna_storage import OptunaStorage


def storage() -> OptunaStorage:
    """Return a new, empty storage in memory. It is gone when nothing refers to it any more.

    Its tables are made from our description of Optuna's. Optuna itself takes half a second to make them.
    """
    engine = sa.create_engine(
        "sqlite://",
        poolclass=sa.pool.StaticPool,  # one connection; another one would see another database
        connect_args={"isolation_level": "IMMEDIATE", "check_same_thread": False},
    )
    tables.optunas.create_all(engine)
    tables.create(engine)
    return OptunaStorage(engine)
