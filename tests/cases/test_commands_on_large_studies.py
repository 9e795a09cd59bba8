"""What `status`, `export` and `doctor` load and read does not grow with the study, nor is torch loaded to look at it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import SpecError, StorageError
from hpo.spec import space
from hpo.spec.failures import Kind
from hpo.spec.study_file import StudySpec
from hpo.storage import tables
from hpo.storage.connect import Storage, connect, plain_url
from hpo.study import resolve, retention
from hpo.study.export import export
from hpo.study.query import changes
from hpo.study.status import Tally, read
from hpo.study.study import Study
from hpo.train.build import measurement_cache
from tests.support import declared
from tests.support.declared import DOCUMENT
from tests.support.trials import START, begin, finish_claim, make, run

LOOKS = """
import sys
from pathlib import Path
from hpo.spec.study_file import StudySpec
from hpo.storage import tables
from hpo.storage.connect import Storage, connect, plain_url
from hpo.study import resolve, retention
spec = StudySpec.from_document({document})
assert resolve.check_stored(spec, Path({folder!r})) == ""
print("torch" in sys.modules)
"""


def loaded(spec: StudySpec, folder: Path) -> str:
    """Return what a process loads that checks a stored spec."""
    code = LOOKS.format(document=spec.document, folder=str(folder))
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def test_a_spec_of_our_own_parts_is_checked_once_and_without_torch_from_then_on(tmp_path: Path) -> None:
    spec = StudySpec.from_document(DOCUMENT)
    assert resolve.check_stored(spec, tmp_path) == ""
    assert loaded(spec, tmp_path) == "False"


def test_a_spec_that_cannot_be_loaded_is_refused_each_time(tmp_path: Path) -> None:
    spec = StudySpec.from_document(DOCUMENT | {"model": {"name": "no_such_model"}})
    for _ in range(2):
        with pytest.raises(SpecError, match="there is no model 'no_such_model'"):
            resolve.check_stored(spec, tmp_path)


@pytest.mark.parametrize("model", ["mine.py:net", "missing.py:net"])
def test_code_of_the_users_own_is_imported_each_time(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def net(input_shape, num_classes): ...\n")
    spec = StudySpec.from_document(DOCUMENT | {"model": {"name": model}})
    if model.startswith("missing"):
        with pytest.raises(SpecError, match=r"missing\.py"):
            resolve.check_stored(spec, tmp_path)
    else:
        assert resolve.check_stored(spec, tmp_path) == resolve.load_and_digest(spec, tmp_path) != ""
    assert not measurement_cache.home().exists()


def test_a_file_of_weights_is_looked_at_each_time(tmp_path: Path) -> None:
    spec = StudySpec.from_document(DOCUMENT | {"model": {"name": "resnet18", "weights": "mine.pt"}})
    assert resolve.check_stored(spec, tmp_path) == ""  # the file is not there yet
    (tmp_path / "mine.pt").write_bytes(b"weights")
    assert resolve.check_stored(spec, tmp_path) != ""


def test_another_spec_is_another_question(tmp_path: Path) -> None:
    resolve.check_stored(StudySpec.from_document(DOCUMENT), tmp_path)
    known = len(measurement_cache.home().read_text())
    resolve.check_stored(StudySpec.from_document(DOCUMENT | {"training": {"epochs": 4}}), tmp_path)
    assert len(measurement_cache.home().read_text()) > known


def test_a_storage_whose_schema_is_known_is_opened_without_optunas_own_storage(lite: Storage) -> None:
    backend = optuna.storages.RDBStorage(plain_url(lite.url))
    assert backend.get_head_version() == tables.SCHEMA_VERSION
    assert tables.has_known_schema(lite.engine)
    with lite.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    assert not tables.has_known_schema(lite.engine)
    with pytest.raises(StorageError, match="The runtime optuna version"):  # in Optuna's own words
        connect(plain_url(lite.url))


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_doctor_reads_no_curves_to_tell_stale_checkpoints(keep: int, lite: Storage, tmp_path: Path) -> None:
    recovery = {"recovery": {"keep_checkpoints": keep}}
    study = declared.made(lite, tmp_path, DOCUMENT | recovery)
    for number in range(6):
        ledger, claim, _ = begin(study)
        finish_claim(ledger, claim, TrialState.COMPLETE, float(number % 3), outcome="complete")
        study.trial_folder(number).mkdir(parents=True)
    read: list[str] = []
    sa.event.listen(lite.engine, "before_cursor_execute", lambda *given: read.append(given[2]))
    left = [folder.name for folder in retention.stale(study)]
    assert not [statement for statement in read if "intermediate_values" in statement]
    best = [2, 5][:keep]  # of equal ones the lower number
    assert left == [f"trial-{number:06d}" for number in range(6) if number not in best]
    assert left == [folder.name for folder in retention.delete_stale(study)]


LOADS = """
import sys
from hpo.cli import app
for arguments in {commands}:
    try:
        app(arguments)
    except SystemExit as ended:
        assert not ended.code, ended.code
    heavy = {{"torch", "optuna", "alembic", "numpy", "psycopg", "sqlalchemy.orm", "rich"}}
    print(arguments[0], sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def test_who_looks_at_a_study_loads_neither_optuna_nor_torch_nor_rich(lite: Storage, tmp_path: Path) -> None:
    study = declared.made(lite, tmp_path, DOCUMENT)
    resolve.check_stored(study.spec, tmp_path)
    with_param(study, 0.5)
    of_study = ["digits", "--storage", plain_url(lite.url)]
    commands = [
        ["status", *of_study],
        ["status", *of_study, "--trial", "0"],
        ["export", *of_study, "-o", str(tmp_path / "best.toml")],
        ["doctor", *of_study],
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADS.format(commands=commands)], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines() == ["status []", "status []", "export []", "doctor []"]


def with_param(study: Study, value: float) -> None:
    ledger, claim, trial = begin(study)
    space.suggest(study.spec.tree, trial)
    finish_claim(ledger, claim, TrialState.COMPLETE, value, outcome="complete")


def test_an_export_does_not_read_the_rows_of_all_trials(lite: Storage, tmp_path: Path) -> None:
    study = declared.made(lite, tmp_path, DOCUMENT)
    for value in (0.5, 0.75, 0.25):
        with_param(study, value)
    read: list[str] = []
    sa.event.listen(lite.engine, "before_cursor_execute", lambda *given: read.append(given[2]))
    [result] = export(study, tmp_path / "best.toml").values()
    assert (result.number, result.value) == (1, 0.75)
    assert tomllib.loads((tmp_path / "best.toml").read_text())["receipt"]["trials_tried"] == 3
    assert not [statement for statement in read if "datetime_start" in statement]


@pytest.mark.both
def test_a_summary_is_the_same_whatever_is_in_memory_at_once(
    place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(place, tmp_path)
    for value, state in [(0.5, TrialState.COMPLETE), (0.25, TrialState.PRUNED), (0.75, TrialState.COMPLETE)]:
        run(study, value, state=state)
    run(study, 0.3, kind=Kind.EXCEPTION, reason="ValueError: no")
    begin(study)
    run(study, 0.75)
    study.optuna.ask()
    study.optuna.enqueue_trial({"x": 1})
    whole, known = read(study, clock=lambda: START), read(study).past
    sizes: list[int] = []
    plus = Tally.plus

    def counted(tally: Tally, found: Sequence[Any], *rest: Any) -> Tally:
        sizes.append(len(found))
        return plus(tally, found, *rest)

    monkeypatch.setattr(Tally, "plus", counted)
    monkeypatch.setattr(changes, "PAGE", 2)
    assert read(study, clock=lambda: START) == whole
    assert sizes == [2, 2, 1, 0, 3]  # pages of 2 trials without those that may still change; these come last
    run(study, 0.875)
    assert read(study, known).past == read(study).past
