"""The user's own code, named in a study file as `package.module:name` or `file.py:name`.

It is found in the study file's folder and imported as Python does it. `file.py` becomes the module `file`, and its folder is
first on `sys.path`. `sys.argv` holds the file alone.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.errors import SpecError, located, nearest
from hpo.spec import optuna_calls, pickled, syntax, user_path
from hpo.spec.captures import is_importable
from hpo.text import quoted

#: Keys of a study file that name the user's own training. One of them replaces the training sections.
OWN = ("objective", "train", "command")
#: Prefixes of `model.name` that are libraries of models and no code of the user: `hpo.models.libraries.LIBRARIES`.
LIBRARIES = ("torchvision:", "timm:")
OURS = ("models", "data")  # parts that earlier versions imported without `hpo.`
MOST_CODE_BYTES = 2**20  # of a file; a longer one is not looked at as Python source
FORMS = '"file.py:function" or "package.module:function"'
GUARD = 'put code that is only for the command line below `if __name__ == "__main__":`'
NOT_THEIRS = (
    f"{Path(__file__).parents[1]}/",
    *(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib", "platlib")),
)
POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def is_reference(name: str) -> bool:
    """Return whether a name in a study file refers to the user's own code."""
    return ":" in name and not name.startswith(LIBRARIES)


def load(reference: str, folder: Path, path: str) -> Any:
    """Import the object of a reference.

    Afterwards `sys.argv` holds the file alone, as in a script that is run without arguments.

    Args:
        reference: `package.module:name` or `file.py:name`.
        folder: the folder that it is relative to.
        path: the key in the study file, for the message.

    Raises SpecError with the cause if the import fails or the object is not callable.
    """
    if pickled.is_pickled(reference):
        return _unpickled(folder.absolute(), path)
    location, _, name = reference.rpartition(":")
    _refuse_location(location, name, reference, folder, path)
    module = _module(location, folder, path)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise SpecError(f"{path} = {reference!r}: {location} has no {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not callable(found):
        raise SpecError(f"{path} = {reference!r}: has type {type(found).__name__}; name a function")
    return found


def load_objective(reference: str, folder: Path) -> Any:
    """Import an Optuna objective; SpecError as `load_function`."""
    return load_function(reference, folder, "objective", ("trial",))


def load_function(reference: str, folder: Path, key: str, arguments: Sequence[str]) -> Any:
    """Import a function; SpecError if that fails or if it cannot be called with these arguments alone.

    A decorator's `wrapper(*args, **kwargs)` hides the real parameters. A mistake behind it fails the first trial.

    Args:
        reference: `package.module:name` or `file.py:name`.
        folder: the folder that it is relative to.
        key: the key in the study file, for the message.
        arguments: the names of the arguments, for the message.
    """
    found = load(reference, folder, key)
    why = _not_callable_with(arguments, found, reference.rpartition(":")[2])
    if why:
        raise SpecError(f"{key} = {reference!r}: {why}")
    return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a function is found: `package.module:name` or `file.py:name`, and the folder that it is relative to."""

    reference: str
    folder: Path


def reference_of(function: Any) -> Reference | None:
    """Return where a function can be imported from; None if it is only in this process, as one of a notebook's cell."""
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None or "." in name or not is_importable(function):
        return None
    levels = module.__name__.count(".") + (Path(file).stem == "__init__")
    if not levels and file.endswith(".py"):
        return Reference(reference=f"{Path(file).name}:{name}", folder=Path(file).parent)
    home = Path(file).parents[levels]
    is_installed = home.name in ("site-packages", "dist-packages")
    return Reference(reference=f"{module.__name__}:{name}", folder=Path.cwd() if is_installed else home)


def _not_callable_with(arguments: Sequence[str], found: Any, name: str) -> str | None:
    """Return why an object cannot be called with these arguments, with the mend; None if it can.

    The outermost function of a decorated objective is checked, since a decorator may pass further arguments to the inner one.
    """
    if inspect.isclass(found):
        return f"is a class, so a call returns an object; write `objective = {name}(...)` below it and name that"
    called = (found, type(found).__call__)
    if any(map(inspect.iscoroutinefunction, called)):
        return "is a coroutine function; name a plain function that returns `asyncio.run(...)` of it"
    if any(map(inspect.isgeneratorfunction, called)) or any(map(inspect.isasyncgenfunction, called)):
        return "yields, so a call returns a generator; return the value instead"
    try:
        signature = inspect.signature(found, follow_wrapped=False)
    except (TypeError, ValueError):  # some C callables have no signature
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = " and ".join(f"the {argument}" for argument in arguments)
        if sum(parameter.kind in POSITIONAL for parameter in signature.parameters.values()) < len(arguments):
            return f"takes {signature}, but is called with {given}; write `def {name}({', '.join(arguments)})`"
        return (
            f"takes {signature}, but is called with {given} alone: {error}; give further arguments a default, "
            f"or name a functools.partial that sets them"
        )
    return None


def _refuse_location(location: str, name: str, reference: str, folder: Path, path: str) -> None:
    """Raise SpecError for a location that is neither a Python file nor a module name."""
    is_path = "/" in location or location.endswith(".py")
    if not location or not name or location.endswith(":") or (location.startswith(".") and not is_path):
        raise SpecError(f"{path} = {reference!r}: names no code; write {FORMS}")
    file = _file(location, folder)
    if location.endswith(".ipynb"):
        raise SpecError(
            f"{path} = {reference!r}: a notebook cannot be imported; convert it to a script with "
            f'`jupyter nbconvert --to script {quoted(location)}`, and write "{location.removesuffix(".ipynb")}.py:{name}"'
        )
    if location.endswith(".py") and not os.path.isfile(file):
        raise SpecError(f"{path}: no file {file}; paths are relative to the study file")
    if not location.endswith(".py") and (is_path or os.path.isfile(file)):
        raise SpecError(f"{path} = {reference!r}: {location} is not a Python file; write {FORMS}")


def _file(location: str, folder: Path) -> Path:
    """Return the absolute path of a reference's file."""
    file = folder.absolute() / Path(location).expanduser()
    return file.parent.resolve() / file.name if ".." in file.parts else file


def is_alone(references: Iterable[str], folder: Path) -> bool:
    """Return whether this process has loaded no user code except these references."""
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
    """Return the folders to import from: the file's own folder, as for `python FILE`, then the study file's folder."""
    if file is None:
        return (folder,)
    linked = [file.resolve().parent] if file.is_symlink() else []
    return tuple(dict.fromkeys([*linked, file.parent, folder]))


def _unpickled(folder: Path, path: str) -> Any:
    """Load the pickled function in a folder; SpecError with the cause if that fails."""
    homes = tuple(Path(home) for home in pickled.head(folder).folders)
    with located(path), user_path.opened((pickled.FILE, folder), homes):
        sys.argv = [str(folder / pickled.FILE)]
        try:
            return pickled.load(folder)
        except SpecError:
            raise
        except Exception as error:  # mostly an import, in a class of the user's
            said = f"{type(error).__name__}: {error}{where(error)}"
            raise SpecError(f"loading the pickled function failed: {said}") from error


def _loaded(file: Path) -> ModuleType | None:
    """Return the loaded module of a file, None if it is not loaded; SpecError if another module has its name."""
    if os.path.isfile(file.parent / file.stem / "__init__.py"):
        raise SpecError(f"{file} and the package {file.parent / file.stem} have the same name; rename one of them")
    known = sys.modules.get(file.stem)
    if known is None or user_path.is_file(getattr(known, "__file__", None), file):
        return known
    taken = getattr(known, "__file__", None) or "a part of Python"
    raise SpecError(f"{file}: this process has loaded {taken} under the name {file.stem!r}; rename one of them")


def _origin(location: str, loaded: ModuleType | None) -> Path | None:
    """Return the file of a module without importing its package; None without a file."""
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(file) if file else None
    found = user_path.find(location)
    return Path(found.origin) if found and found.has_location and found.origin else None


def _imported(location: str, file: Path | None) -> ModuleType:
    """Import a module that is not loaded yet; SpecError with the failing line of the user's code."""
    try:
        with optuna_calls.refused():
            return importlib.import_module(location) if file is None else _file_module(file)
    except optuna_calls.Refused as error:
        raise SpecError(f"{location}: {error}; nothing was run; {GUARD}") from None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}{where(error)}{_mend(error, file)}"
        raise SpecError(f"importing {location} failed: {said}") from error


def _mend(error: BaseException, file: Path | None) -> str:
    """Return the mend for a script that exits and for an import that needs another name, else ""."""
    if isinstance(error, SystemExit):
        return f"; {GUARD}"
    if not isinstance(error, ImportError) or error.path is not None:
        return ""
    if error.name in OURS:
        return f"; import hpo's own as `hpo.{error.name}`"
    if file is not None and "no known parent package" in str(error):
        return f'; name it as a module of its package, such as "{file.parent.name}.{file.stem}:NAME"'
    return ""


def where(error: BaseException) -> str:
    """Return ' (file:line)' of the failing line of user code, "" if the failure is elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(("<", *NOT_THEIRS))]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""


def _file_module(file: Path) -> ModuleType:
    """Import a file as the module of its name, as `import` does from its folder."""
    name = file.stem
    if "." in name:
        mend = f"{name.replace('.', '_')}.py"
        warnings.warn(
            f"{file}: other processes, such as spawned DataLoader workers, cannot import a file with a dot in its name; "
            f"rename it, such as {mend}",
            stacklevel=2,
        )
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, since dataclasses and pickle look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def digest(references: Iterable[str], folder: Path, others: Iterable[Path] = ()) -> str:
    """Return two SHA-256 of the references' files and of other files, joined by a space; "" without any file.

    The first one is of the syntax of Python files, so comments, docstrings and layout do not change it. It is what a study
    records. The second one is of the text. Earlier versions recorded that.

    Files that the references' files import are not included, nor are missing other files. A pickled function has one digest.
    """
    references = list(references)
    if any(map(pickled.is_pickled, references)):
        return pickled.head(folder).digest
    files = sorted({_source(reference.rpartition(":")[0], folder) for reference in references})
    files += sorted({other for other in others if other.is_file()})
    if not files:
        return ""
    return " ".join(hashlib.sha256(b"\0".join(found)).hexdigest() for found in zip(*map(_digests, files), strict=True))


def _digests(file: Path) -> tuple[bytes, bytes]:
    """Return the digest of a file's syntax and that of its content. A file of weights may be larger than the memory."""
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").digest()
    return content if file.stat().st_size > MOST_CODE_BYTES else syntax.digest(file.read_bytes()), content


def _source(location: str, folder: Path) -> Path:
    if location.endswith(".py"):
        return _file(location, folder)
    origin = getattr(importlib.import_module(location), "__file__", None)  # already imported by `load`
    if origin is None:
        raise SpecError(
            f"{location}: has no file of its own; it is built in, or a folder without __init__.py: name a Python module"
        )
    return Path(origin)
