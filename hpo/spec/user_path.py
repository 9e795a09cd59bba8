"""The user's folders on `sys.path`: first, as for `python train.py`, unless a module in them has a name that is taken."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import hpo
from hpo.errors import SpecError

CHECKOUT = Path(hpo.__file__).resolve().parents[1]  # of an installed `hpo` this is site-packages
#: Names that a library may install at top level by mistake, and never imports: the user may take them.
FREE_NAMES = frozenset(
    {"benchmarks", "data", "docs", "examples", "models", "scripts", "test", "tests", "tools", "train", "utils"}
)
Code = tuple[str, Path]  # a file or a module as a reference names it, and the folder that it is relative to
#: What user code this process has loaded, each with its own entries of `sys.path`; none if it failed.
_codes: dict[Code, list[str]] = {}


def codes() -> set[Code]:
    """Return what user code this process has loaded, or has tried to."""
    return set(_codes)


@contextmanager
def opened(code: Code, folders: tuple[Path, ...]) -> Iterator[None]:
    """Let a block import user code with these folders on `sys.path`, in this order; if it fails, nothing of it stays loaded.

    They stay in front of all but the folders of code that was loaded before.

    Raises SpecError for a module in them, or in folders that the code puts first, whose name is taken: by Python, by our
    dependencies or by `hpo`. Raises it too where two codes of this process would find two modules of one name, and one is loaded.
    """
    path, first = list(sys.path), [str(folder) for folder in folders]
    _codes.setdefault(code, [])
    _put_first(first)
    known, modules = list(sys.path), set(sys.modules)
    try:
        yield
        for entry in sys.path[: sys.path.index(first[0])] if first[0] in sys.path else []:
            if entry not in known and _is_users(entry):
                refuse_taken_names(Path(entry))
        own = _codes[code] or _own(first, known)
        _refuse_mixed([own, *filter(None, _codes.values())])
        _codes[code] = own
    except BaseException:
        theirs = {*_own(first, known), *_all_own()}
        for name in sys.modules.keys() - modules:
            if _home(name) in theirs:
                del sys.modules[name]
        sys.path[:] = path
        raise


def _put_first(folders: list[str]) -> None:
    """Put folders on `sys.path`, each before the next, and drop loaded modules that would win over modules in them."""
    theirs = _all_own()
    new = [folder for folder in folders if folder not in theirs or folder not in sys.path]
    for folder in new:
        refuse_taken_names(Path(folder))
    sys.path[:] = [e if e in theirs else _without_our_parts(e) for e in sys.path if e not in new]
    at = next((index for index, entry in enumerate(sys.path) if entry not in theirs), len(sys.path))
    for folder in reversed(folders):
        if folder in new:
            sys.path.insert(at, folder)
        at = sys.path.index(folder)
    for folder in new:
        _drop_strays(folder, theirs)


def _without_our_parts(entry: str) -> str:
    """Return, in place of our checkout, its folder that holds `hpo` alone: its `models` and `data` would hide the user's."""
    alone = CHECKOUT / ".editable"
    return str(alone) if is_file(entry, CHECKOUT) and alone.is_dir() else entry


def _own(folders: list[str], known: list[str]) -> list[str]:
    """Return the entries of `sys.path` that are these folders, and those that the user's code has added to the known ones."""
    return [e for e in sys.path if e in folders or (_is_users(e) and sys.path.count(e) > known.count(e))]


def _all_own() -> set[str]:
    return {entry for own in _codes.values() for entry in own}


def _is_users(entry: str) -> bool:
    return Path(entry).name not in ("site-packages", "dist-packages")


def refuse_taken_names(folder: Path) -> None:
    """Raise SpecError that lists the modules in a folder whose names are taken, with the mend."""
    lines = []
    for name, file in sorted(_modules(folder)):
        owner = _owner(name, file, folder)
        if owner:
            mine = file if file.stem == name else file.parent
            lines.append(
                f"{mine} is named like {owner}, and whoever imports that name could get it, as all of {folder} goes on "
                f"Python's path; rename it, such as my_{mine.name}"
            )
    if lines:
        raise SpecError(*lines)


def is_file(known: str | None, file: Path) -> bool:
    """Say whether the file of a module or a spec, if it has one, is this file."""
    return known is not None and os.path.exists(known) and os.path.samefile(known, file)


def find(module: str, places: Sequence[str] | None = None) -> ModuleSpec | None:
    """Return where a module is found on `sys.path` or in other places, without an import of its package; None if nowhere."""
    found = None
    for part in module.split("."):
        found = PathFinder.find_spec(part, places)
        if found is None:
            return None
        places = found.submodule_search_locations
    return found


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each module and regular package in a folder; none if it cannot be listed.

    A folder without `__init__.py` is left out, for it never wins over a module of its name.
    """
    try:
        entries = os.listdir(folder)
    except OSError:
        return
    for entry in entries:
        module = inspect.getmodulename(entry)
        name, file = module or entry, folder / entry if module else folder / entry / "__init__.py"
        if name.isidentifier() and not name.startswith("__") and os.path.isfile(file):
            yield name, file


def _owner(name: str, file: Path, folder: Path) -> str | None:
    """Return in words whose module has this name already; None if the name is free."""
    if name == "hpo":
        return None if is_file(hpo.__file__, file) else "hpo itself"
    if name in FREE_NAMES:
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


def _refuse_mixed(paths: Sequence[list[str]]) -> None:
    """Raise SpecError for a loaded module from one of these paths, if another of them has a module of its name.

    What would be found there was not: the code of that path got, or would get, the loaded one in its place.
    """
    if all(path == paths[0] for path in paths):
        return
    theirs = {os.path.abspath(entry) for path in paths for entry in path}
    for name in [name for name in sys.modules if _home(name) in theirs]:
        file = sys.modules[name].__file__
        for path in paths:
            found = find(name, path)
            other = found.origin if found else None
            if other not in (None, file) and not is_file(file, Path(other)):
                raise SpecError(
                    f"of {file} and {other} one process can import only one as {name!r}; rename one of them"
                )


def _home(name: str) -> str | None:
    """Return the folder that a loaded module was found in, its outermost package's if it has one; None if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    levels = name.count(".") + os.path.basename(file).startswith("__init__.") + 1
    return "/".join(file.split("/")[:-levels])


def _drop_strays(folder: str, theirs: set[str]) -> None:
    """Drop loaded modules named like one in this folder, but for the user's: whoever imports it next means the user's."""
    for name, file in _modules(Path(folder)):
        if (
            name in sys.modules
            and _home(name) not in theirs
            and not is_file(getattr(sys.modules[name], "__file__", None), file)
        ):
            for key in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
                del sys.modules[key]
