"""The user's own training of a study file as a function of one trial: an objective, `train`, or a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.spec import space, usercode
from hpo.spec.study_file import StudySpec

if TYPE_CHECKING:
    import optuna

Function = Callable[["optuna.Trial"], Any]  # returns a value, or one value per objective


def load(spec: StudySpec, folder: Path) -> Function:
    """Import the user's code, or find the command's program, and return the function that trains one trial.

    Args:
        spec: a spec that is not declared.
        folder: the folder that its references are relative to.

    Raises SpecError if the code cannot be imported or called, or if there is no such program.
    """
    if spec.command is not None:
        from hpo.own.command import CommandTraining

        return CommandTraining(spec, folder)
    if spec.processes > 1:
        from hpo.own.ranked import RankedTraining

        return RankedTraining(spec, folder)
    if spec.train:
        return _with_config(usercode.load_function(spec.train, folder, "train", ("config", "trial")), spec.tree)
    assert spec.objective is not None
    return usercode.load_objective(spec.objective, folder)  # type: ignore[no-any-return]


def _with_config(train: Callable[[space.Tree, optuna.Trial], Any], tree: space.Tree) -> Function:
    """Return a function that calls `train` with the tree at the trial's values."""
    return lambda trial: train(space.suggest(tree, trial), trial)
