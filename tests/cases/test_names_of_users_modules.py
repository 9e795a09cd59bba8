"""A module of the user's own is the one that is imported, or its name is refused; never ours or Python's in its place."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec import usercode

OBJECTIVE = "def objective(trial): return 0.0\n"


def load(folder: Path, reference: str = "train.py:objective", **files: str) -> Any:
    """Write files, `__` in their names for `/`, `init` for `__init__`, and import an objective of them."""
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/').replace('init', '__init__')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return usercode.load_objective(reference, folder)


def refused(folder: Path, reference: str = "train.py:objective", **files: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(folder, reference, **files)
    return str(caught.value)


@pytest.mark.parametrize("name", ["models", "data", "utils", "test", "tests", "docs"])
def test_a_users_module_wins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over one of its name that is loaded or lies elsewhere: `models` and `data` of ours, what a library left there."""
    for loaded in (name, f"{name}.part"):
        monkeypatch.setitem(sys.modules, loaded, types.ModuleType(loaded))
    text = f"import {name}\ndef objective(w): return {name}.loss(w) if hasattr({name}, 'loss') else 777.0\n"
    assert load(tmp_path, train=text, **{name: "def loss(w): return w\n"})(0.25) == 0.25
    assert f"{name}.part" not in sys.modules
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize(
    ("file", "owner"),
    [
        ("queue.py", "Python's own module 'queue'"),
        ("random.py", "Python's own module 'random'"),
        ("code.py", "Python's own module 'code'"),
        ("turtle.py", "Python's own module 'turtle'"),
        ("types/__init__.py", "Python's own module 'types'"),
        ("optuna.py", "the installed package 'optuna', which hpo needs"),
        ("torch/__init__.py", "the installed package 'torch', which hpo needs"),
        ("sklearn.py", "the installed package 'scikit-learn', which hpo needs"),
        ("joblib.py", "the installed package 'joblib', which hpo needs"),  # scikit-learn needs it
        ("google.py", "the installed package 'protobuf', which hpo needs"),  # a folder of several packages
        ("hpo.py", "hpo itself"),
    ],
)
def test_a_name_that_is_taken_is_refused(file: str, owner: str, tmp_path: Path) -> None:
    written = tmp_path / file
    written.parent.mkdir(exist_ok=True)
    written.write_text("")
    mine = written if file.endswith(f"{written.stem}.py") and written.stem != "__init__" else written.parent
    assert refused(tmp_path, train=OBJECTIVE) == (
        f"objective: {mine} is named like {owner}, and one would be imported in place of the other; "
        f"rename it, such as my_{mine.name}"
    )
    assert str(tmp_path) not in sys.path


def test_all_names_that_are_taken_are_told_at_once(tmp_path: Path) -> None:
    said = refused(tmp_path, train=OBJECTIVE, queue="", optuna="", fine="").splitlines()
    assert [line.split(" is named")[0] for line in said] == [
        f"objective: {tmp_path}/optuna.py",
        f"objective: {tmp_path}/queue.py",
    ]


def test_names_that_hide_nothing_are_free(tmp_path: Path) -> None:
    """A folder without `__init__.py` never wins; what lies deeper is not on the path."""
    (tmp_path / "queue").mkdir()
    (tmp_path / "torch").mkdir()
    (tmp_path / "random.txt").write_text("")
    assert load(tmp_path, train=OBJECTIVE, sub__queue="", torch__train="", setup="", conftest="")(None) == 0.0


def test_a_folder_that_the_users_code_puts_first_is_held_to_the_same(tmp_path: Path) -> None:
    """A plain script would get its own `resource`; here Python's was loaded before."""
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'src')!r})\nimport resource\n{OBJECTIVE}"
    said = refused(tmp_path, train=code, src__resource="")
    assert said.startswith(f"objective: {tmp_path}/src/resource.py is named like Python's own module 'resource'")


def test_a_files_own_folder_goes_before_the_study_files(tmp_path: Path) -> None:
    """As for `python sub/train.py`; what is only beside the study file is found too."""
    code = "import top, utils\ndef objective(trial): return utils.VALUE + top.VALUE\n"
    found = load(
        tmp_path, "sub/train.py:objective", sub__train=code, sub__utils="VALUE = 2", utils="VALUE = 1", top="VALUE = 10"
    )
    assert found(None) == 12
    assert sys.path[:2] == [str(tmp_path / "sub"), str(tmp_path)]


def test_a_link_finds_what_lies_beside_its_target(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "train.py").symlink_to(tmp_path / "code" / "train.py")
    code = "import helper\ndef objective(trial): return helper.VALUE\n"
    load(tmp_path, "code/train.py:objective", code__train=code, code__helper="VALUE = 3")
    assert usercode.load_objective("train.py:objective", tmp_path / "study")(None) == 3


def test_a_file_is_the_module_that_it_is_named(tmp_path: Path) -> None:
    """Whoever unpickles one of its classes finds it by that name."""
    made = load(tmp_path, train="class Net: pass\ndef objective(trial): return Net()\n")(None)
    assert type(made).__module__ == "train"
    assert sys.modules["train"].Net is type(made)
    assert usercode.load("train:Net", tmp_path, "model.name") is type(made)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    load(tmp_path, "a/train.py:objective", a__train=OBJECTIVE)
    assert refused(tmp_path, "b/train.py:objective", b__train=OBJECTIVE) == (
        f"objective: of {tmp_path}/a/train.py and {tmp_path}/b/train.py one process can import only one as 'train'; "
        "rename the other"
    )


def test_files_of_two_folders_must_mean_one_helper(tmp_path: Path) -> None:
    load(tmp_path, "a/net.py:objective", a__net=OBJECTIVE, a__utils="")
    assert refused(tmp_path, "b/source.py:objective", b__source=OBJECTIVE, b__utils="") == (
        f"objective: of {tmp_path}/a/utils.py and {tmp_path}/b/utils.py one process can import only one as 'utils'; "
        "rename the other"
    )


def test_a_file_beside_a_package_of_its_name_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, train=OBJECTIVE, train__init="") == (
        f"objective: {tmp_path}/train.py and the package {tmp_path}/train have one name; rename one of them"
    )


def test_a_part_of_a_package_is_named_by_its_package(tmp_path: Path) -> None:
    code = f"from .helper import VALUE\n{OBJECTIVE}"
    files = {"pkg__init": "", "pkg__helper": "VALUE = 1", "pkg__train": code}
    assert refused(tmp_path, "pkg/train.py:objective", **files).endswith('such as "pkg.train:NAME"')
    assert load(tmp_path, "pkg.train:objective")(None) == 0.0
