"""The two commands of the README install once."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def planned(folder: Path, target: str) -> str:
    """Return what `make TARGET` would do there."""
    done = subprocess.run(["make", "--dry-run", target], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_what_a_new_checkout_installs(checkout: Path) -> None:
    """A new checkout installs pinned versions and what each command needs."""
    assert "-m venv .venv" in planned(checkout, "demo")
    assert "--constraint constraints.txt --editable ." in planned(checkout, "demo")
    assert ".[test]" not in planned(checkout, "demo")
    assert planned(checkout, "test").count("pip install") == 1
    assert ".[test]" in planned(checkout, "test")
    assert "mkdocs build --strict" in planned(checkout, "check")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_second_run_installs_nothing_until_the_pins_change(checkout: Path, target: str) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "run.stamp", "test.stamp"):
        (checkout / ".venv" / name).touch()
    assert "pip install" not in planned(checkout, target)
    assert "venv .venv" not in planned(checkout, target)
    later = time.time() + 60
    os.utime(checkout / "constraints.txt", (later, later))
    assert "pip install" in planned(checkout, target)


@pytest.mark.parametrize(
    ("goals", "is_parallel"), [(["test"], True), (["clean", "demo"], False), (["demo", "test"], False)]
)
def test_two_goals_are_made_one_after_the_other(checkout: Path, goals: list[str], is_parallel: bool) -> None:
    """Else one of them would remove or fill .venv while the other one does."""
    command = ["make", "--dry-run", "--print-data-base", *goals]
    without = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of the `make test` above
    done = subprocess.run(command, cwd=checkout, env=without, capture_output=True, text=True, check=True)
    (flags,) = [line for line in done.stdout.splitlines() if line.startswith("MAKEFLAGS = ")]
    assert ("-j2" in flags) is is_parallel


def test_the_demo_runs_the_readme_s_commands_in_order(checkout: Path) -> None:
    plan = planned(checkout, "demo")
    steps = [
        plan.index(f"hpo {command}") for command in ("run examples/digits.toml", "export digits", "train best.toml")
    ]
    assert steps == sorted(steps)


def test_no_pin_names_a_registry(checkout: Path) -> None:
    lines = (checkout / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if "@" in line or "://" in line] == []
