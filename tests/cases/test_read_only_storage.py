"""A SQLite database that may only be read, and one that belongs to another program."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy import func, select

from hpo.storage.connect import connect
from hpo.storage.tables import DISPENSABLE_TO_READERS, trials
from tests.cli.test_commands import OWN, Hpo, hpo, make_study, refused

__all__ = ["hpo"]
NOBODY = 65534


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may write whatever a file's mode says. Another user may not read root's Python: modules are loaded before."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, hpo: Hpo) -> Iterator[Path]:
    """The current folder, which any user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        found = Path(made)
        (found / "out").mkdir()
        for path, mode in ((found, 0o755), (found / "out", 0o777)):
            path.chmod(mode)
        monkeypatch.chdir(found)
        for command in ("status", "doctor", "export", "pause"):
            hpo(command, "own")
        yield found
        found.chmod(0o755)


def close(folder: Path) -> None:
    """Take the right to write from the database and its folder."""
    for path in folder.glob("studies.db*"):
        path.chmod(0o444)
    folder.chmod(0o555)


def add_trial(folder: Path) -> None:
    place = connect(f"sqlite:///{folder}/studies.db")
    optuna.load_study(study_name="own", storage=place.optuna).add_trial(optuna.trial.create_trial(value=0.5))
    place.close()


def drop(folder: Path, *columns: sa.Column[Any]) -> None:
    """Take columns from the database, which an earlier hpo did not know."""
    connection = sqlite3.connect(folder / "studies.db")
    for column in columns:
        connection.execute(f"ALTER TABLE {column.table.name} DROP COLUMN {column.name}")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the file is written when the last reader closes it
    connection.close()


def finished(said: str) -> str:
    return said.splitlines()[1].split()[1]


@pytest.mark.parametrize("kind", ["hpo", "an hpo of before", "optuna"])
def test_commands_that_read_need_no_right_to_write(kind: str, hpo: Hpo, folder: Path) -> None:
    if "hpo" in kind:
        make_study(folder).storage.close()
    else:
        optuna.create_study(storage=f"sqlite:///{folder}/studies.db", study_name="own")
    add_trial(folder)
    reading = (
        ["status", "own"],
        ["status", "own", "--trial", "0"],
        ["doctor"],
        ["export", "own", "-o", "out/best.toml"],
    )
    told = [hpo(*command) for command in reading]
    assert [(code, err) for code, _, err in told] == [(0, "")] * 4
    assert finished(told[0][1]) == "1"
    (folder / "out" / "best.toml").unlink()  # or the second export says that it replaced the file
    if kind == "an hpo of before":
        drop(folder, *DISPENSABLE_TO_READERS)
    before = (folder / "studies.db").read_bytes()
    close(folder)
    with as_another_user():
        assert [hpo(*command) for command in reading] == told
        code, _, err = hpo("pause", "own")
        mend = "is it a SQLite file that you may write?" if "hpo" in kind else "was made by Optuna, not by hpo"
        assert code == 2
        assert mend in err
    assert (folder / "studies.db").read_bytes() == before


def test_what_a_living_writer_has_only_in_its_log_is_read(hpo: Hpo, folder: Path) -> None:
    study = make_study(folder)
    with study.storage.engine.connect():
        add_trial(folder)
        close(folder)
        with as_another_user():
            code, said, err = hpo("status", "own")
    assert (code, finished(said), err) == (0, "1", "")


def test_a_log_that_cannot_be_read_is_told(hpo: Hpo, folder: Path) -> None:
    study = make_study(folder)
    with study.storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        add_trial(folder)
        copy = folder / "copy"
        copy.mkdir()
        for ending in ("", "-wal"):
            shutil.copy(folder / f"studies.db{ending}", copy)
    close(copy)
    with as_another_user():
        code, said, err = hpo("status", "own", "--storage", f"sqlite:///{copy}/studies.db")
    copy.chmod(0o755)
    assert (code, finished(said)) == (0, "0")
    assert err == (
        f"note: {copy}/studies.db-wal may hold the last changes and is not read, since SQLite cannot write beside it; "
        "copy both files into a folder of your own to see all\n"
    )


def test_a_file_that_may_not_be_read_is_told(hpo: Hpo, folder: Path) -> None:
    make_study(folder).storage.close()
    (folder / "studies.db").chmod(0)
    with as_another_user():
        code, _, err = hpo("status", "own")
    assert code == 2
    assert err.endswith("studies.db: unable to open database file; is it a SQLite file that you may read?\n")


def test_who_goes_on_reading_sees_what_is_written_later(folder: Path) -> None:
    make_study(folder).storage.close()
    (folder / "studies.db").chmod(0o444)
    with as_another_user():
        place = connect(f"sqlite:///{folder}/studies.db", only_reads=True)

        def count() -> int:
            with place.engine.connect() as connection:
                return connection.execute(select(func.count()).select_from(trials)).scalar_one()

        assert place.file is not None
        assert (place.file.is_read_only, count()) == (True, 0)
    for expected in (1, 2):
        add_trial(folder)
        with as_another_user():
            assert count() == expected
    place.close()


@pytest.mark.parametrize("table", ["customers(name)", "studies(title)", "alembic_version(version_num), x(y)"])
def test_the_database_of_another_program_is_left_alone(table: str, hpo: Hpo, folder: Path) -> None:
    connection = sqlite3.connect(folder / "studies.db")
    for one in table.split(", "):
        connection.execute(f"CREATE TABLE {one}")
    connection.close()
    (folder / "own.toml").write_text(OWN)
    (folder / "mine.py").write_text("def objective(trial): return 0.0\n")
    names = ", ".join(one.partition("(")[0] for one in table.split(", "))
    for command in (["run", "own.toml", "--workers", "0"], ["status"], ["doctor"]):
        assert refused(hpo, folder, *command) == (
            f"storage sqlite:///{folder}/studies.db: is the SQLite file of another program, with the tables {names}; "
            "name another file with --storage"
        )


def test_a_file_that_optuna_shares_with_another_program_is_used(hpo: Hpo, folder: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{folder}/studies.db", study_name="theirs")
    connection = sqlite3.connect(folder / "studies.db")
    connection.execute("CREATE TABLE customers(name)")
    connection.close()
    make_study(folder).storage.close()
    assert [line.split()[0] for line in hpo("status")[1].splitlines()] == ["STUDY", "theirs", "own"]
