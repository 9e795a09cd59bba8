"""Optuna's private names stand in `hpo.storage.optuna_private` and nowhere else."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import optuna
import pytest

from tests.support.private_names import Reaches, names_of
from tests.test_layout import MODULES

HOME = "hpo.storage.optuna_private"


@cache
def looking() -> Reaches:
    return Reaches("optuna", names_of(Path(optuna.__file__).parent), trees().values())


@cache
def trees() -> dict[str, ast.AST]:
    return {module: ast.parse(file.read_text()) for module, file in MODULES.items()}


def test_one_module_names_what_is_private_to_optuna() -> None:
    found = {module: names for module, tree in trees().items() if (names := looking().of(tree))}
    assert found.pop(HOME) >= {"_storage", "_suggest", "optuna.study._frozen.FrozenStudy"}
    for module in ("hpo.models.dropout", "hpo.models.libraries"):
        assert found.pop(module) == {"_modules"}  # torch has that name too
    assert found == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from optuna._typing import JSONSerializable", "optuna._typing.JSONSerializable"),
        ("from optuna.trial._trial import Trial", "optuna.trial._trial.Trial"),
        ("from optuna.pruners import _filter_study", "optuna.pruners._filter_study"),
        ("import optuna.storages._rdb.models", "optuna.storages._rdb.models"),
        ("def id_of(study):\n    return study._study_id", "_study_id"),
        ("class A:\n    def of(self):\n        return self.study._storage", "_storage"),
        ("def id_of(trial):\n    return trial._trial_id", "_trial_id"),
        ("def id_of(trial):\n    return getattr(trial, '_trial_id', None)", "_trial_id"),
        ("def fits(distribution, value):\n    return distribution._contains(value)", "_contains"),
        ("class A(optuna.samplers.TPESampler):\n    def f(self):\n        return self._rng", "_rng"),
        ("class A(LeasedTrial):\n    def _suggest(self, name, distribution): ...", "_suggest"),
        ("class A(LeasedTrial):\n    def f(self):\n        return super()._check_distribution", "_check_distribution"),
    ],
)
def test_a_reach_into_optuna_is_seen(source: str, name: str) -> None:
    assert looking().of(ast.parse(source)) == {name}


def test_names_of_our_own_are_no_reach() -> None:
    source = (
        "class A:\n    def __init__(self, study):\n        self._storage = study\n        self._rng = self._storage"
    )
    assert looking().of(ast.parse(source)) == set()
