"""What a pickled function takes along: its code, and the values of the globals and enclosing variables that it uses.

The digest is over code and values. Pickles of equal functions differ, so their bytes cannot tell whether a function changed.
"""

from __future__ import annotations

import dis
import hashlib
import io
import os
import pickle
import socket
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, TypeVar

from hpo.errors import SpecError

MOST_BYTES = 50_000_000  # of captured values
SHOWN = 3  # captures that a message lists
SIMPLE = (type(None), bool, int, float, complex, str, type(...), type(NotImplemented))
BYTES = (bytes, bytearray)
GLOBAL = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME")  # instructions that use a global
CODE = "the code"
LINE = "__firstlineno__"  # where a class begins
#: Attributes that Python makes of a class in C, or of `__slots__`.
IN_C = (GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType)
#: Attributes of a class that say nothing of what it does, or that Python makes on its own.
OF_PYTHON = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__annotate_func__"),
    *("__annotations_cache__", LINE, "__static_attributes__", "__slotnames__", "__abstractmethods__"),
    *("_abc_impl", "__match_args__"),
}
which_module = pickle.whichmodule  # type: ignore[attr-defined]  # not in the stubs
INSTALLED = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Captures:
    """A function's code and values, walked as a pickle would.

    Raises SpecError for a value that is too large, an open handle, on a GPU, or cannot be pickled.
    """

    def __init__(self, function: Any) -> None:
        self._reducers = _reducers()
        self._parts: dict[str, Any] = {}  # a hash by words for what it is of
        self._part = CODE
        self._sizes: dict[str, int] = {}  # bytes by part
        self._met: dict[int | str, int] = {}  # when a value was met first, by id; a constant by its text
        self._kept: list[Any] = []  # so that no id is used twice
        self._modules: set[str] = set()
        try:
            self._visit(function, "the function")
        except RecursionError:
            raise SpecError(f"{self._part}: is nested too deep to be pickled") from None

    @property
    def parts(self) -> dict[str, str]:
        """The digest of the code and of each value, by words for it."""
        return {part: found.hexdigest() for part, found in self._parts.items()}

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.parts.items())).encode()).hexdigest()

    @property
    def folders(self) -> list[str]:
        """The user's folders on `sys.path`, in its order, then those of other modules of the user among the captures."""
        files = {name: getattr(sys.modules.get(name.partition(".")[0]), "__file__", None) for name in self._modules}
        theirs = {file for file in files.values() if file and not file.startswith(INSTALLED)}
        homes = {str(Path(file).parents[1 if Path(file).stem == "__init__" else 0]) for file in theirs}
        on_path = [str(Path(entry).absolute()) for entry in sys.path if Path(entry).is_dir()]
        commands = os.path.realpath(sysconfig.get_path("scripts"))  # an installed command has it on `sys.path`
        installed = [e for e in on_path if f"{e}/".startswith(INSTALLED) or e.endswith(("-packages", "/.editable"))]
        own = [e for e in on_path if e not in installed and os.path.realpath(e) != commands]
        return list(dict.fromkeys([*own, *sorted(homes)]))

    def _say(self, *words: object) -> None:
        found = self._parts.setdefault(self._part, hashlib.sha256())
        for word in words:
            content = bytes(word) if isinstance(word, BYTES) else repr(word).encode(errors="surrogatepass")
            found.update(f"{len(content)}:".encode() + content)

    def _weigh(self, size: int) -> None:
        self._sizes[self._part] = self._sizes.get(self._part, 0) + size
        if sum(self._sizes.values()) > MOST_BYTES:
            largest = sorted(self._sizes.items(), key=lambda item: -item[1])[:SHOWN]
            told = ", ".join(f"{part} {size / 1e6:.0f} MB" for part, size in largest if size >= 1e6)
            raise SpecError(
                f"the function captures more than {MOST_BYTES / 1e6:.0f} MB ({told}); load such data inside the function"
            )

    def _visit(self, value: Any, where: str) -> None:
        kind = type(value)
        if kind in SIMPLE or kind in BYTES:
            self._say(kind.__name__, value)
            self._weigh(len(value) if isinstance(value, str | bytes | bytearray) else 8)
            return
        key = repr(value) if _is_constant(value) else id(value)  # Python makes one of a cell's equal constants
        if key in self._met:
            self._say("met", self._met[key])
            return
        self._met[key] = len(self._met)
        self._kept.append(value)
        self._refuse(value, where)
        if isinstance(value, ModuleType):
            self._modules.add(value.__name__)
            self._say("module", value.__name__)
        elif isinstance(value, FunctionType | type):
            self._visit_named(value, where)
        elif isinstance(value, TypeVar):
            self._say("typevar", value.__name__)  # cloudpickle gives each a random number
        elif module := module_of(value):
            self._modules.add(module.__name__)
            self._say("named", module.__name__, value.__name__)
        elif isinstance(value, MethodType):
            self._visit_all([value.__func__, value.__self__], where)
        elif isinstance(value, BuiltinFunctionType):
            self._say("builtin", value.__module__, value.__qualname__)
            if not isinstance(value.__self__, ModuleType | type(None)):
                self._visit(value.__self__, where)
        elif kind in (list, tuple):
            self._say(kind.__name__, len(value))
            for index, item in enumerate(value):
                self._visit(item, f"{where}[{index}]")
        elif kind is dict:
            self._say("dict", len(value))
            for key, item in value.items():
                self._visit(key, f"a key of {where}")
                self._visit(item, f"{where}[{key!r}]")
        elif kind in (set, frozenset):
            self._say(kind.__name__, len(value))
            self._visit_all(sorted(value, key=lambda item: self._order(item, where)), where)
        elif content := _content(value):
            self._weigh(content.nbytes)
            self._say(kind.__name__, *content.words, content.read())
        else:
            self._visit_reduced(value, where)

    def _order(self, item: Any, where: str) -> str:
        """Return what sorts an item of a set: its digest, since a `repr` may hold an address."""
        if type(item) in SIMPLE:
            return repr(item)
        outer, sizes, met = self._parts, self._sizes, len(self._met)
        self._parts, self._sizes = {}, dict(sizes)
        self._visit(item, where)
        found = self.digest
        self._parts, self._sizes = outer, sizes
        while len(self._met) > met:
            self._met.popitem()
        return found

    def _visit_all(self, values: Any, where: str) -> None:
        for value in values:
            self._visit(value, where)

    def _refuse(self, value: Any, where: str) -> None:
        """Raise SpecError for what another process cannot get, though some of it could be pickled."""
        if isinstance(value, io.IOBase) and not isinstance(value, io.BytesIO | io.StringIO):
            raise SpecError(f"{where} is an open file, {getattr(value, 'name', value)!r}; open it inside the function")
        if isinstance(value, socket.socket):
            raise SpecError(f"{where} is a socket; open it inside the function")
        if value is os.environ or value is os.environb:
            raise SpecError(f"{where} is the whole environment, secrets included; read os.environ inside the function")
        device = getattr(getattr(value, "device", None), "type", "cpu") if _is_of(value, "torch", "Tensor") else "cpu"
        if device not in ("cpu", "meta"):
            raise SpecError(
                f"{where} is a tensor on {value.device}; move it with .cpu(), or make it inside the function"
            )

    def _visit_named(self, value: Any, where: str) -> None:
        """Visit a function or class: by its name if it can be imported, else by what it is made of."""
        if is_importable(value) or value.__module__ == "builtins":  # mappingproxy, for example, cannot be imported
            self._modules.add(value.__module__)
            self._say("named", value.__module__, value.__qualname__)
        elif isinstance(value, type):
            self._visit_class(value, where)
        else:
            self._visit_function(value, where)

    def _visit_class(self, value: type, where: str) -> None:
        self._say("class", value.__name__)
        self._visit_all((*value.__bases__, type(value)), where)
        for name in sorted(vars(value).keys() - OF_PYTHON):
            if name.startswith("__pydantic_") and name != "__pydantic_fields__":
                continue  # made from the fields, with ids of objects in it
            self._say(name)
            self._visit_attribute(vars(value)[name], f"{where}.{name}")

    def _visit_attribute(self, value: Any, where: str) -> None:
        if isinstance(value, staticmethod | classmethod):
            self._say(type(value).__name__)
            self._visit(value.__func__, where)
        elif isinstance(value, property):
            self._visit_all((value.fget, value.fset, value.fdel), where)
        elif isinstance(value, IN_C):
            self._say(value.__name__)
        else:
            self._visit(value, where)

    def _visit_function(self, function: FunctionType, where: str) -> None:
        """Visit a function's code, defaults and variables. Each variable is a part of its own."""
        code = function.__code__
        self._say("function", *_words(code, function.__doc__))
        owner = "" if self._part == CODE else f"{self._part}: "
        self._visit_all([function.__defaults__, function.__kwdefaults__], f"{owner}a default of {function.__name__}")
        if vars(function):
            self._visit(vars(function), where)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._visit_variable(cell.cell_contents, f"the variable {name!r}")
            except ValueError:  # not assigned yet
                self._say("empty", name)
        for name in sorted(set(_globals(code)) & function.__globals__.keys()):
            self._visit_variable(function.__globals__[name], f"the global {name!r}")

    def _visit_variable(self, value: Any, words: str) -> None:
        outer, self._part = self._part, words
        self._say(words)
        self._visit(value, words)
        self._part = outer

    def _visit_reduced(self, value: Any, where: str) -> None:
        """Visit what pickle would write of an object."""
        kind = type(value)
        try:
            reducer = self._reducers.get(kind)
            reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        except Exception as error:  # whatever the object's class raises
            raise SpecError(
                f"{where} cannot be pickled ({kind.__module__}.{kind.__qualname__}: {error}); make it inside the function"
            ) from error
        if isinstance(reduced, str):
            if not is_importable(value, reduced):
                raise SpecError(
                    f"{where} cannot be pickled ({kind.__module__}.{kind.__qualname__}: it is found by its name alone); "
                    "make it inside the function, or write it into a file"
                )
            self._modules.add(which_module(value, reduced))
            self._say("global", kind.__module__, reduced)
            return
        made_by, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self._visit_all([made_by, *arguments], where)
        if isinstance(state, dict):
            for name in sorted(state, key=repr):
                self._say(name)
                self._visit(state[name], f"{where}.{name}")
        else:
            self._visit(state, where)
        for index, item in enumerate(items or ()):
            self._visit(item, f"{where}[{index}]")
        for key, item in pairs or ():
            self._visit(key, f"a key of {where}")
            self._visit(item, f"{where}[{key!r}]")


def is_importable(value: Any, path: str | None = None) -> bool:
    """Return whether other processes can import an object by its module and name.

    Args:
        value: the object.
        path: its dotted name in the module, if not `__qualname__`. An object without either cannot be imported.
    """
    path = path or getattr(value, "__qualname__", None)
    if path is None:
        return False
    module = sys.modules.get(which_module(value, path))
    if module is None or module.__name__ == "__main__":
        return False
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is value


def module_of(value: Any) -> ModuleType | None:
    """Return the module that holds a bound method by its name, as `random` holds `random.random`; None without one.

    Such a method goes by its name. A copy of its object would be another generator in each worker.
    """
    if not isinstance(value, MethodType | BuiltinFunctionType) or isinstance(value.__self__, ModuleType):
        return None
    for name in (getattr(value, "__module__", None), type(value.__self__).__module__):
        module = sys.modules.get(name or "")
        if module and name != "__main__" and getattr(module, getattr(value, "__name__", ""), None) is value:
            return module
    return None


def _is_constant(value: Any) -> bool:
    """Return whether a value is a tuple as it can stand in code."""
    return type(value) is tuple and all(type(item) in (*SIMPLE, bytes) or _is_constant(item) for item in value)


class _Content:
    """The numbers of an array or tensor."""

    def __init__(self, nbytes: int, words: tuple[object, ...], array: Any) -> None:
        self.nbytes = nbytes
        self.words = words
        self._array = array

    def read(self) -> bytes:
        return bytes(self._array().tobytes())


def _content(value: Any) -> _Content | None:
    """Return the numbers of a dense NumPy array or torch tensor, None for any other object."""
    if _is_of(value, "numpy", "ndarray") and not value.dtype.hasobject:
        return _Content(value.nbytes, (value.dtype.fields or value.dtype.str, value.shape), lambda: value)
    torch = sys.modules.get("torch")
    if torch is not None and _is_of(value, "torch", "Tensor") and value.layout is torch.strided and not value.is_meta:
        numbers = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        words = (str(value.dtype), tuple(value.shape), value.requires_grad)
        return _Content(numbers.nbytes, words, lambda: numbers.view(torch.uint8).numpy())
    return None


def _is_of(value: Any, module: str, name: str) -> bool:
    """Return whether a value is of a class of a module that need not be loaded."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _reducers() -> Any:
    import cloudpickle

    return cloudpickle.Pickler.dispatch_table


def _globals(code: CodeType) -> Iterator[str]:
    """Yield the names of the globals that a code uses, those of the functions in it included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in GLOBAL:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _words(code: CodeType, docstring: str | None = None) -> Iterator[object]:
    """Yield what a code does. Comments, layout and the outermost docstring do not change it."""
    instructions = list(dis.get_instructions(code))
    loaded = Counter(one.arg for one in instructions if one.opcode in dis.hasconst)
    lines = [one for one, after in pairwise(instructions) if after.argval == LINE]  # of a class, from Python 3.13 on
    content = bytearray(code.co_code)
    for one in lines:
        content[one.offset + 1] = 0  # the argument: a constant's index or, from Python 3.14 on, the line itself
    skipped = {one.arg for one in lines if one.opcode in dis.hasconst and loaded[one.arg] == 1}
    if docstring is not None and code.co_consts[0] == docstring and not loaded[0]:
        skipped.add(0)
    yield from (bytes(content), code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
    yield from (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable)
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))
        elif index not in skipped:
            yield constant
