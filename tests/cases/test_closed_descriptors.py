"""User code that closes descriptors which are not its own costs its trial, and nothing else is written to or waited for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.launch.slots import last_words
from hpo.storage import descriptors, sqlite_file
from hpo.storage.connect import connect
from tests.cases.test_exit_codes import run_fleet
from tests.integration.processes import failures
from tests.support.trials import MakeStudy

CLOSING = """
import os, pathlib, sys, time
WORDS = [".db", "socket:"]  # of SQLite; of Postgres

def database():
    for name in os.listdir("/proc/self/fd"):
        try:
            if any(word in os.readlink(f"/proc/self/fd/{name}") for word in WORDS):
                os.close(int(name))
        except OSError:
            pass

def objective(trial):
    if trial.number == 1:
        HOW
        own = [open(pathlib.Path(__file__).with_name(f"own-{number}"), "w+") for number in range(20)]  # of the same numbers
        for step in range(1, 4):
            trial.report(1.0, step)
            time.sleep(0.02)
        for file in own:
            assert file.read() == ""
    return 1.0
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("os.closerange(3, 1024)", id="all"),
        pytest.param("database()", id="the database's", marks=pytest.mark.soak),
        pytest.param("WORDS = ['.db-wal', 'socket:']; database()", id="one of these", marks=pytest.mark.soak),
    ],
)
def test_the_database_s_descriptors(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The worker ends at its next use of the database, before anything is written to what has those numbers now."""
    monkeypatch.setattr("hpo.launch.slots.RESTART_SECONDS", 0.01)
    study = make_study(trials=3, failures={"lost_worker": {"retries": 0}})
    text = CLOSING.replace("HOW", f"global WORDS; {how}")
    fleet = run_fleet(study, text)
    assert fleet.failed == [], last_words(fleet.failed)
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert [(row.number, row.kind, row.verdict) for row in failures(study)] == [(1, "lost_worker", "fail")]
    assert [path.read_text() for path in study.code_folder.glob("own-*")] == [""] * 20
    assert "closed descriptors that are not its own" in fleet.slots[0].log.read_text()


@pytest.mark.parametrize("ending", ["", *sqlite_file.COMPANIONS])
def test_a_descriptor_of_a_database_behind_a_link(ending: str, template: Path, tmp_path: Path) -> None:
    """SQLite keeps its log beside what the link leads to."""
    (folder := tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "link.db").symlink_to(shutil.copy(template, folder / "file.db"))
    place = connect(f"sqlite:///{link}")
    descriptors.watch(place.engine, lambda: pytest.fail("lost"))
    place.check()
    (number,) = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(path := f"/proc/self/fd/{name}") and os.readlink(path) == f"{folder}/file.db{ending}"
    ]
    kept = os.dup(number)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), number)
    with pytest.raises(pytest.fail.Exception, match="lost"):
        place.check()
    os.dup2(kept, number)
    os.close(kept)
    place.close()


STANDARD = """
import os, sys
WAYS = [sys.stdout.close, lambda: os.close(1), sys.stderr.close, lambda: os.closerange(0, 3)]
def objective(trial):
    WAYS[trial.number]()
    trial.report(1.0, 1)
    return 1.0
"""


def test_the_standard_ones(make_study: MakeStudy) -> None:
    """A log that cannot be written any more keeps nobody."""
    study = make_study(trials=4)
    fleet = run_fleet(study, STANDARD)
    assert fleet.slots[0].exit_codes == [0], last_words(fleet.slots)
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE] * 4
