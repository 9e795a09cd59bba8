"""Reads configurations to queue from a file: `[[start]]` tables, or a pinned config as `hpo export` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from hpo.errors import SpecError, located, shown
from hpo.spec import configuration, space, toml_file
from hpo.spec.study_file import StudySpec
from hpo.spec.training import SECTIONS


@dataclass(frozen=True, kw_only=True)
class ConfigurationFile:
    """The configurations of a file, and what of a pinned config the study cannot take."""

    configurations: list[dict[str, Any]]
    left: list[str]  # such as "training.epochs = 50; here it is always 20"


def read(path: Path, spec: StudySpec) -> ConfigurationFile:
    """Read the configurations of a file for a study. Raises SpecError if it holds none."""
    try:
        document = toml_file.read(path)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    with located(path):
        if "start" in document:
            try:
                return ConfigurationFile(configurations=configuration.tables(document["start"]), left=[])
            except PydanticCustomError as error:
                raise SpecError(f"start: {error.message()}") from None
        return _pinned(document, spec)


def _pinned(document: Mapping[str, Any], spec: StudySpec) -> ConfigurationFile:
    """Take the values of a pinned config that the study searches. Its other values must be the study's, or are told."""
    given = _values(document, spec)
    if spec.objective:
        return ConfigurationFile(configurations=[given], left=[])
    tree = spec.tree
    known = dict(space.parameters(tree))
    taken = {path: value for path, value in given.items() if path in known}
    if not taken:
        raise SpecError(f"holds no value of what the study searches: {shown(sorted(known))}")
    left = [configuration.why_left(tree, path, value) for path, value in given.items() if path not in known]
    return ConfigurationFile(configurations=[taken], left=[why for why in left if why])


def _values(document: Mapping[str, Any], spec: StudySpec) -> dict[str, Any]:
    """Return the values of a pinned config by path. Raises SpecError if it is none for this kind of study."""
    if spec.is_declared:
        part = {section: table for section in SECTIONS if isinstance(table := document.get(section), dict)}
        key = "training sections such as [optimizer]"
    else:
        key = "params" if spec.objective else "space"
        part = document.get(key, {})
        key = f"[{key}]"
    if not isinstance(part, dict) or not part:
        raise SpecError(f"holds neither [[start]] tables nor {key}, as a pinned config of this study has")
    if not spec.objective and (searched := dict(space.parameters(space.lift(part)))):
        path, parameter = next(iter(searched.items()))
        raise SpecError(
            f"{path}: is searched, {parameter}; give a pinned config as `hpo export` writes it, or [[start]]"
        )
    return configuration.flat(part)
