"""A study file read all the way: its grammar, its parts, its sampler and its pruner; defaults filled, ready to store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpo import pruning, sampling, usercode
from hpo.errors import SpecError
from hpo.spec import StudySpec


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """A resolved spec, the folder its user code resolves against, and that code's digest."""

    path: Path
    spec: StudySpec
    code_folder: Path
    code_digest: str


def read(path: Path, *, name: str | None = None, code_folder: Path | None = None) -> StudyFile:
    """Read and check a study file; SpecError names the file, the key, the value and the mend.

    Args:
        name: takes the place of the file's own name for the study.
        code_folder: where user code is looked for, if not in the file's folder.
    """
    return complete(StudySpec.load(path, name=name), path, code_folder=code_folder)


def complete(spec: StudySpec, path: Path, *, code_folder: Path | None = None) -> StudyFile:
    """Check what a loaded file's values mean and fill in all defaults."""
    folder = (code_folder or path.parent).absolute()
    try:
        resolved = resolve(spec, folder)
    except SpecError as error:
        raise SpecError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error.__cause__
    return StudyFile(path=path, spec=resolved, code_folder=folder, code_digest=digest_code(resolved, folder))


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Return the spec with every default filled and every value checked; SpecError names key, value and mend."""
    return pruning.resolve(sampling.resolve(resolve_parts(spec, folder)))


def resolve_parts(spec: StudySpec, folder: Path) -> StudySpec:
    """Check and fill the training sections, or import the user's own objective."""
    if spec.objective:
        usercode.load(spec.objective, folder, "objective")
        return spec
    from hpo import parts  # torch comes in here, and only for a spec that trains with it

    return parts.resolve(spec, folder)


def digest_code(spec: StudySpec, folder: Path) -> str:
    """Return the digest of the user's own code and files of weights that a spec names, "" if it names none."""
    if spec.objective:
        return usercode.digest(spec.code_references, folder)
    from hpo import parts

    weights = [folder / Path(name).expanduser() for name in parts.weights(spec)]
    return usercode.digest(spec.code_references, folder, weights)


def load_and_digest(spec: StudySpec, folder: Path) -> str:
    """Import the user's own code that a stored spec names, from this folder, and return its digest."""
    for reference in spec.code_references:
        usercode.load(reference, folder, "code")
    return digest_code(spec, folder)
