"""The whole draft: look at data, then write the study file."""

from __future__ import annotations

from pathlib import Path

from hpo.data import Source, some
from hpo.data.files import BadFile
from hpo.data.inputs import CATEGORIES, NUMBERS
from hpo.errors import SpecError
from hpo.train.draft.advice import sections
from hpo.train.draft.look import look
from hpo.train.draft.page import Section, page


def draft(name: str, path: Path, target: str | None, folder: Path) -> str:
    """Return a study file that runs on this data; SpecError says why the data cannot be used.

    Args:
        name: the study's name.
        path: a folder of images, or a file of a table or of arrays.
        target: column of a table to predict; None: the one with a usual name.
        folder: folder of the study file.
    """
    try:
        found = look(path, target, folder)
    except BadFile as error:
        first, *more = error.lines
        said = first if first.startswith(str(path)) else f"{path}: {first}"
        raise SpecError(f"--from {said}", *more) from error
    except ValueError as error:
        raise SpecError(f"--from {path}: {error}") from error
    about = f"Drafted from {path}: {_described(found.source)}.\n`hpo check` explains it."
    return page(about, sections(found.source, name, Section("data", found.lines)))


def _described(source: Source) -> str:
    """Return number, kind and task in words."""
    count = f"{len(source.targets):,}"
    if isinstance(source.inputs, dict):
        words = {NUMBERS: "numeric", CATEGORIES: "categorical"}
        columns = [f"{one.shape[1]} {words[key]}" for key, one in source.inputs.items()]
        said = f"{count} rows of {' and '.join(columns)} columns"
    elif source.kind == "tokens":
        said = f"{count} texts of {some(source.inputs).shape[1]} tokens at most"
    else:
        kind = {"image": "images", "features": "rows of features", "series": "series"}[source.kind]
        said = f"{count} {kind} of {list(some(source.inputs).shape[1:])}"
    outputs = {
        "classification": f"{source.num_classes} classes",
        "binary": "yes or no",
        "multilabel": f"{source.outputs} labels each",
        "regression": f"{source.outputs} number{'s' * (source.outputs > 1)} to predict",
    }
    return f"{said}; {source.task}, {outputs[source.task]}"
