"""What README and the documentation hold: blocks of code, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

WRITTEN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md")  # by hand, but for those below
LEFT_OUT = ("reference.md", "decisions.md")  # made from the code; of its day
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CONSOLES = ("console", "bash", "shell", "sh")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code; one with a title is a whole file of this name."""

    language: str
    title: str | None
    text: str


def pages() -> dict[str, Path]:
    """Return every page by its path in the repository."""
    found = [file for pattern in WRITTEN for file in sorted(ROOT.glob(pattern)) if file.name not in LEFT_OUT]
    return {str(file.relative_to(ROOT)): file for file in found}


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    return [Block(language=one, title=title, text=text) for one, title, text in BLOCK.findall(page.read_text())]


def files(page: Path) -> dict[str, str]:
    """Return the files that a page shows whole, by name."""
    return {block.title: block.text for block in blocks(page) if block.title}


def commands(page: Path) -> Iterator[list[str]]:
    """Return the command lines of a page as words: what stands behind `$`, without comments."""
    for block in blocks(page):
        if block.language in CONSOLES:
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    yield shlex.split(line.removeprefix("$ "), comments=True)


def spans(page: Path) -> Iterator[list[str]]:
    """Return the spans of code in a page's text that begin with `hpo`, as words."""
    for span in re.findall(r"`(hpo [^`\n]+)`", BLOCK.sub("", page.read_text())):
        yield shlex.split(span)
