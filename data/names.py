"""What names mean: of parts, in folders and arrays, and of classes that are numbers."""

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
    """Return the part that a name stands for, if it does.

    Args:
        loosely: takes "train_set", "train2017" and "seg_train" as well.
    """
    word = name.strip().casefold()
    if not loosely or word in _PARTS:
        return _PARTS.get(word)
    word = _ADDED.sub("", word)
    return _PARTS.get(word) or _PARTS.get(re.split(r"[ _.-]", word)[-1])


def part_beside(name: str) -> tuple[Part, str] | None:
    """Return the part with whose spelling a name begins or ends, and the rest: "cat" for "train_cat", "a" for "trainA"."""
    for pattern in _BESIDE:
        if found := pattern.fullmatch(name.strip().casefold()):
            return _PARTS[found["part"]], found["rest"].strip(" _.-")
    return None


def is_label(text: str) -> bool:
    """Say whether a text, without blanks around it, is a label, and none that is missing."""
    return bool(text) and text.casefold() != "nan"


def whole_number(name: str) -> int | None:
    """Return the integer that a class's name writes, such as 7 for "7", "07" and "7.0"; None for any other name."""
    found = _WHOLE.fullmatch(name)
    return int(found[1]) if found else None


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of classes in the order of their numbers if all are whole numbers, else as text."""
    found = sorted(names)
    numbers = {name: whole_number(name) for name in found}
    return sorted(found, key=lambda name: numbers[name] or 0) if None not in numbers.values() else found
