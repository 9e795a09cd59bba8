"""The user's folders on `sys.path`: first, as for `python train.py`. A module in them with a taken name is refused."""

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
from hpo.spec.extras import DISTRIBUTION, FORMER, ROOT

#: Top-level names that a library may install by mistake and never imports. The user may use them.
FREE_NAMES = frozenset(
    {"benchmarks", "data", "docs", "examples", "models", "scripts", "test", "tests", "tools", "train", "utils"}
)
Code = tuple[str, Path]  # the file or module of a reference, and the folder that it is relative to
#: The user code that this process has loaded, with its entries of `sys.path`; an empty list if loading failed.
_codes: dict[Code, list[str]] = {}


def codes() -> set[Code]:
    """Return the user code that this process has loaded or tried to load."""
    return set(_codes)


@contextmanager
def opened(code: Code, folders: tuple[Path, ...]) -> Iterator[None]:
    """Import user code within this block, with these folders on `sys.path` in this order.

    The folders stay on `sys.path` behind the folders of user code loaded before. If the block raises, its modules are unloaded
    and `sys.path` is restored.

    Raises SpecError for a module in these folders, or in folders that the code puts first, whose name is taken by Python, by
    `hpo` or by a dependency of `hpo`. Raises SpecError also if two pieces of user code have different modules of one name and
    one of these modules is loaded.
    """
    path, first = list(sys.path), [str(folder) for folder in folders]
    _codes.setdefault(code, [])
    _put_first(first)
    known, modules = list(sys.path), set(sys.modules)
    try:
        yield
        for entry in sys.path[: sys.path.index(first[0])] if first and first[0] in sys.path else []:
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


@contextmanager
def borrowed() -> Iterator[None]:
    """Undo after this block what user code that is opened in it does to `sys.path` and `sys.modules`."""
    path, modules, loaded = list(sys.path), dict(sys.modules), dict(_codes)
    try:
        yield
    finally:
        theirs = _all_own()
        for name in sys.modules.keys() - modules.keys():
            if _home(name) in theirs and name.partition(".")[0] != "hpo":
                del sys.modules[name]
        sys.modules.update(modules)
        sys.path[:] = path
        _codes.clear()
        _codes.update(loaded)


def _put_first(folders: list[str]) -> None:
    """Put folders on `sys.path` in this order, and unload modules that would hide modules in them."""
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
    """Return `.editable/`, which holds `hpo` alone, in place of our checkout, whose `models` and `data` would hide the user's."""
    alone = ROOT / ".editable"
    return str(alone) if is_file(entry, ROOT) and alone.is_dir() else entry


def _own(folders: list[str], known: list[str]) -> list[str]:
    """Return these folders and the entries that the user's code has added to `sys.path`."""
    return [e for e in sys.path if e in folders or (_is_users(e) and sys.path.count(e) > known.count(e))]


def _all_own() -> set[str]:
    return {entry for own in _codes.values() for entry in own}


def _is_users(entry: str) -> bool:
    return Path(entry).name not in ("site-packages", "dist-packages")


def refuse_taken_names(folder: Path) -> None:
    """Raise SpecError that lists all modules in a folder whose names are taken."""
    lines = []
    for name, file in sorted(_modules(folder)):
        owner = _owner(name, file, folder)
        if owner:
            mine = file if file.stem == name else file.parent
            lines.append(
                f"{mine} has the name of {owner} and would be imported in its place, as {folder} goes on Python's path; "
                f"rename it, such as my_{mine.name}"
            )
    if lines:
        raise SpecError(*lines)


def is_file(known: str | None, file: Path) -> bool:
    """Return whether the path of a module's file, if known, is this file."""
    return known is not None and os.path.exists(known) and os.path.samefile(known, file)


def find(module: str, places: Sequence[str] | None = None) -> ModuleSpec | None:
    """Return the spec of a module without importing its package, None if it is not found.

    Args:
        module: the dotted name.
        places: the folders to search; `sys.path` by default.
    """
    found = None
    for part in module.split("."):
        found = PathFinder.find_spec(part, places)
        if found is None:
            return None
        places = found.submodule_search_locations
    return found


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each module and regular package in a folder. A folder that cannot be listed yields none.

    A folder without `__init__.py` is left out, since a module of the same name always wins.
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
    """Return the owner of a module name in words, None if the name is free."""
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
    """Return the importable names of all distributions that `hpo` needs, directly or indirectly, with their distribution."""
    needed: set[str] = set()
    left = list(_requirements(DISTRIBUTION, ours=True)) or list(_requirements(FORMER, ours=True))
    while left:
        name = _normal(left.pop())
        if name not in needed:
            needed.add(name)
            left += _requirements(name)
    installed = importlib.metadata.packages_distributions()
    return {name: one for name, owners in installed.items() for one in owners if _normal(one) in needed}


def _requirements(distribution: str, *, ours: bool = False) -> Iterator[str]:
    """Yield the requirements of a distribution. Extras count for ours only, except those for tests."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, extra = line.partition("extra ==")
        if not extra or (ours and "test" not in extra):
            yield from re.findall(r"^[\w.-]+", requirement)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _refuse_mixed(paths: Sequence[list[str]]) -> None:
    """Raise SpecError for a loaded module of one of these paths if another path has a different module of the same name.

    Python loads one module per name, so the code of the other path would get the wrong one.
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
                    f"{file} and {other} have the same module name {name!r}, and one process can import only one of them; "
                    "rename one"
                )


def _home(name: str) -> str | None:
    """Return the folder in which a loaded module, or its outermost package, was found; None if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    levels = name.count(".") + os.path.basename(file).startswith("__init__.") + 1
    return "/".join(file.split("/")[:-levels])


def _drop_strays(folder: str, theirs: set[str]) -> None:
    """Unload modules with the name of a module in this folder, except the user's. The next import then finds the user's."""
    for name, file in _modules(Path(folder)):
        if (
            name in sys.modules
            and _home(name) not in theirs
            and not is_file(getattr(sys.modules[name], "__file__", None), file)
        ):
            for key in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
                del sys.modules[key]
