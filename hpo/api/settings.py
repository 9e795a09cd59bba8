"""The settings of `hpo.search` for a function, as a study file would say them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from hpo.errors import SpecError

PARTS = {"sampler": "tpe", "pruner": "median"}  # settings that may be a name alone, with such a name
#: What users of Optuna write, and what they write here.
OF_OPTUNA = {
    "n_trials": "write trials=N",
    "n_jobs": "write workers=N; each worker is a process",
    "study_name": 'write name="..."',
    "directions": 'write objectives={"loss": "minimize", "size": "minimize"}',
    "load_if_exists": "leave it out; a study that exists is joined",
    "show_progress_bar": "write progress=True or progress=False",
    "catch": 'leave it out; a failed trial does not end the search, and failures={"exception": {"retries": 1}} tries it again',
    "callbacks": "leave it out; hpo.open(name).stop() ends a search from elsewhere",
    "gc_after_trial": 'leave it out; recovery={"recycle_trials": 1} starts a new process for each trial',
}

WAYS = 'a range is {"low": 0.0, "high": 1.0}, choices are {"choices": ["a", "b"]}'


def document(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with plain values: NumPy's numbers become Python's, a tuple or an array becomes a list.

    Raises SpecError for a setting of Optuna that has another name here, and for an object that no file could hold.
    """
    for key in settings.keys() & OF_OPTUNA.keys():
        raise SpecError(f"hpo.search: {key}: hpo does not take it; {OF_OPTUNA[key]}")
    return {key: _part(key, value) if key in PARTS else plain(value, key) for key, value in settings.items()}


def _part(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return plain(value, key)
    raise SpecError(
        f"hpo.search: {key} = {value!r}: each worker makes the {key} itself; give its name, such as {key}={PARTS[key]!r}, or "
        f'a dict with "name" and its options'
    )


def plain(value: Any, path: str) -> Any:
    """Return a value as a study file could hold it.

    Args:
        value: the value.
        path: where it stands, for the message.

    Raises SpecError for any other object.
    """
    value = _of_python(value)
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise SpecError(
        f"hpo.search: {path} = {value!r}: has type {type(value).__name__}; give a number, a text, a list or a dict; {WAYS}"
    )


def _of_python(value: Any) -> Any:
    """Return Python's own value for one of NumPy, and for a member of an enum that is a number or a text."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, Enum):
        if package == "optuna":  # StudyDirection, whose numbers mean nothing to a user
            return value.name.lower()
        return value.value if isinstance(value, int | float | str) else value
    return value.tolist() if package == "numpy" and hasattr(value, "tolist") else value
