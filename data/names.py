"""The meaning of names: parts named by folders and arrays, and classes named by numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Part = Literal["train", "validation", "test"]
#: The usual spellings of the three parts, in any case.
SPELLINGS: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_PARTS: dict[str, Part] = {word: part for part, words in SPELLINGS.items() for word in words}
_ADDED = re.compile(r"[ _.-]?(set|data|split|part|images?|imgs?|[0-9]+)$")  # as in "test_set", "train2017"
_WORDS = "|".join(sorted(_PARTS, key=len, reverse=True))
_BESIDE = (re.compile(f"(?P<part>{_WORDS})(?P<rest>.*)"), re.compile(f"(?P<rest>.*?)(?P<part>{_WORDS})"))
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0*)?", re.ASCII)


def part_of(name: str, *, loosely: bool = False) -> Part | None:
    """Return the part that a name stands for, or None.

    Args:
        loosely: whether names such as "train_set", "train2017" and "seg_train" count too.
    """
    word = name.strip().casefold()
    if not loosely or word in _PARTS:
        return _PARTS.get(word)
    word = _ADDED.sub("", word)
    return _PARTS.get(word) or _PARTS.get(re.split(r"[ _.-]", word)[-1])


def part_beside(name: str) -> tuple[Part, str] | None:
    """Return the part at the start or end of a name, and the rest: "cat" for "train_cat", "a" for "trainA"."""
    for pattern in _BESIDE:
        if found := pattern.fullmatch(name.strip().casefold()):
            return _PARTS[found["part"]], found["rest"].strip(" _.-")
    return None


def is_label(text: str) -> bool:
    """Return whether a stripped text is a label: neither empty nor "nan"."""
    return bool(text) and text.casefold() != "nan"


def whole_number(name: str) -> int | None:
    """Return the integer that a class's name stands for: 7 for "7", "07" and "7.0"; None for any other name."""
    found = _WHOLE.fullmatch(name)
    return int(found[1]) if found else None


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of classes sorted as numbers if all are whole numbers, else as texts.

    ValueError for two that differ only in a decimal point, such as "1" and "1.0", since they are one class.
    """
    found = sorted(names)
    numbers = {name: whole_number(name) for name in found}
    for name in found:
        plain = name.partition(".")[0]
        if numbers[name] is not None and name != plain and plain in numbers:
            raise ValueError(f"the labels {plain} and {name} are one number written in two ways; write all in one way")
    return sorted(found, key=lambda name: numbers[name] or 0) if None not in numbers.values() else found
