"""A module of the user's own is the one that is imported, or its name is refused; never ours or Python's in its place."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec import user_path, usercode
from tests.support.paths import ROOT

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
        ("hpo.py", "hpo itself"),
    ],
)
def test_a_name_that_is_taken_is_refused(file: str, owner: str, tmp_path: Path) -> None:
    written = tmp_path / file
    written.parent.mkdir(exist_ok=True)
    written.write_text("")
    mine = written if file.endswith(f"{written.stem}.py") and written.stem != "__init__" else written.parent
    assert refused(tmp_path, train=OBJECTIVE) == (
        f"objective: {mine} has the name of {owner} and would be imported in its place, as {tmp_path} goes on Python's path; "
        f"rename it, such as my_{mine.name}"
    )
    assert str(tmp_path) not in sys.path


def test_a_name_that_several_packages_share_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, train=OBJECTIVE, google="")
    assert re.search(
        r"google\.py has the name of the installed package '(protobuf|google-auth)', which hpo needs", said
    )


def test_all_names_that_are_taken_are_told_at_once(tmp_path: Path) -> None:
    said = refused(tmp_path, train=OBJECTIVE, queue="", optuna="", fine="").splitlines()
    assert [line.split(" has the name")[0] for line in said] == [
        f"objective: {tmp_path}/optuna.py",
        f"objective: {tmp_path}/queue.py",
    ]


def test_names_that_hide_nothing_are_free(tmp_path: Path) -> None:
    """A folder without `__init__.py` never wins; what lies deeper is not on the path."""
    (tmp_path / "queue").mkdir()
    (tmp_path / "torch").mkdir()
    (tmp_path / "random.txt").write_text("")
    assert load(tmp_path, train=OBJECTIVE, sub__queue="", torch__train="", setup="", conftest="")(None) == 0.0


def test_only_what_could_be_a_module_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images beside the study file cost nothing but their names."""
    (tmp_path / "train.py").write_text(OBJECTIVE)
    for name in ("0001.png", "a b.jpg", "__pycache__", "17"):
        (tmp_path / name).mkdir()
    asked: list[str] = []
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: bool(asked.append(os.path.basename(path))) or is_file(path))
    user_path.refuse_taken_names(tmp_path)
    assert asked == ["train.py"]


@pytest.mark.parametrize("closed", ["lost+found", "private", "train"])
def test_a_folder_that_may_not_be_entered_is_no_fault(closed: str, open_folder: Path) -> None:
    """Such as another user's in /tmp, and a folder of the file's own name."""
    (open_folder / closed).mkdir(mode=0o000)
    with nobody():
        assert load(open_folder)(None) == 0.0


def test_a_folder_that_may_not_be_listed_is_no_fault(open_folder: Path) -> None:
    open_folder.chmod(0o711 if os.geteuid() == 0 else 0o311)
    with nobody():
        assert load(open_folder)(None) == 0.0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder with an objective that every user may read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "train.py").write_text(OBJECTIVE)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)
        sys.modules.pop("train", None)


@contextmanager
def nobody() -> Iterator[None]:
    """Root may enter everything, so let root be somebody else for a block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_our_own_parts_do_not_hide_a_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `hpo` runs from its checkout, with the checkout on the path; `hpo` stays importable, for child processes too."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("models", "data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code = (
        "from models import net\nfrom data.more import points\ndef objective(trial): return net.VALUE + points.VALUE\n"
    )
    files = {"models__net": "VALUE = 2", "data__more__points": "VALUE = 40"}
    assert load(tmp_path, train=code, **files)(None) == 42
    assert str(ROOT) not in sys.path
    spec = PathFinder.find_spec("hpo")
    assert spec is not None
    assert user_path.is_file(spec.origin, ROOT / "hpo" / "__init__.py")


def test_a_dot_in_a_files_name_is_warned_of(tmp_path: Path) -> None:
    """It runs, and did before; but classes in it cannot be unpickled by another process."""
    (tmp_path / "train.v2.py").write_text(OBJECTIVE)
    with pytest.warns(UserWarning, match=r"rename it, such as train_v2\.py"):
        assert load(tmp_path, "train.v2.py:objective")(None) == 0.0


def test_a_module_of_a_folder_of_folders_is_found(tmp_path: Path) -> None:
    """None of them with an `__init__.py`."""
    assert load(tmp_path, "ns.deep.train:objective", ns__deep__train=OBJECTIVE)(None) == 0.0


def test_a_folder_that_the_users_code_puts_first_is_held_to_the_same(tmp_path: Path) -> None:
    """A plain script would get its own `resource`; here Python's was loaded before."""
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'src')!r})\nimport resource\n{OBJECTIVE}"
    for _ in range(2):  # what was refused once is not taken for good because it was imported
        said = refused(tmp_path, train=code, src__resource="")
        assert said.startswith(f"objective: {tmp_path}/src/resource.py has the name of Python's own module 'resource'")


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
        f"objective: {tmp_path}/b/train.py: this process has loaded {tmp_path}/a/train.py under the name 'train'; "
        "rename one of them"
    )


def test_what_our_distribution_needs_is_taken_under_its_present_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment of before has the distribution `hpo`; the one that has both goes by the present one."""
    wanted = {"hpo-torch": "optional_thing; extra == 'int8'", "optional-thing": "deeper", "deeper": "", "other": ""}
    for name, needs in wanted.items():
        module = name.replace("-", "_")
        info = tmp_path / "site" / f"{module}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\nRequires-Dist: {needs}\n")
        (info / "RECORD").write_text(f"{module}.py,,\n")
        (tmp_path / "site" / f"{module}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    user_path._packages_we_need.cache_clear()
    try:
        found = user_path._packages_we_need()
    finally:
        user_path._packages_we_need.cache_clear()
    assert found == {"optional_thing": "optional-thing", "deeper": "deeper"}


HELPED = "{first}import utils\ndef objective(trial): return utils.VALUE\n"
LIB = "import sys\nsys.path.{how}{folder!r})\n"


@pytest.mark.parametrize("how", [None, "insert(0, ", "append("])
def test_codes_of_one_process_must_mean_one_helper(how: str | None, tmp_path: Path) -> None:
    """Also in folders that the code puts on the path itself. What is refused is refused again, and the first works on."""
    lib = "" if how is None else "/lib"
    first = {name: LIB.format(how=how, folder=f"{tmp_path}/{name}/lib") if how else "" for name in "ab"}
    helpers = {f"{name}{lib.replace('/', '__')}__utils": f"VALUE = {name!r}" for name in "ab"}
    load(tmp_path, "a/net.py:objective", a__net=HELPED.format(first=first["a"]), **helpers)
    for _ in range(2):
        assert refused(tmp_path, "b/loss.py:objective", b__loss=HELPED.format(first=first["b"])) == (
            f"objective: {tmp_path}/a{lib}/utils.py and {tmp_path}/b{lib}/utils.py have the same module name 'utils', "
            "and one process can import only one of them; rename one"
        )
    assert load(tmp_path, "a/net.py:objective")(None) == "a"
    assert "loss" not in sys.modules
    assert not any(entry.startswith(f"{tmp_path}/b") for entry in sys.path)


def test_a_helper_that_would_be_another_one_later_is_refused(tmp_path: Path) -> None:
    """Whichever code comes first, and if it imports its helper only when it is called."""
    later = "def objective(trial):\n    import utils\n    return utils.VALUE\n"
    load(tmp_path, "src/net.py:objective", src__net=later, src__utils="VALUE = 1", utils="VALUE = 2")
    said = f"{tmp_path}/src/utils.py and {tmp_path}/utils.py have the same module name 'utils', and one process can"
    assert said in refused(tmp_path, "opt.py:objective", opt=HELPED.format(first=""))
    load(tmp_path, "late.py:objective", late=later)(None)
    assert said in refused(tmp_path, "late.py:objective")


def test_a_part_of_a_folder_without_init_is_a_helper_too(tmp_path: Path) -> None:
    code = "from tools.more import utils\ndef objective(trial): return utils.VALUE\n"
    helpers = {f"{name}__tools__more__utils": f"VALUE = {name!r}" for name in "ab"}
    load(tmp_path, "a/net.py:objective", a__net=code, **helpers)
    assert "the same module name 'tools.more.utils'" in refused(tmp_path, "b/loss.py:objective", b__loss=code)


def test_files_of_one_name_that_nobody_imports_are_no_fault(tmp_path: Path) -> None:
    load(tmp_path, "src/net.py:objective", src__net=OBJECTIVE, src__utils="", utils="")
    load(tmp_path, "opt.py:objective", opt=OBJECTIVE)
    load(tmp_path, "lib/loss.py:objective", lib__loss=OBJECTIVE, lib__setup="", setup="")
    assert sys.path[:3] == [f"{tmp_path}/src", f"{tmp_path}/lib", str(tmp_path)]


@pytest.mark.parametrize("lib", ["lib", "lib.zip"])
def test_a_helper_that_all_mean_is_shared(lib: str, tmp_path: Path) -> None:
    """In a folder, or an archive, that both put before their own."""
    lib = LIB.format(how="insert(0, ", folder=f"{tmp_path}/{lib}")
    files = {"lib__utils": "VALUE = 3", "b__utils": "VALUE = 4"}
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as archive:
        archive.writestr("utils.py", "VALUE = 3")
    load(tmp_path, "a/net.py:objective", a__net=HELPED.format(first=lib), **files)
    assert load(tmp_path, "b/loss.py:objective", b__loss=HELPED.format(first=lib))(None) == 3


def test_a_file_beside_a_package_of_its_name_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, train=OBJECTIVE, train__init="") == (
        f"objective: {tmp_path}/train.py and the package {tmp_path}/train have the same name; rename one of them"
    )


def test_a_part_of_a_package_is_named_by_its_package(tmp_path: Path) -> None:
    code = f"from .helper import VALUE\n{OBJECTIVE}"
    files = {"pkg__init": "", "pkg__helper": "VALUE = 1", "pkg__train": code}
    assert refused(tmp_path, "pkg/train.py:objective", **files).endswith('such as "pkg.train:NAME"')
    assert load(tmp_path, "pkg.train:objective")(None) == 0.0
