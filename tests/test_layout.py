"""The shape of the source: which packages a module may know, which way imports point, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hpo", "models", "data")
HEAVY = {"torch", "optuna", "sqlalchemy"}
DATABASE = {"optuna", "sqlalchemy"}
TORCH = {"torch", "torchinfo", "torchvision"}

# One trial's way from the command line to a row, from the top down: a module imports only from layers below its own.
LAYERS = [
    ["hpo.__main__"],
    ["hpo.cli"],
    ["hpo.cli.run", "hpo.cli.show", "hpo.cli.manage", "hpo.cli.results", "hpo.cli.after"],
    ["hpo.cli.app"],
    [
        "hpo.launch.launcher",
        "hpo.final.openings",
        "hpo.study.fork",
        "hpo.worker.loop",
        "hpo.final.user_objective",
        "hpo.study.doctor",
    ],
    ["hpo.final.after.report"],
    ["hpo.final.after.trained"],
    ["hpo.worker.objective", "hpo.final.train", "hpo.train.build.check", "hpo.launch.local"],
    [
        "hpo.view.checked",
        "hpo.view.live",
        "hpo.view.dashboard",
        "hpo.view.variants",
        "hpo.final.trajectory",
    ],
    ["hpo.worker.stacked_runner"],
    ["hpo.worker.runner", "hpo.worker.checkpoints"],
    ["hpo.worker.attempt"],
    ["hpo.worker.pending_reports", "hpo.train.build.executor", "hpo.train.build.costs"],
    [
        "hpo.study.export",
        "hpo.train.build.assemble",
        "hpo.final.tensorboard",
        "hpo.search.lint",
        "hpo.worker.trial",
        "hpo.worker.heartbeat",
        "hpo.study.retention",
    ],
    ["hpo.final.after.steps", "hpo.final.after.files"],
    ["hpo.final.after.deployed", "hpo.final.after.fold", "hpo.final.after.prune", "hpo.final.after.quantize"],
    [
        "hpo.final.after.extras",
        "hpo.final.after.onnxrun",
        "hpo.final.after.precision",
        "hpo.final.after.scores",
        "hpo.final.after.mcdropout",
    ],
    ["hpo.final.after.raw"],
    ["hpo.train.stack.select", "hpo.train.stack.sizing"],
    ["hpo.train.stack.stack", "hpo.train.stack.forward", "hpo.train.stack.vmap_forward"],
    ["hpo.train.stack.broadcast_optimizers"],
    ["hpo.train.stack.layers", "hpo.train.stack.row_optimizers"],
    ["hpo.train.stack.dropout_masks", "hpo.train.stack.row_averages", "hpo.train.stack.row_monitors"],
    ["hpo.worker.lease"],
    [
        "hpo.study.results",
        "hpo.worker.client",
        "hpo.queue.reaper",
        "hpo.study.control",
        "hpo.study.resolve",
        "hpo.launch.gpus",
        "hpo.launch.fork_server",
        "hpo.launch.preload",
    ],
    ["hpo.study.status", "hpo.study.finished", "hpo.study.trial_history", "hpo.queue.claiming", "hpo.queue.workers"],
    ["hpo.study.query"],
    ["hpo.study.study", "hpo.train.build.registry"],
    ["hpo.queue.ledger", "hpo.search.samplers"],
    ["hpo.queue.finish", "hpo.storage.retry", "hpo.queue.report", "hpo.queue.start"],
    ["hpo.storage.connect", "hpo.search.tpe", "hpo.train.loop"],
    ["hpo.train.run", "hpo.train.validation"],
    ["hpo.search.pruners", "hpo.train.optim.penalties"],
    ["hpo.search.pareto_pruner"],
    ["hpo.search.array_pruners"],
    ["hpo.storage.optuna_storage"],
    ["hpo.storage.trial_cache", "hpo.storage.trial_writes"],
    ["hpo.storage.finished_trials"],
    ["hpo.storage.trial_rows"],
    ["hpo.worker.restart"],
    [
        "hpo.spec.study_file",
        "hpo.study.pareto",
        "hpo.storage.sql",
        "hpo.train.optim.optimizers",
        "hpo.train.optim.losses",
        "hpo.train.optim.averaging",
        "hpo.train.stack.flat_parameters",
        "hpo.train.optim.sam",
        "hpo.train.optim.warmup",
        "hpo.train.checkpoint",
        "hpo.train.pixels",
        "hpo.train.epoch",
        "hpo.train.randomness",
        "hpo.train.early_stopping",
        "hpo.train.eval_metrics",
        "hpo.train.monitors",
        "hpo.train.stack.architecture",
        "hpo.train.build.measurement_cache",
    ],
    [
        "hpo.spec.training",
        "hpo.spec.objectives",
        "hpo.storage.tables",
        "hpo.storage.engine",
        "hpo.train.optim.muon",
        "hpo.train.optim.sgdw",
        "hpo.train.optim.schedules",
    ],
    ["hpo.spec.metrics"],
    [
        "hpo.spec.options",
        "hpo.spec.space",
        "hpo.spec.usercode",
        "hpo.spec.curve",
        "hpo.spec.durations",
        "hpo.spec.failures",
        "data",
        "models",
        "hpo.train.optim.param_groups",
        "hpo.train.batches",
        "hpo.train.precision",
    ],
    [
        "hpo.errors",
        "hpo.queue.models",
        "hpo.spec.seeds",
        "hpo.worker.signals",
        "hpo.receipt",
        "hpo.files",
        "hpo.storage.filesystem",
        "hpo.queue.clock",
        "hpo.study.format",
    ],
    [  # packages; they import nothing of ours
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in sorted((ROOT / "hpo").rglob("__init__.py"))
        if file.parent.name not in ("cli",)
    ],
]
HEIGHT = {module: -depth for depth, layer in enumerate(LAYERS) for module in layer}


def modules() -> dict[str, Path]:
    """Return every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(module: str, *, everywhere: bool = True) -> Iterator[str]:
    """Yield the dotted names that a module imports, at its top or anywhere, but for those under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not everywhere:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            # `from hpo import space` names a module, `from hpo.space import Range` something in one.
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in named)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(MODULES[module].read_text()))


def roots(module: str, *, everywhere: bool = True) -> set[str]:
    """Return the top-level packages that a module imports."""
    return {name.partition(".")[0] for name in imports(module, everywhere=everywhere)}


def group(*prefixes: str) -> list[str]:
    return [name for name in MODULES if any(name == p or name.startswith(f"{p}.") for p in prefixes)]


def test_our_packages_resolve_to_this_checkout() -> None:
    import data
    import hpo
    import models

    for package in (data, hpo, models):
        assert Path(package.__file__ or "").parent.parent == ROOT


@pytest.mark.parametrize("module", group("models", "data"))
def test_models_and_data_know_torch_and_its_like_and_nothing_of_studies(module: str) -> None:
    own = module.partition(".")[0]
    allowed = {
        "torch",
        "torchvision",
        "numpy",
        "sklearn",
        "annotated_types",
        "filelock",
        "PIL",
        own,
    } | sys.stdlib_module_names
    assert roots(module) - allowed == set()


@pytest.mark.parametrize("module", group("hpo.train"))
def test_training_knows_no_database(module: str) -> None:
    allowed = {"torch", "torchinfo", "torchmetrics", "annotated_types", "pytorch_optimizer", "hpo", "models", "data"}
    allowed |= sys.stdlib_module_names
    assert roots(module) - allowed == set()


WRITERS = [
    "hpo.spec.study_file",
    "hpo.spec.space",
    "hpo.spec.curve",
    "hpo.spec.training",
    "hpo.spec.metrics",
    "hpo.spec.options",
    "hpo.spec.usercode",
    "hpo.errors",
    "hpo.spec.seeds",
    "hpo.worker.signals",
    "hpo.spec.failures",
    "hpo.spec.durations",
    "hpo.storage.connect",
    "hpo.queue.ledger",
    "hpo.study.study",
    "hpo.worker.trial",
    "hpo.search.samplers",
    "hpo.search.pruners",
    "hpo.study.query",
    "hpo.study.status",
    "hpo.study.finished",
    "hpo.study.trial_history",
    "hpo.study.results",
    "hpo.study.fork",
    "hpo.worker.loop",
    "hpo.worker.lease",
    "hpo.worker.client",
    "hpo.queue.claiming",
    "hpo.queue.finish",
    "hpo.queue.reaper",
    "hpo.queue.workers",
    "hpo.study.control",
    "hpo.worker.heartbeat",
    "hpo.storage.retry",
    "hpo.worker.pending_reports",
    "hpo.study.retention",
    "hpo.worker.restart",
    "hpo.study.doctor",
    "hpo.queue.report",
    "hpo.queue.start",
    "hpo.queue.models",
    "hpo.search.tpe",
    "hpo.search.array_pruners",
    "hpo.search.pareto_pruner",
    "hpo.spec.objectives",
]


@pytest.mark.parametrize("module", [*WRITERS, *group("hpo.storage")])
def test_what_writes_to_the_study_knows_no_torch(module: str) -> None:
    assert roots(module) & (TORCH | {"models", "data"}) == set()


@pytest.mark.parametrize("module", group("hpo.storage"))
def test_the_storage_s_package_knows_no_study_of_ours(module: str) -> None:
    allowed = ("hpo.storage", "hpo.errors")
    assert [name for name in imports(module) if name.startswith("hpo") and not name.startswith(allowed)] == []


def test_no_module_knows_both_optuna_and_torch() -> None:
    assert [name for name in MODULES if {"optuna", "torch"} <= roots(name)] == []


@pytest.mark.parametrize("module", [*group("hpo.cli", "hpo.__main__", "hpo.launch"), "hpo"])
def test_the_command_line_and_the_launcher_name_nothing_heavy_at_their_top(module: str) -> None:
    assert roots(module, everywhere=False) & (HEAVY | TORCH) == set()


def names_in(module: str, wanted: str) -> bool:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        found = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if found == wanted:
            return True
    return False


def test_only_assembly_and_the_final_training_name_the_test_split() -> None:
    assert {module for module in group("hpo") if names_in(module, "load_test")} == {
        "hpo.train.build.assemble",
        "hpo.final.train",
    }
    users = [
        module
        for module in group("hpo")
        if module != "hpo.train.build.assemble" and "load_test" in MODULES[module].read_text()
    ]
    assert users == ["hpo.final.train"]


def test_only_these_know_optunas_private_modules() -> None:
    private = [
        module for module in MODULES if any(part.startswith("_") for n in imports(module) for part in n.split("."))
    ]
    assert [m for m in private if any(n.startswith("optuna.") and "._" in n for n in imports(m))] == [
        "hpo.storage.optuna_storage",
        "hpo.storage.tables",
    ]


def test_every_module_has_its_layer() -> None:
    ours = {module for module in MODULES if module.partition(".")[0] == "hpo"} | {"data", "models"}
    assert sorted(HEIGHT) == sorted(ours)


@pytest.mark.parametrize("module", group("hpo"))
def test_imports_point_one_way(module: str) -> None:
    upward = []
    for name in set(imports(module)):
        target = name.partition(".")[0] if name.startswith(("data", "models")) else name
        package = module.startswith(f"{target}.")  # a package's own __init__, which imports nothing
        if target in HEIGHT and not package and HEIGHT[target] >= HEIGHT[module]:
            upward.append(target)
    assert upward == []


def isolated(code: str, *, path: Path | None = None) -> str:
    """Run code in a fresh interpreter, from a folder without our packages; return what it prints."""
    code = (f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "import sys\n") + code
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_launcher_never_loads_torch() -> None:
    assert (
        isolated("import hpo.launch.launcher, hpo.launch.local, hpo.view.live; print('torch' in sys.modules)")
        == "False"
    )


def test_models_and_data_load_torchvision_only_when_it_is_needed() -> None:
    assert isolated("import models, data; print('torchvision' in sys.modules)") == "False"


def test_importing_hpo_loads_nothing_heavy() -> None:
    heavy = sorted(HEAVY | {"numpy", "pydantic", "rich"})
    assert isolated(f"import hpo; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.timeout(300)
def test_a_wheel_holds_the_three_packages_and_the_template_and_they_import_from_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "unpacked")
    wanted = {str(file.relative_to(ROOT)) for file in MODULES.values()} | {"hpo/spec/template.toml"}
    assert held == wanted
    found = isolated(
        "import data, hpo, models\nfrom importlib import resources\n"
        "print(*[m.__file__ for m in (hpo, models, data)], resources.files('hpo') / 'spec/template.toml')",
        path=tmp_path / "unpacked",
    )
    assert found.split() == [
        f"{tmp_path}/unpacked/{name}"
        for name in ("hpo/__init__.py", "models/__init__.py", "data/__init__.py", "hpo/spec/template.toml")
    ]
