"""Archives of NumPy arrays (`.npz`): which array is what, and reading them safely."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from hpo.data.files import BadFile
from hpo.data.names import SPELLINGS, Part
from hpo.data.source import Reading

Array = npt.NDArray[Any]
Role = Literal["images", "labels"]
Key = tuple[Part, Role]

ROLES: dict[Role, tuple[str, ...]] = {
    "images": ("x", "image", "images", "img", "imgs", "data", "inputs", "features", "pixels"),
    "labels": ("y", "label", "labels", "target", "targets"),
}
DEFAULTS: dict[Key, str | None] = {
    ("train", "images"): "images",
    ("train", "labels"): "labels",
    ("validation", "images"): None,
    ("validation", "labels"): None,
    ("test", "images"): "test_images",
    ("test", "labels"): "test_labels",
}


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The used arrays of an archive, by part and role."""

    path: Path
    names: Mapping[Key, str]
    arrays: Mapping[Key, Array]
    others: Mapping[str, Array]  # by name
    notes: Sequence[str]
    reading: Reading

    def has(self, part: Part) -> bool:
        return (part, "images") in self.arrays

    def place(self, row: int) -> str:
        """Return the place of a training image: file, array, index."""
        return f"{self.path}, {self.names['train', 'images']}[{row}]"

    def bad(self, part: Part, role: Role, cause: str, *index: int) -> BadFile:
        """Return an error that names an array, and a place in it if one is given."""
        return self.bad_array(self.names[part, role], cause, *index)

    def bad_array(self, name: str, cause: str, *index: int) -> BadFile:
        """Return an error that names an array by its name in the file."""
        return BadFile(f"{self.path}: {name}{list(index) if index else ''} {cause}")


# --- names ------------------------------------------------------------------------------------------------------------


def _known() -> dict[str, Key]:
    """Return part and role by usual name of an array, in lower case without separators."""
    found: dict[str, Key] = {}
    for role, words in ROLES.items():
        for word in words:
            found[word] = ("train", role)
            for part, spellings in SPELLINGS.items():
                for spelling in spellings:
                    found[f"{word}{spelling}"] = found[f"{spelling}{word}"] = (part, role)
    return found


KNOWN = _known()


def _named(path: Path, held: Sequence[str], wanted: Mapping[Key, str | None], reading: Reading) -> dict[Key, str]:
    """Return the names of the arrays in the file; BadFile if one is missing or two may be meant."""
    found: dict[Key, str] = {}
    for key, name in wanted.items():
        if name in held:
            found[key] = str(name)
        elif name != DEFAULTS[key] and name is not None:
            raise BadFile(f"{path}: holds no array {name!r}; it has {', '.join(held) or 'none'}")
    for key, name in wanted.items():
        if key in found or reading == 1:
            continue
        meant = [one for one in held if KNOWN.get(re.sub("[^a-z0-9]", "", one.casefold())) == key]
        meant = [one for one in meant if one not in found.values()]
        if len(meant) > 1:
            option = name or "_".join(key)
            raise BadFile(f"{path}: {' and '.join(meant)} may both be the {option}; write {option} = {meant[0]!r}")
        if meant:
            found[key] = meant[0]
    for role in ROLES:
        if ("train", role) not in found:
            raise BadFile(f"{path}: holds no array {wanted['train', role]!r}; it has {', '.join(held) or 'none'}")
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, wanted: Mapping[Key, str | None], reading: Reading, others: Mapping[str, str | None]) -> Archive:
    """Return the arrays of an archive that are used; BadFile if one is missing or the file is damaged.

    Args:
        path: the file.
        wanted: names of inputs and labels of each part.
        reading: 1 finds arrays by these names only.
        others: names of further arrays by the option that names them.
    """
    try:
        if not zipfile.is_zipfile(path):  # numpy would take it for pickled objects and advise to allow them
            raise BadFile(f"{path}: cannot be read as an archive of arrays; write it with numpy.savez")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            held = archive.files
            for option, name in others.items():
                if name is not None and name not in held:
                    raise BadFile(
                        f"{path}: {option} = {name!r}: holds no such array; it has {', '.join(held) or 'none'}"
                    )
            more = {name: _array(archive, name) for name in others.values() if name is not None}
            names = _named(path, [name for name in held if name not in more], wanted, reading)
            used = {key: name for key, name in names.items() if all((key[0], role) in names for role in ROLES)}
            arrays = {key: _array(archive, name) for key, name in used.items()}
    except BadFile:
        raise
    except Exception as error:  # zipfile and numpy may raise any exception for a damaged file
        raise BadFile(f"{path}: cannot be read as an archive of arrays: {error}") from error
    left_out = [name for name in held if name not in used.values() and name not in more]
    notes = [f"arrays left out: {', '.join(left_out)}"] if left_out else []
    return Archive(path=path, names=used, arrays=arrays, others=more, notes=notes, reading=reading)


def _array(archive: Any, name: str) -> Array:
    """Return an array of an archive. An array of Python objects is read without calling anything that the file names."""
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if read(file)[2].hasobject:
            return _objects(file)
    found: Array = archive[name]
    return found


class _Shell:
    """Takes the place of an array or a dtype in a pickle, and keeps its state."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _value(dtype: _Shell, content: bytes) -> Any:
    """Return the value of a pickled numpy scalar: a number or a text."""
    kind = np.dtype(dtype.given[0]).newbyteorder(dtype.state[1])
    if kind.kind not in "biufSU":
        raise pickle.UnpicklingError(f"it holds objects of type {kind}; write texts by .astype(str)")
    return np.frombuffer(content, kind)[0].item()


class _Objects(pickle.Unpickler):
    """Unpickles numpy arrays of texts and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Shell
        if module.partition(".")[0] == "numpy" and name == "scalar":
            return _value
        raise pickle.UnpicklingError(f"it holds objects of {module}.{name}; write texts by .astype(str)")


def _objects(file: IO[bytes]) -> Array:
    _, shape, _, _, values = _Objects(file).load().state
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found.reshape(shape)
