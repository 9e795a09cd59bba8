"""What `status`, `export` and `doctor` load and read does not grow with the study, nor is torch loaded to look at it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.study import resolve
from hpo.train.build import measurement_cache
from tests.support.declared import DOCUMENT

LOOKS = """
import sys
from pathlib import Path
from hpo.spec.study_file import StudySpec
from hpo.study import resolve
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
