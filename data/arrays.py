"""Images from NumPy archives of arrays (`.npz`), the format of Keras's data sets too."""

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
import torch
from torch import Tensor

from hpo.data.channels import CHANNELS, is_sure
from hpo.data.channels import channels_last as are_last
from hpo.data.files import BadFile, File, existing_file
from hpo.data.names import SPELLINGS, Part, in_order, is_label
from hpo.data.source import Reading, Source

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
MOST_WHOLE = 2**53  # larger floats cannot represent every whole number
LONG = 16  # an array with one side this long and one as short as CHANNELS is not a grey image


def npz(
    *,
    path: File,
    images: str = "images",
    labels: str = "labels",
    validation_images: str | None = None,
    validation_labels: str | None = None,
    test_images: str = "test_images",
    test_labels: str = "test_labels",
    channels_last: bool | None = None,
    reading: Reading = 2,
) -> Source:
    """Return images from a file that `numpy.savez` wrote.

    Arrays with other names than the options say are found by their usual names, such as x_train, y_train, x_val or
    train_images. BadFile names the array and the fault.

    Args:
        path: the file.
        images: array of pixels, integers from 0 to 255: [N, C, H, W], [N, H, W, C], or [N, H, W] for grey images.
        labels: array of labels: whole numbers or texts [N] or [N, 1], or one-hot rows [N, K]. Classes are numbered by
            sorted label.
        validation_images: array of pixels of the validation part, if the file has one.
        validation_labels: array of labels of the validation part.
        test_images: array of pixels of the test part, if the file has one.
        test_labels: array of labels of the test part.
        channels_last: whether images are [N, H, W, C] (default: decided by their shape).
        reading: 1 reads as hpo did before December 2026: arrays only by the names in the options, and channels first
            unless `channels_last` is true.
    """
    wanted: dict[Key, str | None] = {
        ("train", "images"): images,
        ("train", "labels"): labels,
        ("validation", "images"): validation_images,
        ("validation", "labels"): validation_labels,
        ("test", "images"): test_images,
        ("test", "labels"): test_labels,
    }
    archive = _read(existing_file(path, "path"), wanted, reading)
    last, told = archive.order(channels_last)
    order = archive.classes()
    validation, test = (
        (archive.pixels(part, last), archive.numbers(part, order)) if archive.has(part) else (None, None)
        for part in ("validation", "test")
    )
    return Source(
        inputs=archive.pixels("train", last),
        targets=archive.numbers("train", order),
        num_classes=len(order),
        classes=tuple(order),
        validation_inputs=validation[0],
        validation_targets=validation[1],
        test_inputs=test[0],
        test_targets=test[1],
        notes=(*archive.notes, *told),
        place=archive.place,
        reading=reading,
    )


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


def _read(path: Path, wanted: Mapping[Key, str | None], reading: Reading) -> _Archive:
    try:
        if not zipfile.is_zipfile(path):  # numpy would take it for pickled objects and advise to allow them
            raise BadFile(f"{path}: cannot be read as an archive of arrays; write it with numpy.savez")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            held = archive.files
            names = _named(path, held, wanted, reading)
            used = {key: name for key, name in names.items() if all((key[0], role) in names for role in ROLES)}
            arrays = {key: _array(archive, name) for key, name in used.items()}
    except BadFile:
        raise
    except Exception as error:  # zipfile and numpy may raise any exception for a damaged file
        raise BadFile(f"{path}: cannot be read as an archive of arrays: {error}") from error
    left_out = [name for name in held if name not in used.values()]
    notes = [f"arrays left out: {', '.join(left_out)}"] if left_out else []
    return _Archive(path=path, names=used, arrays=arrays, notes=notes, reading=reading)


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


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """The used arrays of an archive, by part and role."""

    path: Path
    names: Mapping[Key, str]
    arrays: Mapping[Key, Array]
    notes: Sequence[str]
    reading: Reading

    def has(self, part: Part) -> bool:
        return (part, "images") in self.arrays

    def place(self, row: int) -> str:
        """Return the place of a training image: file, array, index."""
        return f"{self.path}, {self.names['train', 'images']}[{row}]"

    def order(self, channels_last: bool | None) -> tuple[bool, list[str]]:
        """Return whether channels come last, and notes about it; BadFile if the shape is ambiguous or contradicts the option."""
        shape = list(self.arrays["train", "images"].shape)
        name = self.names["train", "images"]
        if self.reading == 1 or len(shape) != 4:
            return bool(channels_last), []
        last = are_last(shape[1:])
        if channels_last is not None:
            if last != channels_last and is_sure(shape[1:]):
                orders = ("[N, H, W, C]", "[N, C, H, W]")
                told, seen = orders if channels_last else orders[::-1]
                raise BadFile(
                    f"{self.path}: {name} is {shape}, which is {seen} by its sides and {told} by channels_last = "
                    f"{str(channels_last).lower()}; remove channels_last, or move the sides by np.moveaxis if it is right"
                )
            return channels_last, []
        if last is None:
            raise BadFile(
                f"{self.path}: {name} is {shape}, which may be [N, C, H, W] or [N, H, W, C]; "
                "write channels_last = false or true"
            )
        told = f"{name} is {shape}, read as [N, H, W, C]; channels_last = false reads it as [N, C, H, W]"
        return last, [told] if last else []

    def pixels(self, part: Part, last: bool) -> Tensor:
        """Return a part's images, uint8 [N, C, H, W]."""
        values, name = self.arrays[part, "images"], self.names[part, "images"]
        if values.dtype.kind not in "iu" or values.ndim not in (3, 4) or 0 in values.shape:
            raise BadFile(
                f"{self.path}: {name} is {values.dtype} {list(values.shape)}; "
                f"give integers [N, C, H, W] or [N, H, W]{_mend_of(values)}"
            )
        if values.ndim == 3 and min(values.shape[1:]) in CHANNELS and max(values.shape[1:]) >= LONG:
            raise BadFile(
                f"{self.path}: {name} is {list(values.shape)}, which would be grey images of "
                f"{values.shape[1]}x{values.shape[2]} pixels; reshape it to [N, H, W] or [N, C, H, W]"
            )
        outside = np.argwhere((values < 0) | (values > 255))
        if len(outside):
            place: tuple[int, ...] = tuple(outside[0].tolist())
            raise BadFile(f"{self.path}: {name}{list(place)} is {values[place]}; pixels go from 0 to 255")
        if values.ndim == 3:
            values = values[:, None]
        elif last:
            values = values.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))

    def classes(self) -> dict[str, int]:
        """Return the number of each class by its name."""
        names = [str(value) for value in np.unique(self._labels("train")).tolist()]
        return {name: number for number, name in enumerate(names if self.reading == 1 else in_order(names))}

    def numbers(self, part: Part, classes: Mapping[str, int]) -> Tensor:
        """Return a part's class numbers, int64 [N]."""
        labels = self._labels(part)
        values, inverse = np.unique(labels, return_inverse=True)
        numbers = np.array([classes.get(str(value), -1) for value in values.tolist()])
        found = numbers[inverse]
        if (found < 0).any():
            row = int((found < 0).argmax())
            raise BadFile(
                f"{self.path}: {self.names[part, 'labels']}[{row}] is {labels[row]}, which is not a class of the training images"
            )
        return torch.from_numpy(found.astype(np.int64))

    def _labels(self, part: Part) -> Array:
        """Return a part's labels [N], as integers or texts."""
        values, images = self.arrays[part, "labels"], self.arrays[part, "images"]
        name = self.names[part, "labels"]
        if values.dtype == object:
            values = self._plain(name, values)
        if values.ndim == 2 and values.shape[1] > 1 and len(values) == len(images):
            values = self._from_one_hot(name, values)
        if values.size == len(images) and values.ndim:
            values = values.reshape(-1)
        if values.dtype.kind == "b":
            values = values.astype(np.int64)
        elif values.dtype.kind == "f":
            values = self._whole(name, values)
        elif values.dtype.kind == "S":
            values = self._decoded(name, values)
        if values.dtype.kind not in "iuU" or values.shape != images.shape[:1]:
            at_the_end = values.ndim == 1 and images.ndim > 2 and len(values) == images.shape[-1]
            mend = (
                f"the last side of {self.names[part, 'images']} counts the images; bring it to the front by np.moveaxis"
                if at_the_end
                else "give each a whole number or a text"
            )
            raise BadFile(
                f"{self.path}: {name} is {values.dtype} {list(values.shape)} beside {len(images)} "
                f"{self.names[part, 'images']}; {mend}"
            )
        if values.dtype.kind == "U":
            texts = np.char.strip(values)
            for row, text in enumerate(texts.tolist()):
                if not (text if self.reading == 1 else is_label(text)):
                    raise BadFile(f"{self.path}: {name}[{row}] has no label")
            return values if self.reading == 1 else texts
        return values

    def _decoded(self, name: str, values: Array) -> Array:
        try:
            return np.char.decode(values, "utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(
                f"{self.path}: {name} holds bytes that are not UTF-8 ({error}); save them as texts"
            ) from error

    def _plain(self, name: str, values: Array) -> Array:
        """Return labels that are Python objects as an array of texts or of numbers."""
        listed = values.reshape(-1).tolist()
        kind = next((kind for kind in (str, bytes) if isinstance(listed[0], kind)), (int, float))
        if all(isinstance(value, kind) for value in listed):
            return np.array(listed).reshape(values.shape)
        row = next(row for row, value in enumerate(listed) if not isinstance(value, kind))
        raise BadFile(
            f"{self.path}: {name}[{row}] is {listed[row]!r}, of type {type(listed[row]).__name__}; "
            "give all labels as texts, or all as whole numbers"
        )

    def _whole(self, name: str, values: Array) -> Array:
        is_whole = (np.abs(values.astype(np.float64)) < MOST_WHOLE) & (values == np.trunc(values))  # False for nan
        odd = np.flatnonzero(~is_whole.reshape(-1))
        if len(odd):
            raise BadFile(
                f"{self.path}: {name}[{odd[0]}] is {values.reshape(-1)[odd[0]]}; give each a whole number or a text"
            )
        return values.astype(np.int64)

    def _from_one_hot(self, name: str, values: Array) -> Array:
        is_one = values == 1 if values.dtype.kind in "iufb" else np.zeros(values.shape, dtype=bool)
        odd = np.flatnonzero((is_one.sum(1) != 1) | ((values != 0) != is_one).any(1))
        if len(odd):
            raise BadFile(
                f"{self.path}: {name} is {list(values.shape)}, but row {odd[0]} is not zeros with a single 1; "
                "give each image one label"
            )
        found: Array = is_one.argmax(1)
        return found


def _mend_of(values: Array) -> str:
    if values.dtype == object:
        return "; images of several sizes must be brought to one"
    if values.ndim == 2:
        return "; reshape rows of pixels by .reshape(-1, H, W)"
    if values.dtype.kind not in "fb" or not values.size:
        return ""
    if values.min() >= 0 and values.max() <= 1:
        return ", such as (values * 255).round().astype('uint8')"
    if values.min() >= 0 and values.max() <= 255:
        return ", such as values.round().astype('uint8')"
    return f"; they go from {values.min():g} to {values.max():g}, so bring them to whole numbers from 0 to 255"
