"""A storage URL becomes one engine with the right settings, or a message without the password."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo import storage
from hpo.errors import StorageError

SECRET = "hunter2"
USE = "use sqlite:///studies.db or postgresql://USER@HOST/DATABASE"


def fault(url: str, *, create: bool = True) -> str:
    with pytest.raises(StorageError) as caught:
        storage.connect(url, create=create)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # a printed chain would hold the driver's words, and with them the URL
    return str(caught.value)


def test_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("sqlite:///studies.db", "sqlite+pysqlite:///studies.db", f"sqlite:///{tmp_path}/studies.db"):
        assert storage.plain(storage.parse(text)) == f"sqlite:///{tmp_path}/studies.db"


def test_postgres_always_gets_psycopg_3() -> None:
    for scheme in ("postgresql", "postgresql+psycopg2", "postgresql+psycopg"):
        url = storage.parse(f"{scheme}://u:{SECRET}@h:5/d")
        assert storage.plain(url) == f"postgresql+psycopg://u:{SECRET}@h:5/d"
        assert storage.redacted(url) == "postgresql+psycopg://u:***@h:5/d"


def test_a_password_in_the_query_is_not_shown_either() -> None:
    url = storage.parse(f"postgresql://h/d?password={SECRET}&user=u&sslpassword={SECRET}")
    assert storage.redacted(url) == "postgresql+psycopg://h/d?password=***&sslpassword=***&user=u"
    assert storage.plain(url).count(SECRET) == 2


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
            "storage: 'sqlite:////x.db?mode=ro' has more to it than a file; use sqlite:///FILE",
        ),
        ("sqlite:////x\0.db", "storage: 'sqlite:////x%00.db' has more to it than a file; use sqlite:///FILE"),
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
    told = fault(storage.plain(storage.parse(postgres_url).set(database="not_there", password=SECRET)))
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
    monkeypatch.setattr(storage, "PROBE_SECONDS", 0.05)
    url = f"sqlite:///{tmp_path}/studies.db"
    storage.connect(url, create=True).close()
    holder = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    assert fault(url, create=create) == (
        f"storage {url}: database is locked for 0 s; another program holds it: end that one and try again"
    )
    holder.execute("ROLLBACK")
    holder.close()
    storage.connect(url).close()


def test_sqlite_writes_ahead_waits_and_locks_when_a_transaction_begins(tmp_path: Path) -> None:
    place = storage.connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    with place.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "busy_timeout": 10_000, "synchronous": 1}
    other = sqlite3.connect(tmp_path / "studies.db", timeout=0.01, isolation_level=None)
    with storage.writing(place.engine), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")  # free again
    other.close()
    assert place.is_sqlite
    place.close()


def test_postgres_gets_a_small_pool_that_is_pinged(postgres_url: str) -> None:
    place = storage.connect(postgres_url, create=True)
    pool = place.engine.pool
    assert isinstance(pool, sa.pool.QueuePool)
    assert (pool.size(), pool._max_overflow, pool._pre_ping, pool._recycle) == (2, 0, True, 1800)
    assert not place.is_sqlite
    place.close()


def test_writing_keeps_what_went_well_and_drops_what_did_not(place: storage.Storage) -> None:
    with storage.writing(place.engine) as connection:
        connection.execute(sa.text("CREATE TABLE kept (x INTEGER)"))
        connection.execute(sa.text("INSERT INTO kept VALUES (1)"))

    def fail_half_way() -> None:
        with storage.writing(place.engine) as connection:
            connection.execute(sa.text("INSERT INTO kept VALUES (2)"))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_half_way()
    with place.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT x FROM kept")).scalars().all() == [1]


def test_the_databases_clock_counts_seconds_since_1970_and_never_runs_back(place: storage.Storage) -> None:
    with place.engine.connect() as connection:
        first, second = (connection.execute(sa.select(storage.now(connection))).scalar_one() for _ in range(2))
    assert 1.7e9 < first <= second < 5e9


def test_one_engine_serves_optuna_and_us_and_a_second_opening_finds_the_same(url: str) -> None:
    import optuna

    place = storage.connect(url, create=True)
    optuna.create_study(storage=place.optuna, study_name="here")
    again = storage.connect(url)
    with again.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT study_name FROM studies")).scalars().all() == ["here"]
    place.close()
    again.close()
