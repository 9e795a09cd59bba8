"""Code of the user's own, named in a study file as `package.module:name` or `file.py:name`.

It is found beside the study file and imported as Python itself would: a file as the module that it is named, with its folder
first on `sys.path`, and with its own file as the whole of `sys.argv`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.errors import SpecError, located, nearest
from hpo.spec import optuna_calls, user_path
from hpo.text import quoted

OURS = ("models", "data")  # parts that once were imported without `hpo.`
FORMS = '"file.py:function" or "package.module:function"'
GUARD = 'put what is only for the command line below `if __name__ == "__main__":`'
NOT_THEIRS = (
    __file__,
    optuna_calls.__file__,
    *(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib", "platlib")),
)
POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def is_reference(name: str) -> bool:
    """Say whether a name in a study file means code of the user's own."""
    return ":" in name


def load(reference: str, folder: Path, path: str) -> Any:
    """Import what a reference names; SpecError at `path` with the cause if that fails.

    From then on `sys.argv` is the file alone, as code of the user's sees it that is run without arguments.
    """
    location, _, name = reference.rpartition(":")
    _refuse_location(location, name, reference, folder, path)
    module = _module(location, folder, path)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise SpecError(f"{path} = {reference!r}: {location} has no {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not callable(found):
        raise SpecError(f"{path} = {reference!r}: is no function, but of type {type(found).__name__}")
    return found


def load_objective(reference: str, folder: Path) -> Any:
    """Import an Optuna objective; SpecError if that fails or if it is seen that no call with a trial can give a value.

    What a decorator's `wrapper(*args, **kwargs)` hides is not seen; the first trial fails then.
    """
    found = load(reference, folder, "objective")
    why = _no_objective(found, reference.rpartition(":")[2])
    if why:
        raise SpecError(f"objective = {reference!r}: {why}")
    return found


def _no_objective(found: Any, name: str) -> str | None:
    """Return why an object cannot be an objective, with the mend; None if it may be one.

    Of a decorated function the outermost one decides, for that is called: a decorator may give what the inner one lacks.
    """
    if inspect.isclass(found):
        return f"is a class, so a call of it makes an object; write `objective = {name}(...)` below it and name that"
    called = (found, type(found).__call__)
    if any(map(inspect.iscoroutinefunction, called)):
        return "is a coroutine function; name a plain function that returns `asyncio.run(...)` of it"
    if any(map(inspect.isgeneratorfunction, called)) or any(map(inspect.isasyncgenfunction, called)):
        return "yields, so a call of it returns a generator; let it return the value"
    try:
        signature = inspect.signature(found, follow_wrapped=False)
    except (TypeError, ValueError):  # some callables of C do not tell
        return None
    try:
        signature.bind(None)
    except TypeError as error:
        if not any(parameter.kind in POSITIONAL for parameter in signature.parameters.values()):
            return f"takes {signature}, and is called with the trial; write `def {name}(trial)`"
        return (
            f"takes {signature}, and is called with the trial alone: {error}; give further arguments a default, "
            f"or name a functools.partial that gives them"
        )
    return None


def _refuse_location(location: str, name: str, reference: str, folder: Path, path: str) -> None:
    """Raise SpecError, with the mend, for a location that is neither a Python file nor the name of a module."""
    is_path = "/" in location or location.endswith(".py")
    if not location or not name or location.endswith(":") or (location.startswith(".") and not is_path):
        raise SpecError(f"{path} = {reference!r}: names no code; write {FORMS}")
    file = _file(location, folder)
    if location.endswith(".ipynb"):
        raise SpecError(
            f"{path} = {reference!r}: a notebook cannot be imported; make a script of it with "
            f'`jupyter nbconvert --to script {quoted(location)}`, and write "{location.removesuffix(".ipynb")}.py:{name}"'
        )
    if location.endswith(".py") and not os.path.isfile(file):
        raise SpecError(f"{path}: no file {file}; paths are relative to the study file")
    if not location.endswith(".py") and (is_path or os.path.isfile(file)):
        raise SpecError(f"{path} = {reference!r}: {location} is no Python file; write {FORMS}")


def _file(location: str, folder: Path) -> Path:
    """Return the absolute path of a file that a reference names."""
    file = folder.absolute() / Path(location).expanduser()
    return file.parent.resolve() / file.name if ".." in file.parts else file


def is_alone(references: Iterable[str], folder: Path) -> bool:
    """Say whether this process has loaded no user code but what these references name."""
    return user_path.codes() <= {(reference.rpartition(":")[0], folder.absolute()) for reference in references}


def _module(location: str, folder: Path, path: str) -> ModuleType:
    folder = folder.absolute()
    file = _file(location, folder) if location.endswith(".py") else None
    with located(path), user_path.opened((location, folder), _homes(file, folder)):
        loaded = sys.modules.get(location) if file is None else _loaded(file)
        source = file or _origin(location, loaded)
        sys.argv = [str(source or location)]
        return loaded or _imported(location, file)


def _homes(file: Path | None, folder: Path) -> tuple[Path, ...]:
    """Return the folders that code is imported from: a file's own, as for `python FILE`, before the study file's."""
    if file is None:
        return (folder,)
    linked = [file.resolve().parent] if file.is_symlink() else []
    return tuple(dict.fromkeys([*linked, file.parent, folder]))


def _loaded(file: Path) -> ModuleType | None:
    """Return the module of a file, None if it is not loaded yet; SpecError if its name means another one."""
    if os.path.isfile(file.parent / file.stem / "__init__.py"):
        raise SpecError(f"{file} and the package {file.parent / file.stem} have one name; rename one of them")
    known = sys.modules.get(file.stem)
    if known is None or user_path.is_file(getattr(known, "__file__", None), file):
        return known
    taken = getattr(known, "__file__", None) or "a part of Python"
    raise SpecError(f"{file}: its name {file.stem!r} is that of {taken} in this process; rename one of them")


def _origin(location: str, loaded: ModuleType | None) -> Path | None:
    """Return the file of a module, without an import of its package if it is not loaded; None if there is none."""
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(file) if file else None
    found = user_path.find(location)
    return Path(found.origin) if found and found.has_location and found.origin else None


def _imported(location: str, file: Path | None) -> ModuleType:
    """Import a module that is not loaded yet; SpecError with the user's own line if that fails."""
    try:
        with optuna_calls.refused():
            return importlib.import_module(location) if file is None else _file_module(file)
    except optuna_calls.Refused as error:
        raise SpecError(f"{location}: {error}; nothing was run; {GUARD}") from None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}{_where(error)}{_mend(error, file)}"
        raise SpecError(f"importing {location} failed: {said}") from error


def _mend(error: BaseException, file: Path | None) -> str:
    """Return the mend for a script that ends the process, and for imports of what is to be named in another way; else ""."""
    if isinstance(error, SystemExit):
        return f"; {GUARD}"
    if not isinstance(error, ImportError) or error.path is not None:
        return ""
    if error.name in OURS:
        return f"; hpo's own is imported as `hpo.{error.name}`"
    if file is not None and "no known parent package" in str(error):
        return f'; name it as a part of its package, such as "{file.parent.name}.{file.stem}:NAME"'
    return ""


def _where(error: BaseException) -> str:
    """Return ' (file:line)' of the user's own line that failed, "" if the failure is not inside a file of theirs."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(("<", *NOT_THEIRS))]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""


def _file_module(file: Path) -> ModuleType:
    """Import a file as the module that it is named, as `import` does from its folder."""
    name = file.stem
    if "." in name:
        mend = f"{name.replace('.', '_')}.py"
        warnings.warn(
            f"{file}: no other process can import a file with a dot in its name, as DataLoader workers must that are not "
            f"forked; rename it, such as {mend}",
            stacklevel=2,
        )
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def digest(references: Iterable[str], folder: Path, others: Iterable[Path] = ()) -> str:
    """Return the SHA-256 of the files that the references name and of other files; "" if there are none.

    What the references' files import is not in it, nor are others that are not there.
    """
    files = sorted({_source(reference.rpartition(":")[0], folder) for reference in references})
    files += sorted({other for other in others if other.is_file()})
    if not files:
        return ""
    return hashlib.sha256(b"\0".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _source(location: str, folder: Path) -> Path:
    if location.endswith(".py"):
        return _file(location, folder)
    origin = getattr(importlib.import_module(location), "__file__", None)  # already imported by `load`
    if origin is None:
        raise SpecError(f"{location}: has no file of its own (it is built in, or a folder without __init__.py)")
    return Path(origin)
