"""The whole draft: look at data, then write the study file."""

from __future__ import annotations

from pathlib import Path

from hpo.data import Source, some
from hpo.data.files import BadFile
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
        raise SpecError(f"--from {path}: {first.removeprefix(f'{path}: ')}", *more) from error
    except ValueError as error:
        raise SpecError(f"--from {path}: {error}") from error
    about = f"Drafted by `hpo init --from {path}`: {_described(found.source)}.\n`hpo check` explains it."
    return page(about, sections(found.source, name, Section("data", found.lines)))


def _described(source: Source) -> str:
    """Return number, kind and task in words."""
    count = f"{len(source.targets):,}"
    if isinstance(source.inputs, dict):
        columns = {key: one.shape[1] for key, one in source.inputs.items()}
        said = f"{count} rows of " + " and ".join(f"{number} {key}" for key, number in columns.items())
    else:
        kind = {"image": "images", "features": "rows of features", "series": "series", "tokens": "texts"}[source.kind]
        said = f"{count} {kind} of {list(some(source.inputs).shape[1:])}"
    outputs = {
        "classification": f"{source.num_classes} classes",
        "binary": "yes or no",
        "multilabel": f"{source.outputs} labels each",
        "regression": f"{source.outputs} number{'s' * (source.outputs > 1)} to predict",
    }
    return f"{said}; {source.task}, {outputs[source.task]}"
