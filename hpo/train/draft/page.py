"""The lines of a drafted study file, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from hpo import text

COLUMN = 46  # where the reasons begin, if a line is shorter
WIDTH = 120  # characters
WHOLE = 100_000  # characters of a reason at most


@dataclass(frozen=True)
class Line:
    """A key of a section, its value, and why it has it."""

    key: str
    value: Any
    why: str = ""

    @property
    def text(self) -> str:
        """The line in TOML, with the reason behind it, or above it if it is long."""
        written = f"{self.key} = {_inline(self.value)}"
        if not self.why:
            return written
        why = text.safe(self.why, WHOLE)  # names of columns may hold anything
        beside = f"{written.ljust(COLUMN)} # {why}"
        return beside if len(beside) <= WIDTH else f"# {why}\n{written}"


@dataclass(frozen=True)
class Section:
    """A section of the study file; its name is empty for the lines before the first."""

    name: str
    lines: Sequence[Line]

    @property
    def text(self) -> str:
        head = [f"[{self.name}]"] if self.name else []
        return "\n".join([*head, *(line.text for line in self.lines)])


def page(about: str, sections: Sequence[Section]) -> str:
    """Return the study file: what was looked at, and the sections."""
    said = "".join(f"# {text.safe(line, WHOLE)}\n" for line in about.splitlines())
    return said + "\n" + "\n\n".join(section.text for section in sections) + "\n"


def _inline(value: Any) -> str:
    """Return a value in one line of TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    written: str = tomli_w.dumps({"x": value})
    return written.partition(" = ")[2].strip()
