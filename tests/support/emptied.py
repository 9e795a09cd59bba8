"""Fresh storages in milliseconds: a copied SQLite file, or one Postgres database whose tables are emptied.

For suites of hundreds of small tests, where a database for each would take most of the time. Every test still opens a
storage of its own, which knows nothing of the one before.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from optuna.storages._rdb import models
from sqlalchemy.engine import URL

from hpo.storage import tables
from hpo.storage.connect import connect, plain_url

KEPT = {"version_info", "alembic_version"}  # what Optuna looks at before it trusts the tables
ALL_TABLES = [
    *models.BaseModel.metadata.sorted_tables,
    *tables.metadata.sorted_tables,
]  # the pointed-to before the rest
EMPTY = ";\n".join(
    [
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        *(f"DELETE FROM {table.name}" for table in reversed(ALL_TABLES) if table.name not in KEPT),
        "SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S'",
    ]
)


def sqlite_template(folder: Path) -> Path:
    """Make a SQLite file with all tables, to be copied."""
    template = folder / "template.db"
    connect(f"sqlite:///{template}", create=True).close()
    return template


def sqlite_copy(template: Path, folder: Path) -> str:
    """Copy the template and return the copy's URL."""
    return f"sqlite:///{shutil.copy(template, folder / 'studies.db')}"


@contextmanager
def postgres_database(server: URL) -> Iterator[str]:
    """Make a database with all tables, and drop it in the end."""
    name = f"hpo_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    url = plain_url(server.set(database=name))
    try:
        connect(url, create=True).close()
        yield url
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


def empty(url: str) -> None:
    """Make a Postgres database as it was made: no row in it, nobody else in it, the next id of every kind 1.

    What the test before has left running there is thrown out, as `DROP DATABASE ... WITH (FORCE)` does. Rows are deleted, since
    TRUNCATE makes new files and takes 20 times as long.
    """
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(EMPTY)
