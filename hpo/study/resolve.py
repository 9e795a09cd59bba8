"""Resolves a study file: checks its grammar, parts, sampler and pruner, and fills in all defaults."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpo.errors import Mistakes, SpecError, located
from hpo.own import training
from hpo.spec import configuration, space, usercode
from hpo.spec.configuration import Configuration
from hpo.spec.program import Command
from hpo.spec.study_file import StudySpec, read_document
from hpo.spec.training import SECTIONS, TrainConfig


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """A resolved spec, the folder of its user code, and that code's digest."""

    path: Path
    loaded: StudySpec  # before it was resolved
    spec: StudySpec
    code_folder: Path
    code_digest: str

    def joining(self, study: StudySpec) -> StudyFile:
        """Return the file as it joins a study: in its format and with its split seed, unless the file names its own.

        Raises SpecError if that format refuses the file.
        """
        file = self
        if study.format != self.spec.format and "format" not in self.loaded.model_fields_set:
            with located(self.path):
                loaded = self.loaded.in_format(study.format)
            file = complete(loaded, self.path, code_folder=self.code_folder)
        return file.split_like(study)

    def split_like(self, study: StudySpec) -> StudyFile:
        """Return the file with the split seed of a study, unless the file names its own."""
        if self.spec.split_seed == study.split_seed or (loaded := self.loaded.split_like(study)) is self.loaded:
            return self
        return complete(loaded, self.path, code_folder=self.code_folder)


def read(path: Path, *, name: str | None = None, code_folder: Path | None = None) -> StudyFile:
    """Read and check a study file. Raises SpecError with the file, the key, the value and the mend.

    Args:
        path: the file.
        name: the study's name, in place of the file's own.
        code_folder: the folder of the user's code; by default the file's folder.
    """
    document, mistakes = read_document(path), Mistakes()
    with mistakes.collect():
        return complete(StudySpec.load(path, name=name), path, code_folder=code_folder)
    with mistakes.collect(), located(path):
        _refuse_rest(document, (code_folder or path.parent).absolute())
    mistakes.raise_if_any()
    raise AssertionError("what was collected was raised")


def _refuse_rest(document: Mapping[str, Any], folder: Path) -> None:
    """Check the values of a document whose grammar is wrong somewhere. Raises SpecError that lists the mistakes."""
    if document.keys() & {*usercode.OWN, "space"}:
        return
    from hpo.strategy import pruners, samplers
    from hpo.train.build import registry

    rest, mistakes = StudySpec.rest_of(document), Mistakes()
    with mistakes.collect():
        registry.refuse_searches(rest)
    with mistakes.collect():
        registry.refuse_wrong_sections({section: table for section, table in rest.tree.items() if table}, folder)
    for check in (samplers.resolve, pruners.resolve):
        with mistakes.collect():
            check(rest)
    mistakes.raise_if_any()


def complete(spec: StudySpec, path: Path, *, code_folder: Path | None = None) -> StudyFile:
    """Resolve a loaded file. Raises SpecError likewise."""
    folder = (code_folder or path.parent).absolute()
    with located(path):
        resolved = resolve(spec, folder)
    return StudyFile(
        path=path, loaded=spec, spec=resolved, code_folder=folder, code_digest=digest_code(resolved, folder)
    )


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Check every value and fill in every default. Raises SpecError with key, value and mend."""
    from hpo.strategy import pruners, samplers

    mistakes = Mistakes()
    for step in (partial(resolve_parts, folder=folder), samplers.resolve, pruners.resolve):
        with mistakes.collect():
            spec = step(spec)
    mistakes.raise_if_any()
    if not spec.start:
        return spec
    _refuse_keys_of_the_file(spec)
    found = check_configurations(spec, spec.start, word="[[start]]")
    return spec.model_copy(update={"start": [one.values for one in found]})


def _refuse_keys_of_the_file(spec: StudySpec) -> None:
    """Raise SpecError for a key such as `seed` that TOML reads as a part of a `[[start]]` table, since it stands below it."""
    keys = StudySpec.model_fields.keys() - spec.tree.keys() - {*SECTIONS} if spec.tree else set[str]()
    for key in (key for one in spec.start for key in one if key in keys):
        raise SpecError(f"{key}: stands below [[start]], so TOML takes it for a part of that; write it above")


def check_configurations(spec: StudySpec, given: Sequence[Mapping[str, Any]], *, word: str = "") -> list[Configuration]:
    """Check configurations against the space of a resolved spec. Raises SpecError that lists all mistakes.

    The space of a user's own objective is not known here, so only a missing value of its grid is a mistake.

    Args:
        spec: the spec.
        given: values by path, or nested tables of them.
        word: what a configuration is called in messages.
    """
    from hpo.strategy import samplers

    tree, is_grid = spec.tree, samplers.settled(spec).sampler["name"] == "grid"

    def check(values: dict[str, Any]) -> Configuration:
        if tree:
            return configuration.checked(tree, values, is_grid=is_grid)
        configuration.refuse_missing([path for path in spec.sampler.get("search_space", {}) if path not in values])
        return Configuration(values=values, missing=[])

    return configuration.each(given, check, word)


def resolve_parts(spec: StudySpec, folder: Path) -> StudySpec:
    """Resolve the training sections, or import the user's own training."""
    if not spec.is_declared:
        training.load(spec, folder)
        return spec
    from hpo.train.build import registry  # loads torch, and only for a spec with training sections

    return registry.resolve(spec, folder)


def refuse_missing_data(found: StudyFile) -> None:
    """Raise SpecError if a file or folder that the file's [data] names is not on this machine."""
    if not found.spec.is_declared:
        return
    from hpo.train.build import registry

    with located(found.path):
        registry.refuse_missing_data(found.spec, found.code_folder)


def digest_code(spec: StudySpec, folder: Path) -> str:
    """Return the digest of the user's code and weight files that a spec names, "" if it names none."""
    if not spec.is_declared:
        named = Command.parse(spec.command).code(folder) if spec.command else ()
        return usercode.digest(spec.code_references, folder, named)
    from hpo.train.build import registry

    weights = [folder / Path(name).expanduser() for name in registry.weights(spec)]
    return usercode.digest(spec.code_references, folder, weights)


def data_digest(spec: StudySpec, folder: Path) -> str | None:
    """Return the digest of a declared spec's training and validation data, as its workers compute it; None for a user's own.

    Raises SpecError if the data cannot be read.
    """
    if not spec.is_declared:
        return None
    from hpo.train.build import assemble

    config = TrainConfig.from_tree(next(space.variants(spec.tree)))
    return assemble.data_digest(config, spec.split_seed, folder)


def load_and_digest(spec: StudySpec, folder: Path) -> str:
    """Import the user's code that a stored spec names, from this folder, and return its digest."""
    for reference in spec.code_references:
        usercode.load(reference, folder, "code")
    return digest_code(spec, folder)


def check_stored(spec: StudySpec, folder: Path) -> str:
    """Return the digest of the user's code that a stored spec names, "" if it names none.

    For a spec without files of the user, the answer changes only with `hpo` and its packages. So it is cached on this
    machine, and torch is not loaded again.

    Raises SpecError if the spec or its code cannot be loaded.
    """
    from hpo.train.build import measurement_cache

    key = None if spec.own_kind or spec.code_references else f"loads-{_made_from(spec)}"
    if key and measurement_cache.recall(key):
        return ""
    digest = load_and_digest(spec, folder)
    resolve(spec, folder)
    if key and not _names_files(spec):
        measurement_cache.keep(key, True)
    return digest


def _names_files(spec: StudySpec) -> bool:
    from hpo.train.build import registry

    return bool(registry.weights(spec))


def _made_from(spec: StudySpec) -> str:
    """Return the digest of all that decides whether a spec without user code can be loaded."""
    packages = Path(sysconfig.get_path("purelib")).stat().st_mtime_ns  # changes when a package comes or goes
    found = hashlib.sha256(repr((spec.document, spec.format, sys.version, packages)).encode())
    for folder, _, names in sorted(os.walk(Path(__file__).parents[1], followlinks=True)):
        for name in sorted(names):
            if name.endswith(".py"):
                found.update(Path(folder, name).read_bytes())
    return found.hexdigest()[:32]
