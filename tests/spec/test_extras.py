"""How an extra is installed: what a message says can be pasted, and a stranger's distribution is never named."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from hpo.spec import extras
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_checkout_stays_editable_and_pinned() -> None:
    assert shlex.split(extras.install("int8")) == [
        *("pip", "install", "--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[int8]")
    ]


def test_an_installed_wheel_is_named_as_the_project_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    assert extras.install("onnx") == f"pip install '{PROJECT['name']}[onnx]'"
    assert PROJECT["name"] != extras.FORMER


def test_each_extra_that_is_asked_for_is_one_of_the_project() -> None:
    known = PROJECT["optional-dependencies"]
    assert [extra for extra in extras.EXTRAS if extra not in known] == []
