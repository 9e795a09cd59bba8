"""What commit ec5e555 left goes on: its studies are read, joined and ended, its exported file is trained again.

See fixtures/ec5e555/README.md. Only commands, tables and files are looked at, for those are what must stay.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from tests.support.old_files import FIXTURES, Home, machine, put_down, put_down_postgres, told_of

ENDS = json.loads((FIXTURES / "ends.json").read_text())
IS_SAME_MACHINE = machine() == ENDS["machine"]
#: Elsewhere sums are rounded in another way, which AdamW blows up; a validation image more or less is 0.004.
TOLERANCE = 0.03
DIFFERENCE = re.compile(r"^epoch \d+ \w+: trial (\S+), replay (\S+)$", re.MULTILINE)
COLUMNS = """
    SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default
    FROM information_schema.columns WHERE table_name LIKE 'hpo_%' ORDER BY table_name, column_name
"""
SQLITE_COLUMNS = """
    SELECT m.name AS table_name, c.name AS column_name, c.type, c."notnull", c.dflt_value, c.pk
    FROM sqlite_master m JOIN pragma_table_info(m.name) c
    WHERE m.type = 'table' AND m.name LIKE 'hpo_%' ORDER BY table_name, column_name
"""
#: Columns that were added since. Of schema 2: leases and workers on SQLite name the clock that they go by, and a study its
#: schema. Later: who opened a test split.
ADDED = {
    ("hpo_studies", "orders"),
    ("hpo_studies", "schema"),
    ("hpo_trials", "lease_clock"),
    ("hpo_test_openings", "opened_by"),
    ("hpo_test_openings", "trainings"),
    ("hpo_test_openings", "trials_tried"),
    ("hpo_workers", "booted_at"),
    ("hpo_workers", "clock"),
    ("hpo_workers", "gpus"),
    ("hpo_workers", "launch"),
    ("hpo_workers", "slot"),
}
ADDED_TABLES = {"hpo_launches"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return put_down(tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    if request.param == "sqlite":
        return put_down(tmp_path)
    return put_down_postgres(tmp_path, request.getfixturevalue("postgres_url"))


def held_to(found: Any, wanted: Any) -> Any:
    """Return what was found, however nested, with the numbers wanted in the place of those that are near enough to them."""
    if isinstance(wanted, dict):
        return {key: held_to(value, wanted.get(key)) for key, value in found.items()}
    if isinstance(wanted, list) and len(found) == len(wanted):
        return [held_to(one, other) for one, other in zip(found, wanted, strict=True)]
    return wanted if isinstance(wanted, float) and is_near(found, wanted) else found


def is_near(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def of_then(found: Any, wanted: Any) -> Any:
    """Return what is found of JSON without the keys that were added since."""
    if isinstance(wanted, dict):
        return {key: of_then(found[key], wanted[key]) for key in wanted}
    if isinstance(wanted, list) and len(found) == len(wanted):
        return [of_then(one, other) for one, other in zip(found, wanted, strict=True)]
    return found


def keys(state: Any, at: str = "") -> set[str]:
    """Return the path of every value of a checkpoint, with its type."""
    if isinstance(state, dict | list) and state:
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path for key, child in items for path in keys(child, f"{at}/{key}")}
    return {f"{at}: {type(state).__name__}"}


def columns(home: Home) -> list[dict[str, Any]]:
    return home.rows(SQLITE_COLUMNS if home.is_sqlite else COLUMNS)


def without_added(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return descriptions of columns but for those that were added, all of which must be there."""
    assert {(row["table_name"], row["column_name"]) for row in found} >= ADDED
    assert {row["table_name"] for row in found} >= ADDED_TABLES
    is_old = [row for row in found if row["table_name"] not in ADDED_TABLES]
    return [row for row in is_old if (row["table_name"], row["column_name"]) not in ADDED]


def only_checkpoint(folder: Path) -> set[str]:
    (file,) = folder.glob("*.pt")
    return keys(torch.load(file, weights_only=True))


def test_status(home: Home) -> None:
    """The studies stand as they did, each number of it; but that time is now that of their workers."""
    found, wanted = json.loads(home.forked("status", "--json")), json.loads((FIXTURES / "status.json").read_text())
    assert [one.pop("seconds") > 0 for one in found] == [one.pop("seconds") > 0 for one in wanted]
    assert [one["best"]["interval"] for one in found] == [None] * 3  # nobody recorded the number of validation images
    assert [of_then(one, other) for one, other in zip(found, wanted, strict=True)] == wanted
    trial = json.loads(home.forked("status", "digits", "--trial", "5", "--json"))
    wanted = json.loads(told_of(FIXTURES / "trial.json", home.folder))
    assert of_then(trial, wanted) == wanted


def test_export(home: Home) -> None:
    """The best trial's file is the same, letter by letter."""
    home.forked("export", "digits", "-o", "again.toml")
    assert (home.folder / "again.toml").read_text() == told_of(FIXTURES / "winner.toml", home.folder)


def test_replay(home: Home) -> None:
    """The exported file trains to its trial's curves, on the same machine bit for bit."""
    said = home.run("train", "winner.toml", "--replay", code=0 if IS_SAME_MACHINE else None)
    differences = DIFFERENCE.findall(said)
    assert differences or "the curves of 4 epochs equal the trial's bit for bit" in said
    assert all(is_near(float(replay), float(trial)) for trial, replay in differences)
    assert not (differences and IS_SAME_MACHINE)


def test_run(either: Home) -> None:
    """The study is joined, its parked trials go on amid their epochs, and the budget is spent: all ends as it did then."""
    spec = "SELECT s.uid, s.spec, s.fingerprint FROM hpo_studies s ORDER BY s.study_id"
    uid, specs, trained, tables = uid_of(either, "digits"), either.rows(spec), either.seconds("digits"), columns(either)
    assert [trial["attempt"] for trial in either.trials("digits")] == [1] * 7

    if either.is_sqlite:
        summary = json.loads(either.forked("run", "digits.toml", "--json").splitlines()[-1])
        assert (summary["budget"], summary["spent"], summary["parked"]) == (8, 8, [])
    else:
        either.forked("worker", "digits")

    again = either.seconds("digits")
    for number, seconds in trained.items():  # an epoch that is trained again takes another time
        assert again[number][: len(seconds)] == seconds
    assert {number: len(seconds) for number, seconds in trained.items()} == {0: 4, 1: 4, 2: 4, 3: 4, 4: 2, 5: 2}
    found, wanted = either.trials("digits"), ENDS["digits"]
    assert [trial["number"] for trial in found] == list(range(8))
    assert all(trial["settled"] for trial in found)
    if machine()["torch"] == ENDS["machine"]["torch"]:  # else torch's modules may have other attributes
        # By its partition a parked trial finds the stack that it fits in: were it another now, it would wait for its own.
        assert [trial["partition"] for trial in found[:7]] == [trial["partition"] for trial in wanted[:7]]
    if IS_SAME_MACHINE:
        assert found == wanted
    for one, other in zip(found[:7], wanted[:7], strict=True):  # the last one is drawn from what the others came to
        one["partition"] = other["partition"]
        assert held_to(one, other) == other
    for row in specs:  # joining it has added its format, by which the old code knows that it may not join any more
        if row["uid"] == uid:
            row["spec"] = json.dumps({"format": 1, **json.loads(row["spec"])})
    assert either.rows(spec) == specs
    assert without_added(columns(either)) == tables
    # The best trial's checkpoint is kept: trial 3's was written by the old code, that of the best one now by the new.
    best = max(either.trials("digits"), key=lambda trial: trial["value"])["number"]
    assert best in (5, 7)
    new = either.folder / "checkpoints" / uid / f"trial-{best:06d}"
    assert only_checkpoint(new) == only_checkpoint(FIXTURES / "checkpoints" / uid / "trial-000003")


def test_own_objectives(home: Home) -> None:
    """Workers go on with own objectives: failed trials stay, the parked one keeps its parameters, the queued one is run."""
    home.forked("worker", "own")
    home.forked("resume", "front")
    home.forked("worker", "front")
    for study in ("own", "front"):
        assert home.trials(study) == ENDS[study]
    storage = optuna.storages.RDBStorage(home.url)
    states = [trial.state.name for trial in optuna.load_study(study_name="own", storage=storage).trials]
    storage.engine.dispose()
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_new_tables(home: Home) -> None:
    """A database made now has the tables and columns that the old one has, and those that were added."""
    assert home.schema() == (FIXTURES / "schema.sql").read_text()
    new = Home(home.folder, f"sqlite:///{home.folder}/new.db")
    new.forked("run", "own.toml", "--workers", "0")
    assert without_added(columns(new)) == columns(home)
    indexes = (
        "SELECT sql FROM sqlite_master WHERE type = 'index' AND name LIKE '%hpo_%' AND sql IS NOT NULL ORDER BY name"
    )
    added = [
        "CREATE INDEX ix_hpo_trials_open ON hpo_trials (study_uid, lease_until, trial_id) WHERE settled IS 0",
        "CREATE INDEX ix_hpo_launches_study_id ON hpo_launches (study_id)",
    ]
    assert [row for row in new.rows(indexes) if row["sql"] not in added] == home.rows(indexes)
    home.forked("run", "own.toml", "--workers", "0")
    assert sorted(map(str, home.rows(indexes))) == sorted(map(str, new.rows(indexes)))


def test_new_postgres_tables(one_database: str, postgres_url: str, tmp_path: Path) -> None:
    """Likewise in Postgres."""
    old = put_down_postgres(tmp_path, postgres_url)
    new = without_added(columns(Home(tmp_path, one_database)))
    assert len(new) > 50
    assert new == columns(old)


def uid_of(home: Home, study: str) -> str:
    (row,) = home.rows(
        "SELECT h.uid FROM hpo_studies h JOIN studies s ON s.study_id = h.study_id WHERE s.study_name = :study",
        study=study,
    )
    return str(row["uid"])
