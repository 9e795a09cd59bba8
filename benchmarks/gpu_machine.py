"""Names a Python for `make gpu`: the given one if it has all that is needed, else an environment on top of it.

A GPU machine has its own torch, which is gigabytes large and fits its driver. So nothing that is there is installed again:
`.venv-gpu` sees the packages of the interpreter that makes it, and gets those that are missing. Without a network
they come from a folder of wheels.

    python3 benchmarks/gpu_machine.py            prints the path of a Python
    python3 benchmarks/gpu_machine.py .whl       takes missing packages from wheels in this folder

It needs nothing but Python's own library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".venv-gpu"
#: What the tests that need a GPU import, and what the benchmark imports; `pyproject.toml` has their versions.
NEEDS = (
    "annotated-types", "cloudpickle", "filelock", "numpy", "optuna", "pillow", "psutil", "psycopg", "pydantic", "pytest",
    "pytest-timeout", "scikit-learn", "sqlalchemy", "tomli-w", "torch", "torchinfo", "torchvision", "typer",
)  # fmt: skip


def requirements() -> dict[str, str]:
    """Return the requirement of each package of NEEDS, as `pyproject.toml` says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    by_name = {name_of(line): line for line in said}
    return {name: by_name.get(name, name) for name in NEEDS}


def name_of(requirement: str) -> str:
    """Return the package that a requirement names."""
    return re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0]


def missing(path: list[str], wanted: dict[str, str]) -> list[str]:
    """Return the requirements that the packages on a path do not meet."""
    found = versions(path)
    return [line for name, line in wanted.items() if not meets(found.get(canonical(name)), line)]


def versions(path: list[str]) -> dict[str, str]:
    """Return the versions of the packages on a path by name. The first one on the path is the one that is imported."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions(path=path):
        found.setdefault(canonical(one.metadata["Name"] or ""), one.version)
    return found


def canonical(name: str) -> str:
    """Return a package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def meets(version: str | None, requirement: str) -> bool:
    """Return whether a version is at least the one that a requirement asks for. Upper bounds are left to pip."""
    if version is None:
        return False
    least = re.search(r">=([\d.]+)", requirement)
    return least is None or numbers(version) >= numbers(least[1])


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version, maxsplit=1)[0]))


def python(wheels: str | None) -> str:
    """Return the path of a Python that has all that is needed; SystemExit if what is missing cannot be installed."""
    wanted = requirements()
    lacking = missing(sys.path, wanted)
    if not lacking:
        return sys.executable
    print(f"== {sys.executable} lacks {', '.join(lacking)}; using {HOME.name}", file=sys.stderr)
    if not (HOME / "bin" / "python").exists():
        venv.create(HOME, with_pip=importlib.util.find_spec("pip") is None)  # Debian's Python alone cannot make one
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(HOME), "platbase": str(HOME)}))
    below = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir()]
    (packages / "below.pth").write_text("".join(f"{path}\n" for path in below))
    lacking = missing([str(packages), *below], wanted)
    own = str(HOME / "bin" / "python")
    if lacking:
        command = installing(own, lacking, versions([str(packages), *below]), wheels)
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise SystemExit(
                "make gpu: the packages above could not be installed. Without a network, carry their wheels and those of "
                "what they need: make gpu WHEELS=FOLDER"
            )
    return own


def installing(own: str, lacking: list[str], there: dict[str, str], wheels: str | None) -> list[str]:
    """Return the command that installs what is lacking for a Python, and leaves the torch that is there."""
    new = {name_of(line) for line in lacking}
    kept = [f"{name}=={there[name]}" for name in ("torch", "torchvision") if name in there and name not in new]
    source = ["--no-index", "--find-links", wheels] if wheels else []
    return [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source, *lacking, *kept]


if __name__ == "__main__":
    print(python(sys.argv[1] if len(sys.argv) > 1 else None))
