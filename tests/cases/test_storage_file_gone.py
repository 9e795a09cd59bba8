"""A SQLite file that is removed, moved or replaced while it is open: a clear error, and what came in its place is left alone."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.errors import StorageGone
from hpo.launch.local import Fleet
from hpo.storage import sql, sqlite_file
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import studies
from hpo.view import dashboard
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.integration.shell import Shell
from tests.support.trials import make
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the log beside the file at each use."""
    monkeypatch.setattr(sqlite_file, "LOOK_SECONDS", 0.0)


@pytest.fixture
def file(lite: Storage) -> Path:
    """The file of a storage in which something was written that stands in its log alone."""
    write(lite, "before")
    return Path(lite.url.database or "")


def write(place: Storage, name: str) -> None:
    with sql.writing(place.engine) as connection:
        connection.execute(studies.insert().values(study_name=name))


def names(file: Path) -> list[str]:
    """Return the studies in a file, as another program reads them, which takes its log into it as it ends."""
    connection = sqlite3.connect(file)
    found = [name for (name,) in connection.execute("SELECT study_name FROM studies ORDER BY study_id")]
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    return found


def another(folder: Path) -> Path:
    """Make a database of somebody else's, larger than ours."""
    made = folder / "another.db"
    connection = sqlite3.connect(made)
    connection.execute("CREATE TABLE studies (study_id INTEGER PRIMARY KEY, study_name TEXT)")
    connection.executemany("INSERT INTO studies (study_name) VALUES (?)", [(f"theirs {n:0500}",) for n in range(999)])
    connection.commit()
    connection.close()
    return made


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()


def move(file: Path) -> None:
    file.rename(file.with_name("moved.db"))


def remove_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


def replace(file: Path) -> None:
    os.replace(another(file.parent), file)


def replace_by_a_copy_of_itself(file: Path) -> None:
    shutil.copy(file, file.with_name("copy.db"))
    os.replace(file.with_name("copy.db"), file)


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


REMOVED, REPLACED = "was removed or moved away while hpo had it open", "was replaced by another while hpo had it open"


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (remove, REMOVED),
        (remove_all, REMOVED),
        (move, REMOVED),
        (remove_folder, REMOVED),
        (replace, REPLACED),
        (replace_by_a_copy_of_itself, REPLACED),
        (replace_by_a_folder, REPLACED),
    ],
)
def test_no_statement_reaches_a_file_that_is_gone(
    act: Callable[[Path], None], said: str, lite: Storage, file: Path
) -> None:
    act(file)
    was = file.stat() if file.exists() else None
    for _ in range(2):  # the second time over a connection that would have to be made anew
        with pytest.raises(StorageGone, match=said):
            write(lite, "after")
        with pytest.raises(StorageGone, match=said):
            lite.optuna.get_all_studies()
    lite.close()
    assert (file.stat() if file.exists() else None) == was  # no empty file was made there, and none was written to


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "closed unnoticed"])
def test_a_file_put_in_its_place_stays_as_it_is(is_noticed: bool, lite: Storage, file: Path) -> None:
    new = another(file.parent)
    content = new.read_bytes()
    os.replace(new, file)
    if is_noticed:
        with pytest.raises(StorageGone):
            write(lite, "after")
        assert Path(f"{file}-wal").stat().st_size == 0  # what is found by the new file's name
    else:
        remove_companions(file)
    lite.close()
    assert file.read_bytes() == content
    assert len(names(file)) == 999
    assert file.read_bytes() == content


def remove_companions(file: Path) -> None:
    for companion in sqlite_file.COMPANIONS:
        Path(f"{file}{companion}").unlink()


def test_a_file_that_was_moved_away_holds_all_that_was_written(lite: Storage, file: Path) -> None:
    move(file)
    with pytest.raises(StorageGone):
        lite.check()
    lite.close()
    assert names(file.with_name("moved.db")) == ["before"]


def test_a_file_that_is_back_before_anybody_looked_is_gone_on_with(lite: Storage, file: Path) -> None:
    move(file)
    file.with_name("moved.db").rename(file)
    write(lite, "after")
    lite.close()
    assert names(file) == ["before", "after"]


def test_who_has_seen_it_gone_does_not_go_on_when_it_is_back(lite: Storage, file: Path) -> None:
    move(file)
    with pytest.raises(StorageGone):
        lite.check()
    file.with_name("moved.db").rename(file)
    with pytest.raises(StorageGone):
        lite.check()
    with connect(f"sqlite:///{file}").engine.connect() as connection:  # but another process does
        assert connection.execute(sa.select(studies.c.study_name)).scalars().all() == ["before"]


@pytest.mark.parametrize("is_link", [False, True], ids=["file", "link"])
@pytest.mark.parametrize("companion", sqlite_file.COMPANIONS)
def test_a_log_that_was_removed_is_as_bad_and_costs_nothing(
    companion: str, is_link: bool, lite: Storage, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = lite
    if is_link:  # SQLite keeps its log beside what the link leads to
        (link := tmp_path_factory.mktemp("links") / "link.db").symlink_to(file)
        place = connect(f"sqlite:///{link}")
    place.check()
    Path(f"{file}{companion}").unlink()
    with pytest.raises(StorageGone, match=f"{file}{companion}, where SQLite keeps what it wrote last, was removed"):
        write(place, "after")
    place.close()
    lite.close()
    assert names(file) == ["before"]


def test_a_link_that_leads_elsewhere_is_another_file(template: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(shutil.copy(template, tmp_path / "one.db"))
    place = connect(f"sqlite:///{link}")
    link.unlink()
    link.symlink_to(shutil.copy(template, tmp_path / "two.db"))
    with pytest.raises(StorageGone, match=REPLACED):
        place.check()
    place.close()


def test_a_folder_that_may_not_be_looked_into_says_nothing(lite: Storage, file: Path) -> None:
    """A file whose folder is closed to us may be where it was: what is open goes on."""
    looped = file.with_name("loop.db")
    looped.symlink_to(looped)  # as root may look everywhere: another error than "not there"
    assert not sqlite_file._is_gone(str(looped), (1, 2))


def test_a_worker_does_not_join_a_file_that_came_meanwhile(
    lite: Storage, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the start of a run and that of a worker, or a fresh start of it, the file may be replaced."""
    study = make(lite, tmp_path)
    fleet = Fleet(study, 1, code_folder=tmp_path)
    handed_on = fleet._environment(fleet.slots[0])
    assert handed_on["HPO_STORAGE"] == f"sqlite:///{lite.url.database}"
    monkeypatch.setenv(sqlite_file.HANDED_ON, handed_on[sqlite_file.HANDED_ON])
    connect(handed_on["HPO_STORAGE"]).close()
    os.replace(shutil.copy(template, tmp_path / "new.db"), lite.url.database or "")
    with pytest.raises(StorageGone, match=REPLACED):
        connect(handed_on["HPO_STORAGE"])
    os.unlink(lite.url.database or "")
    with pytest.raises(StorageGone, match=REMOVED):
        connect(handed_on["HPO_STORAGE"], create=True)
    other = shutil.copy(template, tmp_path / "other.db")
    connect(f"sqlite:///{other}").close()  # another storage is none of its affair


@pytest.mark.parametrize("foreign", ["{}", "one:two:{}", ":{}", "1:{}"])
def test_a_foreign_value_of_our_variable_is_passed_over(
    foreign: str, lite: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sqlite_file.HANDED_ON, foreign.format(lite.url.database))
    connect(f"sqlite:///{lite.url.database}").close()


@pytest.mark.parametrize("swallows", [True, False])
def test_a_worker_stops_whatever_its_objective_does_with_errors(swallows: bool, lite: Storage, tmp_path: Path) -> None:
    study = make(lite, tmp_path)
    begun = []

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        replace(Path(lite.url.database or ""))
        for step in range(1, 100):
            try:
                trial.report(1.0, step)
            except Exception:
                if not swallows:
                    raise
        return 1.0

    with pytest.raises(StorageGone, match=REPLACED):
        worker_loop.work(study, objective, study.ledger("w"), StopSignal())
    lite.close()
    assert begun == [0]
    assert len(names(Path(lite.url.database or ""))) == 999


def test_a_worker_is_asked_to_leave_by_its_heartbeat(lite: Storage, tmp_path: Path, fast_ticks: None) -> None:
    """An objective that never reports learns nothing: the process is asked to leave, which ends it after its grace."""
    study, stopping = make(lite, tmp_path), StopSignal()

    def objective(trial: LeasedTrial) -> float:
        remove(Path(lite.url.database or ""))
        wait_for(lambda: stopping())
        return 1.0

    with pytest.raises(StorageGone, match=REMOVED):
        worker_loop.work(study, objective, study.ledger("w"), stopping)


REPLACING = """
import os, time
def objective(trial):
    trial.report(1.0, 1)
    if trial.number == 2:
        os.replace("another.db", "studies.db")
    time.sleep(0.1)
    return 1.0
"""


def test_a_run_ends_with_an_error_and_leaves_the_new_file_alone(tmp_path: Path) -> None:
    shell = Shell(tmp_path, f"sqlite:///{tmp_path}/studies.db")
    shell.write(REPLACING, trials=500)
    content = another(tmp_path).read_bytes()
    said = shell.forked("run", "own.toml", "--workers", "2", code=2)
    assert f"error: storage sqlite:///{tmp_path}/studies.db: the file {REPLACED}; the new one was left as it is" in said
    assert "winner" not in said
    assert (tmp_path / "studies.db").read_bytes() == content
    assert len(names(tmp_path / "studies.db")) == 999
    assert (tmp_path / "studies.db").read_bytes() == content


def test_a_dashboard_ends_without_waiting_for_a_request(lite: Storage, file: Path) -> None:
    later = threading.Timer(0.2, lambda: replace(file))
    later.start()
    with pytest.raises(StorageGone, match=REPLACED):
        dashboard.serve(lite, port=0)
