"""The shape of the source: which way imports point, what is loaded when, and what an installed `hpo` offers.

The directions themselves are import-linter's contracts in pyproject.toml, which `make check` runs. Here each contract is
shown to notice a violation.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import pytest

from hpo.launch import fork_server

ROOT = Path(__file__).parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
#: A line for each contract that breaks it, and the module that it is written into.
VIOLATIONS = {
    "direction": ("hpo/queue/lease_clock.py", "from hpo.study import control"),
    "training": ("hpo/train/loop.py", "from hpo.train.stack import sizing"),
    "cycles": ("hpo/spec/durations.py", "if TYPE_CHECKING:\n    from hpo.spec.study_file import StudySpec"),
    "parts": ("models/blocks.py", "def later():\n    import optuna"),
    "torch-side": ("hpo/train/epoch.py", "from sqlalchemy import select"),
    "optuna-side": ("hpo/storage/sql.py", "import torch"),
    "light": ("hpo/view/live.py", "import torch"),
    "sql": ("hpo/study/doctor.py", "def later():\n    from sqlalchemy import select"),
    "torch-last": ("hpo/worker/client.py", "import torch"),
    "stack": ("hpo/worker/objective.py", "from hpo.train.stack import flat_parameters"),
    "samplers": ("hpo/worker/trial.py", "from hpo.strategy.tpe import count_good"),
}


def modules() -> dict[str, Path]:
    """Return every module of ours by its dotted name."""
    found = {}
    for folder, parent in (("hpo", ()), ("models", ("hpo",)), ("data", ("hpo",))):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = (*parent, *file.relative_to(ROOT).with_suffix("").parts)
            if not any(link in file.parents for link in (ROOT / "hpo/models", ROOT / "hpo/data")):
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def test_only_tests_with_processes_of_their_own_load_the_twin_device() -> None:
    """A process that knows a second device cannot fork and train. See `tests/accelerator`."""
    ours = [file for file in (ROOT / "tests").rglob("test_*.py") if "accelerator" not in file.parts]
    found = [
        file
        for file in ours
        if re.search(r"^from tests\.support(\.| import .*)(twin|launches)", file.read_text(), re.M)
    ]
    assert found == []


def lint(folder: Path, *contracts: str) -> dict[str, bool]:
    """Run import-linter on a checkout; return by contract whether it is kept."""
    command = [Path(sys.executable).parent / "lint-imports", folder / "pyproject.toml", "--no-cache"]
    command += [word for contract in contracts for word in ("--contract", contract)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    kept = dict(re.findall(r"^(\S.*?) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE))
    return {one["id"]: kept[one["name"]] == "KEPT" for one in CONTRACTS if not contracts or one["id"] in contracts}


def test_imports_point_one_way() -> None:
    assert lint(ROOT) == dict.fromkeys(VIOLATIONS, True)


@pytest.mark.parametrize("contract", VIOLATIONS)
def test_each_contract_notices_a_violation(tmp_path: Path, contract: str) -> None:
    """A `forbidden` contract on a package's parent passes whatever is there, so each contract is broken once, by itself.

    That all are kept before is the test above.
    """
    for name in ("hpo", "models", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, line = VIOLATIONS[contract]
    with (tmp_path / file).open("a") as module:
        module.write(f"\n{line}\n")
    assert lint(tmp_path, contract) == {contract: False}


def test_a_new_package_is_told_whether_it_may_know_sql() -> None:
    without = [one["source_modules"] for one in CONTRACTS if one["id"] in ("sql", "torch-side", "parts")]
    packages = {".".join(module.split(".")[:2]) for module in MODULES} - {"hpo"}
    assert packages - {"hpo.storage", "hpo.queue"} == set().union(*without)


def graph() -> grimp.ImportGraph:
    return grimp.build_graph("hpo", include_external_packages=True, cache_dir=None)


def test_models_and_data_know_torch_and_its_like() -> None:
    allowed = {
        "torch",
        "torchvision",
        "numpy",
        "sklearn",
        "annotated_types",
        "filelock",
        "PIL",
        "pyarrow",
        "timm",
        "hpo",
    }
    allowed |= sys.stdlib_module_names
    known = graph()
    for part in ("hpo.models", "hpo.data"):
        found = {
            name.partition(".")[0]
            for module in {part} | known.find_descendants(part)
            for name in known.find_modules_directly_imported_by(module)
        }
        assert found - allowed == set()


def test_no_module_knows_both_optuna_and_torch() -> None:
    known = graph()
    direct = {module: known.find_modules_directly_imported_by(module) for module in MODULES}
    assert [module for module, names in direct.items() if {"optuna", "torch"} <= names] == []


def test_every_package_says_what_lives_in_it_and_imports_nothing() -> None:
    for file in (ROOT / "hpo").rglob("__init__.py"):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        if file.parent.name not in ("hpo", "cli", "models", "data"):
            assert len(tree.body) == 1, file
    assert len([folder for folder in (ROOT / "hpo").iterdir() if (folder / "__init__.py").is_file()]) <= 18
    assert len(list((ROOT / "hpo").glob("*.py"))) <= 7


def names_in(module: str, wanted: str) -> bool:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        found = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if found == wanted:
            return True
    return False


def test_only_assembly_and_the_final_training_name_the_test_split() -> None:
    ours = [module for module in MODULES if not module.startswith("hpo.data")]
    users = {"hpo.train.build.assemble", "hpo.final.train"}
    assert {module for module in ours if names_in(module, "load_test")} == users
    assert {module for module in ours if "load_test" in MODULES[module].read_text()} == users


def test_only_these_rename_and_sync_files() -> None:
    """A file that must appear whole is written by `hpo.files.atomic_write`; two modules rename whole folders."""
    asked = ("fsync", "replace", "rename", "renames", "NamedTemporaryFile", "mkstemp")
    found = {
        module
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in asked and isinstance(node.value, ast.Name)
        if node.value.id in ("os", "tempfile", "shutil") or node.attr in ("fsync", "rename")
    }
    assert found == {"hpo.files", "hpo.data.cache", "hpo.study.program_folder"}


def test_what_is_written_at_once_is_written_atomically() -> None:
    found = set()
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
        parts = {
            ast.unparse(one.optional_vars) for one in items if one.optional_vars and "atomic_write(" in ast.unparse(one)
        }
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        writes = [node for node in calls if node.attr in ("write_text", "write_bytes")]
        found |= {module for node in writes if ast.unparse(node.value) not in parts}
    # A folder that is renamed whole, a log, and a mark that is only read under its writer's lock.
    assert found == {"hpo.data.cache", "hpo.own.output", "hpo.integrations.transformers"}


def test_the_readers_of_a_study_write_nothing() -> None:
    """Who shows a study neither writes nor locks, so the one package of SQL above the queue does neither."""
    trees = [ast.parse(file.read_text()) for module, file in MODULES.items() if module.startswith("hpo.study.query")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert (
        named & {"insert", "update", "delete", "upsert", "writing", "writing_once", "with_for_update", "text"} == set()
    )
    assert {"select", "execute"} <= named


def isolated(code: str, *, path: Path | None = None, folder: Path | str = "/") -> str:
    """Run code in a fresh interpreter, from a folder without our packages; return what it prints."""
    code = (f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "import sys\n") + code
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("imported", "never"),
    [
        ("hpo", ("torch", "optuna", "sqlalchemy", "numpy", "pydantic", "rich", "typer")),
        ("hpo.cli", ("torch", "optuna", "sqlalchemy", "numpy", "pydantic")),
        ("hpo.launch.launcher, hpo.launch.local, hpo.view.live", ("torch",)),
        (", ".join(fork_server.ANY), ("torch",)),  # an objective may have something to say to torch before it loads it
        (
            "hpo.models, hpo.data, hpo.train.build.check, hpo.train.stack.stack, benchmarks.gpu",
            ("optuna", "sqlalchemy", "torchvision"),
        ),
    ],
)
def test_what_is_never_loaded(imported: str, never: tuple[str, ...]) -> None:
    """The command line and the launcher start at once; training does not need Optuna."""
    code = f"sys.path.insert(0, {str(ROOT)!r}); import {imported}\n"
    assert isolated(f"{code}print([name for name in {never} if name in sys.modules])") == "[]"


# --- what an installed hpo offers -------------------------------------------------------------------------------------

WHO_WINS = """
import hpo, hpo.models, hpo.data
def find(name):
    try:
        return __import__(name).WHOSE
    except ModuleNotFoundError as error:
        return str(error)
before = [find("models"), find("data")]
sys.path.append({theirs!r})
import importlib; importlib.invalidate_caches()
print(before + [find("models"), find("data")])
print(hpo.__file__, hpo.models.__file__)
"""
RIGHT = ["No module named 'models'", "No module named 'data'", "the user's models", "the user's data"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of the user's own, with modules that are called as our parts are."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("models", "data"):
        (folder / f"{name}.py").write_text(f'WHOSE = "the user\'s {name}"\n')
    return folder


@pytest.mark.timeout(300)
def test_a_wheel_leaves_models_and_data_to_the_user(tmp_path: Path, theirs: Path) -> None:
    """The image is made of the same wheel, so this is its layout too."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(unpacked)
    wanted = {f"{module.replace('.', '/')}/__init__.py" for module, file in MODULES.items() if file.stem == "__init__"}
    wanted |= {f"{module.replace('.', '/')}.py" for module, file in MODULES.items() if file.stem != "__init__"}
    of_page = ("report.html.j2", "report.css", "draw.js", "plotly-cartesian.min.js", "plotly-LICENSE.txt")
    ours = {"hpo/spec/template.toml", "hpo/launch/engines/docker-compose.yml", "hpo/py.typed"}
    assert held == wanted | ours | {f"hpo/view/report/{name}" for name in of_page}
    assert wheel.name.startswith("hpo_torch-")  # `hpo` is another project on the package index
    # The checkout's own path is taken away, as on a machine without it.
    code = f"sys.path = [p for p in sys.path if not p.startswith({str(ROOT)!r}) or 'site-packages' in p]\n"
    code += "sys.path = [p for p in sys.path if not p.endswith('.editable')]\n"
    who, files = isolated(code + WHO_WINS.format(theirs=str(theirs)), path=unpacked).splitlines()
    assert who == str(RIGHT)
    assert files.split() == [f"{unpacked}/hpo/__init__.py", f"{unpacked}/hpo/models/__init__.py"]


def test_an_editable_install_leaves_models_and_data_to_the_user(tmp_path: Path, theirs: Path) -> None:
    """The path file of an editable install is asked for as pip does it, and taken in place of an installed one."""
    code = f"import os; os.chdir({str(ROOT)!r}); from hatchling.build import build_editable; "
    code += f"print(build_editable({str(tmp_path)!r}))"
    with zipfile.ZipFile(tmp_path / isolated(code).splitlines()[-1]) as archive:
        [path_file] = [name for name in archive.namelist() if name.endswith(".pth")]
        [offered] = archive.read(path_file).decode().split()
    assert offered == str(ROOT / ".editable")
    assert os.listdir(offered) == ["hpo"]
    who, files = isolated(WHO_WINS.format(theirs=str(theirs)), path=Path(offered)).splitlines()
    assert who == str(RIGHT)
    assert [Path(file).resolve() for file in files.split()] == [ROOT / "hpo/__init__.py", ROOT / "models/__init__.py"]


def test_our_packages_resolve_to_this_checkout() -> None:
    import hpo
    from hpo import data, models

    assert [Path(package.__file__ or "").resolve().parent for package in (hpo, data, models)] == [
        ROOT / "hpo",
        ROOT / "data",
        ROOT / "models",
    ]
