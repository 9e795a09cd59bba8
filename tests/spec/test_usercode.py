"""Code of the user's own: found beside the study file, and its failures explained."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec import usercode
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for user code."""
    return tmp_path


def fails(reference: str, folder: Path) -> str:
    with pytest.raises(SpecError) as caught:
        usercode.load(reference, folder, "objective")
    return str(caught.value)


def test_a_name_is_a_reference_if_it_has_a_colon() -> None:
    assert [usercode.is_reference(name) for name in ("a.py:f", "a.b:f", "mlp", "a.py")] == [True, True, False, False]


def test_a_file_beside_the_study_file_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the study file is loaded whatever the current folder."""
    (folder / "sub").mkdir()
    (folder / "sub" / "elsewhere").mkdir()
    (folder / "sub" / "mine.py").write_text("def f(): return 42\n")
    monkeypatch.chdir(folder / "sub" / "elsewhere")
    assert usercode.load("mine.py:f", folder / "sub", "objective")() == 42
    assert usercode.load("sub/mine.py:f", folder, "objective")() == 42
    assert usercode.load(f"{folder}/sub/mine.py:f", Path("/"), "objective")() == 42


def test_a_module_of_a_package_resolves_first_on_the_path(folder: Path) -> None:
    """A module of a package resolves against the folder which goes first on the path."""
    (folder / "user_pkg_a").mkdir()
    (folder / "user_pkg_a" / "__init__.py").write_text("")
    (folder / "user_pkg_a" / "deep.py").write_text("class Net: pass\n")
    assert usercode.load("user_pkg_a.deep:Net", folder, "model.name").__name__ == "Net"
    assert sys.path[0] == str(folder)
    usercode.load("user_pkg_a.deep:Net", folder, "model.name")
    assert sys.path.count(str(folder)) == 1


def as_installed(code: str, folder: Path) -> str:
    """Run code where only `hpo` is installed, not in this checkout; return what it prints."""
    code = f"from pathlib import Path\nfrom hpo.spec import usercode\nfolder = Path({str(folder)!r})\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".editable")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", check=True, env=environment
    )
    return done.stdout.strip()


def test_a_users_own_models_and_data_are_theirs(folder: Path) -> None:
    """Ours are `hpo.models` and `hpo.data`; the plain names belong to the user."""
    for name in ("models", "data", "user_helper_a"):
        (folder / f"{name}.py").write_text(f"VALUE = {name!r}\n")
    (folder / "mine.py").write_text(
        "import data, models, user_helper_a\nfrom hpo.models import MODELS\n"
        "def f(): return data.VALUE, models.VALUE, user_helper_a.VALUE, 'mlp' in MODELS\n"
    )
    found = as_installed('print(usercode.load("mine.py:f", folder, "objective")())', folder)
    assert found == str(("data", "models", "user_helper_a", True))


def test_code_that_means_our_models_or_data_is_told_their_new_names(folder: Path) -> None:
    """They once were imported without `hpo.`, as many examples still have it."""
    (folder / "mine.py").write_text("from data import Source\ndef f(): return Source\n")
    code = 'try: usercode.load("mine.py:f", folder, "data.name")\nexcept Exception as error: print(error)'
    assert as_installed(code, folder) == (
        "data.name: importing mine.py failed: ModuleNotFoundError: No module named 'data' "
        f"({folder}/mine.py:1); import hpo's own as `hpo.data`"
    )


def test_a_file_is_run_once(folder: Path) -> None:
    (folder / "mine.py").write_text("STATE = []\ndef f(): return STATE\n")
    f = usercode.load("mine.py:f", folder, "objective")
    assert usercode.load("mine.py:f", folder, "objective")() is f()
    assert usercode.load("mine:f", folder, "objective")() is f()


def test_a_dataclass_in_a_file_finds_its_own_module(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 3\n"
    )
    assert usercode.load("mine.py:C", folder, "model.name")().x == 3


@pytest.mark.parametrize("reference", ["mine.py", "mine.py:", ":f", ":", "..mine:f", ".mine:f"])
def test_half_a_reference_is_refused(reference: str, folder: Path) -> None:
    assert fails(reference, folder) == (
        f'objective = {reference!r}: names no code; write "file.py:function" or "package.module:function"'
    )


def test_a_missing_file_is_named_with_its_full_path(folder: Path) -> None:
    assert fails("nope.py:f", folder) == f"objective: no file {folder}/nope.py; paths are relative to the study file"
    (folder / "folder.py").mkdir()
    assert "no file" in fails("folder.py:f", folder)


def test_a_missing_function_is_named_with_the_nearest_one(folder: Path) -> None:
    (folder / "mine.py").write_text("import math\ndef objective(trial): pass\nNUMBER = 3\n")
    assert fails("mine.py:objektive", folder) == (
        "objective = 'mine.py:objektive': mine.py has no 'objektive' (did you mean 'objective'?)"
    )
    assert fails("mine.py:NUMBER", folder) == "objective = 'mine.py:NUMBER': has type int; name a function"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import math\nraise RuntimeError('no GPU here')\n", "RuntimeError: no GPU here ({file}:2)"),
        ("import torchhvision\n", "ModuleNotFoundError: No module named 'torchhvision' ({file}:1)"),
        ("def (:\n", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("import sys\n\nsys.exit(3)\n", f"SystemExit: 3 ({{file}}:3); {usercode.GUARD}"),
        (
            "open('/no/such/weights.pt')\n",
            "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/weights.pt' ({file}:1)",
        ),
    ],
)
def test_an_import_that_fails_shows_its_cause(source: str, cause: str, folder: Path) -> None:
    """An import that fails shows its cause and line and can be tried again."""
    file = folder / "bad.py"
    file.write_text(source)
    assert fails("bad.py:f", folder) == f"objective: importing bad.py failed: {cause.format(file=file)}"
    file.write_text("def f(): return 'a longer file that works now'\n")
    assert usercode.load("bad.py:f", folder, "objective")() == "a longer file that works now"


def test_a_module_that_is_not_there_is_told(folder: Path) -> None:
    expected = "objective: importing no_such.mod failed: ModuleNotFoundError: No module named 'no_such'"
    assert fails("no_such.mod:f", folder) == expected


def test_an_interrupt_during_an_import_is_no_fault_of_the_study_file(folder: Path) -> None:
    (folder / "slow.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        usercode.load("slow.py:f", folder, "objective")


def test_the_digest_changes_with_the_file_and_with_nothing_else(folder: Path) -> None:
    file = folder / "mine.py"
    file.write_text("def f(): pass\ndef g(): pass\n")
    before = usercode.digest(["mine.py:f"], folder)
    assert [len(one) for one in before.split(" ")] == [64, 64]
    assert usercode.digest(["mine.py:g", "mine.py:f"], folder) == before
    (folder / "other.py").write_text("x = 1\n")
    assert usercode.digest(["mine.py:f"], folder) == before
    both = usercode.digest(["mine.py:f", "other.py:x"], folder)
    assert both != before
    assert usercode.digest(["other.py:x", "mine.py:f"], folder) == both
    file.write_text("def f(): pass\ndef g(): pass  # words\n")
    after = usercode.digest(["mine.py:f"], folder)
    assert [one == other for one, other in zip(after.split(" "), before.split(" "), strict=True)] == [True, False]
    assert usercode.digest([], folder) == ""


def test_an_earlier_version_recorded_the_digest_of_the_text(folder: Path) -> None:
    (folder / "mine.py").write_text("def f(): pass  # words\n")
    (folder / "w.pt").write_bytes(b"weights")
    parts = [hashlib.sha256((folder / name).read_bytes()).digest() for name in ("mine.py", "w.pt")]
    found = usercode.digest(["mine.py:f"], folder, [folder / "w.pt", folder / "missing.pt"])
    assert found.split(" ")[1] == hashlib.sha256(b"\0".join(parts)).hexdigest()


def test_a_large_file_is_no_source(folder: Path) -> None:
    """So weights larger than the memory are not read at once."""
    (folder / "mine.py").write_text("x = 1  # words\n")
    syntax, text = usercode.digest([], folder, [folder / "mine.py"]).split(" ")
    assert syntax != text
    with (folder / "mine.py").open("a") as file:
        file.write("\n" * 2**20)
    syntax, text = usercode.digest([], folder, [folder / "mine.py"]).split(" ")
    assert syntax == text


def test_a_module_and_its_file_have_one_digest(folder: Path) -> None:
    (folder / "user_mod_b.py").write_text("def f(): pass\n")
    usercode.load("user_mod_b:f", folder, "objective")
    assert usercode.digest(["user_mod_b:f"], folder) == usercode.digest(["user_mod_b.py:f"], folder)


def test_built_in_code_has_no_digest_and_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError) as caught:
        usercode.digest(["sys:exit"], folder)
    said = "it is built in, or a folder without __init__.py: name a Python module"
    assert str(caught.value) == f"sys: has no file of its own; {said}"
