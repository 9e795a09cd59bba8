"""In which format a study file is read: the study's, the file's own, else the present one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo.errors import MismatchError, SpecError
from hpo.spec.study_file import FORMAT, StudySpec, as_meant
from hpo.storage.connect import connect
from hpo.study import resolve
from hpo.study import study as studies
from tests.support.old_files import FIXTURES, put_down

FOLDER_STUDY = {
    "name": "s",
    "data": {"name": "image_folder", "root": "images"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd"},
}


def test_a_new_file_is_in_the_present_format_and_an_old_document_in_the_first() -> None:
    assert StudySpec.from_document(FOLDER_STUDY).format == FORMAT == 3
    assert StudySpec.from_document(as_meant(FOLDER_STUDY)).format == 1
    assert StudySpec.from_document(as_meant({**FOLDER_STUDY, "format": 2})).format == 2


def test_the_first_format_reads_files_as_it_did_and_keeps_its_identity() -> None:
    """The stored document does not say how its files are read, for there was one way only."""
    old = StudySpec.from_document({**FOLDER_STUDY, "format": 1})
    assert old.tree["data"]["reading"] == 1
    assert "format" not in old.document
    assert old.document["data"] == old.identity["data"] == FOLDER_STUDY["data"]


def test_a_format_to_come_is_refused() -> None:
    with pytest.raises(SpecError, match="format = 4: input should be 1, 2 or 3"):
        StudySpec.from_document({**FOLDER_STUDY, "format": 4})


def test_a_file_joins_an_old_study_in_its_format_unless_it_names_another(tmp_path: Path) -> None:
    home = put_down(tmp_path)
    place = connect(home.url)
    file = resolve.read(tmp_path / "digits.toml")
    stored = studies.join(place, "digits").spec
    (row,) = [row for row in home.rows("SELECT * FROM hpo_studies") if json.loads(row["spec"])["name"] == "digits"]
    assert (file.spec.format, stored.format) == (3, 1)
    assert file.joining(stored).spec.fingerprint == stored.fingerprint == row["fingerprint"]

    text = (FIXTURES / "digits.toml").read_text()
    (tmp_path / "digits.toml").write_text(f"format = 2\n{text}")
    said = resolve.read(tmp_path / "digits.toml").joining(stored)
    with pytest.raises(MismatchError, match="format: the study has nothing, the file has 2"):
        studies.create_or_join(place, said.spec, code_folder=tmp_path, code_digest="")
