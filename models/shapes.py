"""Shapes of one input, by kind of data: what a model function is given to build from, and which model takes which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """A row of a table. A model gets a dict: `numbers` [B, numbers] and `categories` [B, len(categories)].

    A dict lacks the kind of column that the table has none of.
    """

    numbers: int
    """Number of columns with numbers."""
    categories: tuple[int, ...] = ()
    """Number of codes of each column with categories. Code 0 is a value that is missing or was not in training."""


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """A text as int64 codes [B, length]. Code 0 is padding, code 1 is a word that was not in training."""

    length: int
    vocabulary: int
    """Number of codes, with those of padding and of unknown words."""


#: A tuple is an image [C, H, W], a series [C, T] or features [F]. A dict of tuples is for a user's own model.
Shape = tuple[int, ...] | TableShape | TokenShape | dict[str, tuple[int, ...]]
Kind = Literal["image", "series", "features", "table", "tokens", "named"]

#: By the number of dimensions of one input.
TENSORS: dict[int, Kind] = {1: "features", 2: "series", 3: "image"}
WORDS: dict[Kind, str] = {
    "image": "images [channels, height, width]",
    "series": "series [channels, steps]",
    "features": "features [count]",
    "table": "tables",
    "tokens": "texts",
    "named": "named tensors",
}
#: The kinds of input that a model takes. A model that is not listed takes images only.
TAKES: dict[str, tuple[Kind, ...]] = {
    "mlp": ("image", "series", "features", "table"),
    "cnn1d": ("series", "tokens"),
    "gru": ("series", "tokens"),
    "lstm": ("series", "tokens"),
    "transformer": ("series", "tokens"),
}
#: Some that take images, for messages.
OF_IMAGES = ("mlp", "cnn", "resnet18", "wide_resnet")


def kind_of(shape: Shape) -> Kind:
    """Return which kind of input has this shape; ValueError if there is none."""
    if isinstance(shape, TableShape):
        return "table"
    if isinstance(shape, TokenShape):
        return "tokens"
    if isinstance(shape, dict):
        return "named"
    if len(shape) not in TENSORS:
        raise ValueError(
            f"inputs of shape {list(shape)} are neither features [F], series [C, T] nor images [C, H, W]; reshape them"
        )
    return TENSORS[len(shape)]


def described(shape: Shape) -> str:
    """Return a shape in words."""
    if isinstance(shape, TableShape):
        columns = f"column{'' if shape.numbers == 1 else 's'}"
        return f"a table with {shape.numbers} {columns} of numbers and {len(shape.categories)} of categories"
    if isinstance(shape, TokenShape):
        return f"texts of {shape.length} codes"
    if isinstance(shape, dict):
        return f"named tensors ({', '.join(shape)})"
    return f"{kind_of(shape)}{'s' if kind_of(shape) == 'image' else ''} of shape {list(shape)}"


def expect(name: str, shape: Shape) -> None:
    """Raise ValueError if the model of this name does not take such inputs; it names the models that do."""
    kind = kind_of(shape)
    takes = TAKES.get(name, ("image",))
    if kind in takes:
        return
    fitting = OF_IMAGES if kind == "image" else [model for model, kinds in TAKES.items() if kind in kinds]
    wanted = _any_of([WORDS[one] for one in get_args(Kind) if one in takes])
    mend = f"take {_any_of(fitting)}" if fitting else 'take a model of your own, name = "file.py:function"'
    raise ValueError(f"{name} takes {wanted}, but the inputs are {described(shape)}; {mend}")


def _any_of(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + [words[-1]])


def image(name: str, shape: Shape) -> tuple[int, int, int]:
    """Return the shape of an image [C, H, W]; ValueError if it is not one."""
    expect(name, shape)
    assert isinstance(shape, tuple)
    channels, height, width = shape
    return channels, height, width
