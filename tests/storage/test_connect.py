"""A storage URL becomes one engine with the right settings, or a message without the password."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from hpo.errors import StorageBusy, StorageError
from hpo.storage import engine, sql
from hpo.storage.connect import Storage, check_connections, connect, parse_url, plain_url
from hpo.storage.redaction import redacted_url
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.both

SECRET = "hunter2"
USE = "use sqlite:///studies.db or postgresql://USER@HOST/DATABASE"


@pytest.fixture
def url(bare_url: str) -> str:
    """The URL of a database of the test's own: these tests change tables."""
    return bare_url


@pytest.fixture
def place(url: str) -> Iterator[Storage]:
    """A storage that was made just now."""
    opened = connect(url, create=True)
    yield opened
    opened.close()


def fault(url: str, *, create: bool = True) -> str:
    with pytest.raises(StorageError) as caught:
        connect(url, create=create)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # a printed chain would hold the driver's words, and with them the URL
    return str(caught.value)


def test_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("sqlite:///studies.db", "sqlite+pysqlite:///studies.db", f"sqlite:///{tmp_path}/studies.db"):
        assert plain_url(parse_url(text)) == f"sqlite:///{tmp_path}/studies.db"


def test_postgres_always_gets_psycopg_3() -> None:
    for scheme in ("postgresql", "postgresql+psycopg2", "postgresql+psycopg"):
        url = parse_url(f"{scheme}://u:{SECRET}@h:5/d")
        assert plain_url(url) == f"postgresql+psycopg://u:{SECRET}@h:5/d"
        assert redacted_url(url) == "postgresql+psycopg://u:***@h:5/d"


def test_a_password_in_the_query_is_not_shown_either() -> None:
    url = parse_url(f"postgresql://h/d?password={SECRET}&user=u&sslpassword={SECRET}")
    assert redacted_url(url) == "postgresql+psycopg://h/d?password=***&sslpassword=***&user=u"
    assert plain_url(url).count(SECRET) == 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", f"storage: '' is no database URL; {USE}"),
        ("studies.db", f"storage: 'studies.db' is no database URL; {USE}"),
        (f"u:{SECRET}@h/d", f"storage: 'u:***@h/d' is no database URL; {USE}"),
        (f"postgresql:u:{SECRET}@h/d", f"storage: 'postgresql:u:***@h/d' is no database URL; {USE}"),
        (f"postgresql://u:{SECRET}@h:port/d", f"storage: 'postgresql://u:***@h:port/d' is no database URL; {USE}"),
        (f"host=h password={SECRET} user=u", f"storage: 'host=h password=*** user=u' is no database URL; {USE}"),
        (
            f"host=h PGPASSWORD = '{SECRET} x'",
            f'storage: "host=h PGPASSWORD = ***" is no database URL; {USE}'.replace('"', "'"),
        ),
        (f"postgresql://u:a@{SECRET}@h/d", "storage: the password holds an @, which ends it; write it as %40"),
        (
            f"mysql://u:{SECRET}@h/d",
            "storage: 'mysql' is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE",
        ),
        ("sqlite://", "storage: a SQLite database in memory cannot be shared by workers; use sqlite:///studies.db"),
        (
            "sqlite:///:memory:",
            "storage: a SQLite database in memory cannot be shared by workers; use sqlite:///studies.db",
        ),
        (
            "sqlite:////x.db?mode=ro",
            "storage: 'sqlite:////x.db?mode=ro' names more than a file; use sqlite:///FILE",
        ),
        ("sqlite:////x\0.db", "storage: 'sqlite:////x%00.db' names more than a file; use sqlite:///FILE"),
    ],
)
def test_what_is_no_storage_is_refused(url: str, message: str) -> None:
    assert fault(url) == message


@pytest.mark.parametrize("query", ["", "?connect_timeout=2"])
@pytest.mark.parametrize("create", [True, False])
def test_an_unreachable_postgres_is_told_without_the_password(query: str, create: bool) -> None:
    told = fault(f"postgresql://u:{SECRET}@127.0.0.1:1/d{query}", create=create)
    assert told.startswith(f"storage postgresql+psycopg://u:***@127.0.0.1:1/d{query}: ")
    assert "Connection refused" in told
    assert "\n" not in told
    assert "sqlalche.me" not in told


def test_an_unknown_host_is_told_without_the_password() -> None:
    assert "nosuchhost.invalid" in fault(f"postgresql://u:{SECRET}@nosuchhost.invalid/d")


def test_a_missing_postgres_database_is_told(postgres_url: str) -> None:
    told = fault(plain_url(parse_url(postgres_url).set(database="not_there", password=SECRET)))
    assert told.endswith('database "not_there" does not exist')


def test_nothing_is_made_where_nothing_may_be_made(tmp_path: Path) -> None:
    there = f"storage sqlite:///{tmp_path}"
    assert fault(f"sqlite:///{tmp_path}/x.db", create=False) == (
        f"{there}/x.db: no such file; `hpo run` makes it, or name another with --storage"
    )
    assert fault(f"sqlite:///{tmp_path}/no/x.db") == f"{there}/no/x.db: there is no folder {tmp_path}/no; make it first"
    (tmp_path / "empty.db").touch()
    assert fault(f"sqlite:///{tmp_path}/empty.db", create=False) == (
        f"{there}/empty.db: holds no studies; `hpo run` makes one, or name another with --storage"
    )
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {"empty.db": 0}


def test_an_empty_postgres_holds_no_studies_and_stays_empty(postgres_url: str) -> None:
    assert fault(postgres_url, create=False).endswith(
        ": holds no studies; `hpo run` makes one, or name another with --storage"
    )
    engine = sa.create_engine(postgres_url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()


def test_what_is_no_sqlite_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all " * 100)
    (tmp_path / "folder.db").mkdir()
    mend = "; is it a SQLite file that you may write?"
    assert fault(f"sqlite:///{tmp_path}/text.db").endswith(f": file is not a database{mend}")
    assert fault(f"sqlite:///{tmp_path}/folder.db").endswith(f": unable to open database file{mend}")


@pytest.mark.parametrize("create", [True, False])
def test_a_locked_sqlite_is_told_soon(create: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.storage.connect.PROBE_SECONDS", 0.05)
    url = f"sqlite:///{tmp_path}/studies.db"
    connect(url, create=True).close()
    holder = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    assert fault(url, create=create) == (
        f"storage {url}: database is locked for 0 s; another program holds it: end that one and try again"
    )
    holder.execute("ROLLBACK")
    holder.close()
    connect(url).close()


def test_sqlite_writes_ahead_waits_and_locks_when_a_transaction_begins(tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    with place.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "busy_timeout": 10_000, "synchronous": 1}
    other = sqlite3.connect(tmp_path / "studies.db", timeout=0.01, isolation_level=None)
    with sql.writing(place.engine), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")  # free again
    other.close()
    assert place.is_sqlite
    place.close()


def test_postgres_gets_a_small_pool(postgres_url: str) -> None:
    place = connect(postgres_url, create=True)
    pool = place.engine.pool
    assert isinstance(pool, sa.pool.QueuePool)
    assert (pool.size(), pool._max_overflow, pool._recycle) == (2, 1, 1800)
    assert not place.is_sqlite
    place.close()


def test_an_idle_connection_to_postgres_is_pinged(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to Postgres that was idle is pinged and replaced if it broke."""
    place, other = (connect(postgres_url, create=True) for _ in range(2))
    mine = sa.text("SELECT pg_backend_pid()")

    def cut() -> int:
        with place.engine.connect() as connection:
            pid = int(connection.execute(mine).scalar_one())
        with other.engine.connect() as connection:
            connection.execute(sa.text(f"SELECT pg_terminate_backend({pid})"))
        return pid

    before = cut()
    monkeypatch.setattr(engine, "PING_AFTER_SECONDS", 0.0)
    with place.engine.connect() as connection:
        assert connection.execute(mine).scalar_one() != before
    monkeypatch.setattr(engine, "PING_AFTER_SECONDS", 60.0)
    place.optuna.get_all_studies()
    for _ in range(2):  # as many as the pool has
        cut()
    assert place.optuna.get_all_studies() == []  # just used, so not pinged: what reads is read again
    place.close()
    other.close()


def test_writing_keeps_what_went_well_and_drops_what_did_not(place: Storage) -> None:
    with sql.writing(place.engine) as connection:
        connection.execute(sa.text("CREATE TABLE kept (x INTEGER)"))
        connection.execute(sa.text("INSERT INTO kept VALUES (1)"))

    def fail_half_way() -> None:
        with sql.writing(place.engine) as connection:
            connection.execute(sa.text("INSERT INTO kept VALUES (2)"))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_half_way()
    with place.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT x FROM kept")).scalars().all() == [1]


def test_the_database_s_clock(place: Storage) -> None:
    """The database's clock counts seconds since 1970 and never runs back."""
    with place.engine.connect() as connection:
        first, second = (connection.execute(sa.select(sql.now(connection))).scalar_one() for _ in range(2))
    assert 1.7e9 < first <= second < 5e9


def test_one_engine_serves_optuna_and_us(url: str) -> None:
    """One engine serves Optuna and us and a second opening finds the same."""
    import optuna

    place = connect(url, create=True)
    optuna.create_study(storage=place.optuna, study_name="here")
    again = connect(url)
    with again.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT study_name FROM studies")).scalars().all() == ["here"]
    place.close()
    again.close()


# --- network file systems -------------------------------------------------------------------------------------------


def mount(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str) -> None:
    """Let the system say that a folder is a mount of this kind."""
    mounts = psutil.disk_partitions(all=True)
    mounts.append(mounts[0]._replace(mountpoint=str(folder), fstype=kind))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs"])
@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
@pytest.mark.parametrize("create", [True, False])
def test_sqlite_is_refused_on_a_network_file_system(
    kind: str, there: bool, create: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    if there:
        connect(url, create=True).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    mount(monkeypatch, tmp_path, kind)
    assert fault(url, create=create) == (
        f"storage {url}: lies on a network file system ({kind}), on which SQLite loses data; "
        "use a local disk, or Postgres for workers on several machines"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_to_a_network_file_system_is_refused_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "share")
    mount(monkeypatch, tmp_path / "share", "nfs4")
    assert "lies on a network file system (nfs4)" in fault(f"sqlite:///{tmp_path}/here/studies.db")
    connect(f"sqlite:///{tmp_path}/studies.db", create=True).close()


def test_sqlite_is_taken_where_the_file_system_is_local_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("xfs", "tmpfs", "overlay"):
        mount(monkeypatch, tmp_path, kind)
        connect(f"sqlite:///{tmp_path}/{kind}.db", create=True).close()
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [])
    connect(f"sqlite:///{tmp_path}/unknown.db", create=True).close()


def test_postgres_does_not_care_where_the_command_runs(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mount(monkeypatch, tmp_path, "nfs4")
    connect(postgres_url, create=True).close()


# --- connections ----------------------------------------------------------------------------------------------------

REFUSAL = (
    r"storage .*: (\d+) workers and this process take up to (\d+) connections, 2 each; Postgres has (\d+) left "
    r"\(max_connections (\d+), (\d+) reserved, (\d+) in use by others\): start at most (\d+) workers, or raise max_connections"
)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres with room for twelve connections."""
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    with PostgresServer(folder, max_connections=12) as running:
        yield running


def too_many(place: Storage, workers: int) -> list[int]:
    """Return the numbers of the refusal: workers, needed, left, limit, reserved, used, advised."""
    with pytest.raises(StorageError) as caught:
        check_connections(place, workers)
    match = re.fullmatch(REFUSAL, str(caught.value))
    assert match, str(caught.value)
    return [int(number) for number in match.groups()]


def test_more_workers_than_postgres_has_connections_for_are_refused_with_the_numbers(server: PostgresServer) -> None:
    place = connect(server.url, create=True)
    workers, needed, left, limit, reserved, used, advised = too_many(place, 100)
    assert (workers, needed, limit, reserved) == (100, 202, 15, 3)
    assert left == limit - reserved - used
    assert used == 0  # its own connections are what it asks for
    assert advised == left // 2 - 1
    check_connections(place, advised)
    assert too_many(place, advised + 1)[0] == advised + 1
    place.close()


def test_connections_of_others_are_counted(server: PostgresServer) -> None:
    place = connect(server.url, create=True)
    free = too_many(place, 100)
    database = server.database("another")
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(psycopg.connect(database.replace("+psycopg", "")))
        taken = too_many(place, 100)
    assert (taken[2], taken[5], taken[6]) == (free[2] - 4, free[5] + 4, free[6] - 2)
    place.close()


def test_where_there_is_hardly_a_connection_no_worker_is_advised(server: PostgresServer) -> None:
    place = connect(server.url, create=True)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(psycopg.connect(server.url.replace("+psycopg", "")))
        assert too_many(place, 1)[6] == 0
    place.close()


def test_a_handful_of_workers_passes(place: Storage) -> None:
    check_connections(place, 8)


def test_sqlite_has_no_connections_to_run_out_of(tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    check_connections(place, 100_000)
    place.close()


def test_a_postgres_without_a_connection_left_is_busy_and_not_broken(server: PostgresServer) -> None:
    connect(server.url, create=True).close()
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(psycopg.connect(server.url.replace("+psycopg", "")))
        for create in (True, False):
            with pytest.raises(StorageBusy) as caught:
                connect(server.url, create=create)
            assert str(caught.value).startswith(f"storage {server.url}: ")
            assert "connection slots are reserved" in str(caught.value)
            assert "\n" not in str(caught.value)
    connect(server.url).close()


def test_a_locked_sqlite_is_busy_and_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.storage.connect.PROBE_SECONDS", 0.05)
    url = f"sqlite:///{tmp_path}/studies.db"
    place = connect(url, create=True)
    with sql.writing(place.engine), pytest.raises(StorageBusy):
        connect(url)
    place.close()


def test_what_does_not_pass_by_itself_is_not_busy(tmp_path: Path, postgres_url: str) -> None:
    (tmp_path / "text.db").write_text("no database at all " * 100)
    missing = plain_url(parse_url(postgres_url).set(database="not_there"))
    for url in (f"sqlite:///{tmp_path}/text.db", missing, "postgresql://u@127.0.0.1:1/d"):
        with pytest.raises(StorageError) as caught:
            connect(url)
        assert not isinstance(caught.value, StorageBusy)


def test_a_transaction_sees_what_was_committed_before_each_statement(postgres_url: str) -> None:
    """So a claim counts as of the time at which it has the lock, whatever the database's default is."""
    made = connect(postgres_url, create=True)
    with made.engine.connect() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'")
        connection.commit()
    made.close()
    place = connect(postgres_url)
    for _ in range(2):
        with sql.writing(place.engine) as connection:
            assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "read committed"
            shown = connection.exec_driver_sql("SHOW default_transaction_isolation").scalar_one()
            assert shown == "repeatable read"
        with sql.writing_once(place.engine) as connection:  # which has no transaction
            connection.exec_driver_sql("SELECT 1")
    place.close()
