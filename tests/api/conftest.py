"""A folder to search in."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

MINE = """
def objective(trial):
    x = trial.suggest_float("x", -10, 10)
    trial.report(x**2, 1)
    return x**2

def two(trial):
    x = trial.suggest_float("x", 0, 1)
    return x, 1 - x

def train(config, trial):
    trial.report(config["optimizer"]["lr"], 1)
    return config["optimizer"]["lr"] * config["factor"]

def failing(trial):
    raise ValueError("no such luck")
"""
FILE = """
name = "own"
objective = "mine.py:objective"
direction = "minimize"
sampler = { name = "random" }
[budget]
trials = 4
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: with a module of objectives and a study file."""
    monkeypatch.chdir(tmp_path)
    for name in ("HPO_STORAGE", "HPO_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.toml").write_text(FILE)
    return tmp_path


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of objectives, imported as a user does."""
    monkeypatch.syspath_prepend(here)
    return importlib.import_module("mine")
