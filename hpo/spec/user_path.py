"""The user's folders on `sys.path`: first, as for `python train.py`, unless a module in them has a name that is taken."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import hpo
from hpo.errors import SpecError

#: Names that a library may install at top level by mistake, and never imports: they stay the user's.
THEIRS = frozenset(
    {"benchmarks", "data", "docs", "examples", "models", "scripts", "test", "tests", "tools", "train", "utils"}
)
_opened: list[tuple[Path, ...]] = []  # what `put_first` was given in this process


def put_first(folders: tuple[Path, ...]) -> None:
    """Put folders first on `sys.path`, in this order, and drop loaded modules that would win over modules in them.

    Raises SpecError for a module in them that is named like one of Python's, of our dependencies' or `hpo`, and for two
    modules of one name where user code comes from several folders.
    """
    if folders in _opened:
        return
    for folder in folders:
        refuse_taken_names(folder)
    if _opened:
        _refuse_doubles({folder for opened in (*_opened, folders) for folder in opened})
    for folder in folders:
        _drop_strays(folder)
    first = [str(folder) for folder in folders]
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in first)]
    _opened.append(folders)


def refuse_taken_names(folder: Path) -> None:
    """Raise SpecError that lists the modules in a folder whose names are taken, with the mend."""
    lines = []
    for name, file in sorted(_modules(folder)):
        owner = _owner(name, file, folder)
        if owner:
            mine = file if file.stem == name else file.parent
            lines.append(
                f"{mine} is named like {owner}, and one would be imported in place of the other; "
                f"rename it, such as my_{mine.name}"
            )
    if lines:
        raise SpecError(*lines)


def refuse_taken_names_before(entry: str) -> None:
    """Raise SpecError for such modules in the folders that the user's code has put in front of an entry of `sys.path`."""
    for folder in sys.path[: sys.path.index(entry)] if entry in sys.path else []:
        if Path(folder).name not in ("site-packages", "dist-packages"):
            refuse_taken_names(Path(folder))


def is_file(known: str | None, file: Path) -> bool:
    """Say whether the file of a module or a spec, if it has one, is this file."""
    return known is not None and os.path.exists(known) and os.path.samefile(known, file)


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each module and regular package in a folder.

    A folder without `__init__.py` is left out, for it never wins over a module of its name.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        init = entry / "__init__.py"
        name = entry.name if init.is_file() else inspect.getmodulename(entry.name)
        if name and name.isidentifier() and not name.startswith("__"):
            yield name, init if init.is_file() else entry


def _owner(name: str, file: Path, folder: Path) -> str | None:
    """Return in words whose module has this name already; None if the name is free."""
    if name == "hpo":
        return None if is_file(hpo.__file__, file) else "hpo itself"
    if name in THEIRS:
        return None
    if name in sys.stdlib_module_names:
        return f"Python's own module {name!r}"
    elsewhere = PathFinder.find_spec(name, [entry for entry in sys.path if not is_file(entry, folder)])
    if elsewhere is None or is_file(elsewhere.origin, file) or name not in _packages_we_need():
        return None
    return f"the installed package {_packages_we_need()[name]!r}, which hpo needs"


@cache
def _packages_we_need() -> dict[str, str]:
    """Return what is importable of the distributions that `hpo` needs, directly or not, with each one's distribution."""
    needed: set[str] = set()
    left = ["hpo"]
    while left:
        name = _normal(left.pop())
        if name not in needed:
            needed.add(name)
            left += _requirements(name)
    installed = importlib.metadata.packages_distributions()
    return {name: one for name, owners in installed.items() for one in owners if _normal(one) in needed}


def _requirements(distribution: str) -> Iterator[str]:
    """Yield what a distribution requires; of extras only our own, but for those of our tests."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, extra = line.partition("extra ==")
        if not extra or (distribution == "hpo" and "test" not in extra):
            yield from re.findall(r"^[\w.-]+", requirement)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _refuse_doubles(folders: Iterable[Path]) -> None:
    """Raise SpecError if two folders have a module of one name: one of them would be imported for both."""
    known: dict[str, Path] = {}
    for folder in sorted(folders):
        for name, file in _modules(folder):
            other = known.setdefault(name, file)
            if not is_file(str(other), file):
                raise SpecError(f"of {other} and {file} one process can import only one as {name!r}; rename the other")


def _drop_strays(folder: Path) -> None:
    """Drop loaded modules that have the name of one in this folder: whoever imports it next means the user's."""
    for name, file in _modules(folder):
        loaded = sys.modules.get(name)
        if loaded is not None and not is_file(getattr(loaded, "__file__", None), file):
            for key in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
                del sys.modules[key]
