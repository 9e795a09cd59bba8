"""The types of this package: a source of rows with targets, and the splits made from it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hpo.data.inputs import CATEGORIES, NUMBERS, Inputs, Kind, kind_of, some
from hpo.data.stored import Rows, Stored, chunks

#: How a source's files and its option `classes` are read: 1 as before December 2026, 2 as since.
Reading = Literal[1, 2]
#: How rows are divided into parts.
SplitRule = Literal["stratified", "random", "group", "time"]
Task = Literal["classification", "binary", "multilabel", "regression"]

#: Names of the constructor's arguments before December 2026. Users' own sources may still use them.
FORMER = {
    "images": "inputs",
    "labels": "targets",
    "validation_images": "validation_inputs",
    "validation_labels": "validation_targets",
    "test_images": "test_inputs",
    "test_labels": "test_targets",
}
Cls = TypeVar("Cls", bound=type)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What a source made of the training part's inputs: how all inputs are encoded."""

    transform: Callable[[Inputs], Inputs]
    categories: tuple[int, ...] = ()  # number of codes of each categorical column, with code 0 for unseen values
    vocabulary: int = 0  # number of tokens, with 0 for padding and 1 for unknown ones
    about: dict[str, Any] = field(default_factory=dict)  # the encoding as plain values for JSON


def _with_former_names(cls: Cls) -> Cls:
    """Let the constructor take the names in FORMER too. In `dataclasses.replace` they win."""
    init: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def renamed(self: Any, **given: Any) -> None:
        init(self, **(given | {FORMER[name]: given.pop(name) for name in FORMER.keys() & given.keys()}))

    cls.__init__ = renamed  # type: ignore[misc]
    return cls


@_with_former_names
@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Rows as they are stored, with their targets. A shipped validation or test part has its own tensors.

    Args:
        inputs: one tensor, or several by name. One tensor is uint8 or float32 images [N, C, H, W], float32 features [N, F],
            float32 series [N, C, T] or int64 tokens [N, L]. A table has `numbers` float32 [N, F] and `categories` int64
            [N, C]. Token 0 is padding, token 1 an unknown one. Category 0 is a missing one. A missing number is NaN. Of
            tensors by other names, floats and uint8 images are standardised, all others stay as they are.
        targets: int64 [N] for classification, bool [N, 1] for binary, bool [N, L] for multilabel, float32 [N, T] in
            original units for regression.
        task: decides the model's outputs, the loss by default and the metrics.
        num_classes: number of classes, for classification.
        classes: names of classes by number, or of labels by column.
        target_names: names of the columns of `targets`, for regression.
        validation_inputs: inputs of the validation part, if the source ships one. Likewise targets, and a test part.
        notes: how ambiguous files were read.
        place: returns the file or row of an input, by its row in the store of `inputs`.
        groups: int64 [N], the group of each row of `inputs`, such as a patient, for a split by group.
        times: int64 or float [N], when each row of `inputs` was made, in any unit, for a split by time.
        validation_groups: groups of the shipped validation part, for `hpo check`. Likewise of a test part.
        validation_times: times of the shipped validation part, likewise, of the type of `times`.
        fit: makes the encoding of all inputs from those of the training part alone; None: tokens and categories that the
            training part lacks become unknown, all else stays as it is.
        split: option of `hpo.data.select`, as all that follow.
    """

    inputs: Inputs
    targets: Tensor
    task: Task = "classification"
    num_classes: int = 0
    validation_inputs: Inputs | None = None
    validation_targets: Tensor | None = None
    test_inputs: Inputs | None = None
    test_targets: Tensor | None = None
    classes: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    place: Callable[[int], str] | None = None
    groups: Tensor | None = None
    times: Tensor | None = None
    validation_groups: Tensor | None = None
    test_groups: Tensor | None = None
    validation_times: Tensor | None = None
    test_times: Tensor | None = None
    fit: Callable[[Inputs], Fitted] | None = None
    reading: Reading = 2
    split: SplitRule | None = None
    subset: int | None = None
    folds: int | None = None
    fold: int | None = None
    resident: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for tensors of a wrong type, shape or range."""
        if self.task not in TARGETS:
            raise ValueError(f"task = {self.task!r}: write one of {', '.join(TARGETS)}")
        if self.task == "classification" and self.num_classes < 2:
            raise ValueError(f"num_classes = {self.num_classes}: a source needs at least 2 classes")
        if self.task == "classification" and len(self.classes) not in (0, self.num_classes):
            raise ValueError(f"{len(self.classes)} names of classes for {self.num_classes} classes; give one for each")
        self._check("", self.inputs, self.targets)
        self._check_own("validation_", self.validation_inputs, self.validation_targets)
        self._check_own("test_", self.test_inputs, self.test_targets)
        self._check_names()
        _check_keys("groups", self.groups, self.targets)
        _check_keys("times", self.times, self.targets)
        _check_keys("validation_groups", self.validation_groups, self.validation_targets)
        _check_keys("test_groups", self.test_groups, self.test_targets)
        _check_keys("validation_times", self.validation_times, self.validation_targets, like=self.times)
        _check_keys("test_times", self.test_times, self.test_targets, like=self.times)
        _refuse_constant(self)

    def _check(self, part: str, inputs: Inputs, targets: Tensor) -> None:
        _check_inputs(f"{part}inputs", inputs, self.fit is None)
        wanted, dimensions, said = TARGETS[self.task]
        name = f"{part}targets"
        if targets.dtype != wanted:
            raise ValueError(f"{name} are {targets.dtype}; give {said} as {wanted}")
        count = some(inputs).shape[0]
        if targets.ndim != dimensions or targets.shape[:1] != torch.Size([count]) or 0 in targets.shape:
            of_each = "one for each row" if dimensions == 1 else f"{[count, 'L' if wanted == torch.bool else 'T']}"
            raise ValueError(f"{name} have shape {list(targets.shape)} beside {count} {part}inputs; give {of_each}")
        if self.task == "classification":
            lowest, highest = int(targets.min()), int(targets.max())
            if lowest < 0 or highest >= self.num_classes:
                raise ValueError(
                    f"{name} run from {lowest} to {highest}; with num_classes = {self.num_classes} "
                    f"they must lie in 0..{self.num_classes - 1}"
                )
        elif self.task == "binary" and targets.shape[1] != 1:
            raise ValueError(f'{name} have {targets.shape[1]} columns; binary has 1, write task = "multilabel"')
        elif self.task == "regression" and not bool(targets.isfinite().all()):
            row = int((~targets.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name}[{row}] is {targets[row].tolist()}; give finite numbers, or leave the row out")

    def _check_own(self, part: str, inputs: Inputs | None, targets: Tensor | None) -> None:
        if (inputs is None) != (targets is None):
            raise ValueError(f"only one of {part}inputs and {part}targets is given; give both, or neither")
        if inputs is None or targets is None:
            return
        self._check(part, inputs, targets)
        ours, others = _described(self.inputs), _described(inputs)
        if ours != others:
            raise ValueError(f"{part}inputs are {others} a row, inputs {ours}; bring both to one type and shape")
        if targets.shape[1:] != self.targets.shape[1:]:
            raise ValueError(f"{part}targets have shape {list(targets.shape)}, targets {list(self.targets.shape)}")

    def _check_names(self) -> None:
        """Raise ValueError unless all classes, labels or targets have names, or none."""
        counts = {"multilabel": ("classes", self.outputs), "binary": ("classes", 2)}
        name, count = counts.get(self.task, ("target_names", self.outputs))
        given = getattr(self, name)
        if self.task != "classification" and len(given) not in (0, count):
            raise ValueError(f"{name} are {list(given)}; give {count}, one for each, or none")

    @property
    def kind(self) -> Kind:
        """What the inputs are."""
        return kind_of(self.inputs)

    @property
    def unit(self) -> str:
        """What one of the inputs is called."""
        return "image" if self.kind == "image" else "row"

    @property
    def outputs(self) -> int:
        """Number of a model's outputs: classes, labels, or targets."""
        return self.num_classes if self.task == "classification" else self.targets.shape[1]

    @property
    def images(self) -> Inputs:
        """The former name of `inputs`."""
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """The former name of `targets`."""
        return self.targets

    @property
    def own_validation(self) -> tuple[Inputs, Tensor] | None:
        """Inputs and targets of the shipped validation part, or None."""
        return _pair(self.validation_inputs, self.validation_targets)

    @property
    def own_test(self) -> tuple[Inputs, Tensor] | None:
        """Inputs and targets of the shipped test part, or None."""
        return _pair(self.test_inputs, self.test_targets)

    def named(self, number: int) -> str:
        """Return a class's name in quotes, or its number if classes have no names."""
        if self.task == "binary" and not self.classes:
            return str(bool(number)).lower()
        return repr(self.classes[number]) if self.classes else str(number)

    def class_at(self, number: int, index: int) -> str:
        """Return a class's name with the place of one of its rows."""
        return f"{self.named(number)} (first: {self.placed(index)})"

    def placed(self, index: int) -> str:
        """Return the place of one of `inputs`: its file, its row in a file, or its number."""
        row = int(self.inputs.rows[index]) if isinstance(self.inputs, Stored) else index
        return self.place(row) if self.place else f"{self.unit} {row}"


#: Type and number of dimensions of the targets of a task, and what they are.
TARGETS: dict[Task, tuple[torch.dtype, int, str]] = {
    "classification": (torch.int64, 1, "class numbers"),
    "binary": (torch.bool, 2, "labels"),
    "multilabel": (torch.bool, 2, "labels"),
    "regression": (torch.float32, 2, "numbers"),
}


def _pair(inputs: Inputs | None, targets: Tensor | None) -> tuple[Inputs, Tensor] | None:
    return None if inputs is None or targets is None else (inputs, targets)


def _check_inputs(name: str, inputs: Inputs, are_encoded: bool) -> None:
    """Raise ValueError for inputs of a wrong type or shape, or with values that no model takes.

    Args:
        are_encoded: whether tokens and categories are codes already, which no `fit` renumbers.
    """
    if isinstance(inputs, dict) and not inputs:
        raise ValueError(f"{name} are an empty dict; give at least one tensor")
    tensors: dict[str, Any] = dict(inputs) if isinstance(inputs, dict) else {name: inputs}
    for one, rows in tensors.items():
        if not one or "." in one:
            raise ValueError(
                f"inputs by name: {one!r} has a dot or is empty, so no model can keep it; name it otherwise"
            )
        if not isinstance(rows, Tensor if isinstance(inputs, dict) else Tensor | Stored):
            raise ValueError(f"{one} are a {type(rows).__name__}; give a tensor, such as torch.from_numpy(array)")
    kind = kind_of(inputs)
    for one, rows in tensors.items():
        wanted = {NUMBERS: torch.float32, CATEGORIES: torch.int64}.get(one) if kind == "table" else rows.dtype
        if rows.dtype != wanted or (kind == "table" and rows.ndim != 2):
            raise ValueError(f"{one} are {rows.dtype} of shape {list(rows.shape)}; give {wanted} [N, columns]")
        if 0 in rows.shape or not rows.ndim:
            raise ValueError(f"{one} have shape {list(rows.shape)}; give rows, none of its sides may be 0")
        if rows.dtype.is_complex:
            raise ValueError(f"{one} are {rows.dtype}; give real and imaginary parts as two channels")
        is_number = kind == "table" and one == NUMBERS
        is_code = are_encoded and (kind == "tokens" or (kind == "table" and one == CATEGORIES))
        if rows.dtype.is_floating_point:
            _refuse(one, rows, torch.isinf if is_number else _not_finite, "give finite numbers")
        elif is_code:
            _refuse(one, rows, lambda codes: codes < 0, "give codes from 0")
    counts = {one: rows.shape[0] for one, rows in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the inputs have different numbers of rows: {counts}")


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _refuse(name: str, rows: Rows, is_bad: Callable[[Tensor], Tensor], mend: str) -> None:
    """Raise ValueError, which names the place, for the first bad value. A memory map is read piece by piece."""
    before = 0
    for chunk in chunks(rows):
        bad = is_bad(chunk)
        if bool(bad.any()):
            row, *behind = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{[before + row, *behind]} is {chunk[(row, *behind)].item()}; {mend}")
        before += len(chunk)


def _check_keys(name: str, keys: Tensor | None, targets: Tensor | None, like: Tensor | None = None) -> None:
    """Raise ValueError for groups or times of a wrong type or length, or of another type than those of the training part."""
    if keys is None:
        return
    count = 0 if targets is None else len(targets)
    is_time = name.endswith("times")
    if keys.dtype != torch.int64 and not (is_time and keys.is_floating_point()):
        raise ValueError(f"{name} are {keys.dtype}; give torch.int64{', or floats' * is_time}")
    if like is not None and keys.dtype != like.dtype:
        raise ValueError(f"{name} are {keys.dtype}, those of the training part {like.dtype}; give one type")
    if list(keys.shape) != [count]:
        raise ValueError(f"{name} have shape {list(keys.shape)} beside {count} rows; give one for each row")
    if keys.is_floating_point() and not bool(keys.isfinite().all()):
        raise ValueError(f"{name}[{int((~keys.isfinite()).nonzero()[0])}] is not finite; give each row its time")


def _refuse_constant(source: Source) -> None:
    """Raise ValueError if a column of the targets has one value in all rows, so that there is nothing to learn."""
    columns = source.targets[:, None] if source.targets.ndim == 1 else source.targets
    constant = (columns == columns[:1]).all(0).nonzero().flatten().tolist()
    if not constant or len(columns) < 2:
        return
    number, names = constant[0], source.target_names or (source.classes if source.task == "multilabel" else ())
    column = f" {names[number]!r}" if names else f"s[:, {number}]" if source.targets.ndim > 1 else "s"
    value = columns[0, number].item()
    said = f"class {source.named(int(value))}" if source.task in ("classification", "binary") else str(value).lower()
    raise ValueError(
        f"target{column}: {said} in all {len(columns)} rows, so there is nothing to learn; name another target"
    )


def _described(inputs: Inputs) -> Any:
    """Return shape and type of a row, for a comparison and a message."""
    if isinstance(inputs, dict):
        return {name: _described(one) for name, one in sorted(inputs.items())}
    return f"{inputs.dtype} {list(inputs.shape[1:])}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One part of a source. Its targets are on the device where they are used, its inputs too or in their store.

    Targets of a regression are standardised: (target - mean) / std, with `Splits.target_mean` and `Splits.target_std`.
    """

    inputs: Inputs
    targets: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What a search may see: the training and the validation split, never the test split."""

    train: Split
    validation: Split
    num_classes: int  # 0 if the task has no classes
    mean: Tensor | dict[str, Tensor]  # float32 [C] or [F], of the training split, in raw values; empty for tokens
    std: Tensor | dict[str, Tensor]  # as `mean`; 1 where values are constant
    digest: str  # SHA-256 of both splits, as hex
    task: Task = "classification"
    classes: tuple[str, ...] = ()  # names by class number or column of labels, if there are names
    target_names: tuple[str, ...] = ()  # names of the columns of a regression's targets
    target_mean: Tensor | None = None  # float32 [T], of the training split, for a regression
    target_std: Tensor | None = None  # float32 [T]
    categories: tuple[int, ...] = ()  # number of codes of each categorical column
    vocabulary: int = 0  # number of tokens
    about: dict[str, Any] = field(default_factory=dict)  # how inputs are encoded, as plain values for JSON
    white: int = 255  # highest raw value of uint8 images in the training split
    notes: tuple[str, ...] = ()  # how ambiguous files were read
    test_count: int = 0  # number of rows in the test split, which is not here

    @property
    def kind(self) -> Kind:
        """What the inputs are."""
        return kind_of(self.train.inputs)

    @property
    def unit(self) -> str:
        """What one of the inputs is called."""
        return "image" if self.kind == "image" else "row"

    @property
    def outputs(self) -> int:
        """Number of a model's outputs: classes, labels, or targets."""
        return self.num_classes if self.task == "classification" else self.train.targets.shape[1]

    @property
    def device(self) -> torch.device:
        """The device where the splits are used."""
        return some(self.train.inputs).device
