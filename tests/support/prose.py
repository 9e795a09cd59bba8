"""How long the sentences of a page are: `python -m tests.support.prose FILE...` prints it.

Code blocks, tables, headings and pictures are no prose. A span of code counts as one word.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^(```|~~~|---).*?^\1\s*$", re.MULTILINE | re.DOTALL)
NO_PROSE = re.compile(r"^\s*(\||#|!\[|<|!!!|---).*$", re.MULTILINE)
ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+", re.MULTILINE)
END = re.compile(r"(?<=[.!?])[*_)\"]*\s+(?=\S)")


def sentences(page: str) -> list[str]:
    """Return the sentences of a page in Markdown."""
    plain = NO_PROSE.sub("\n", BLOCK.sub("\n", page))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]+`", "code", plain))
    paragraphs = re.split(r"\n\s*\n", ITEM.sub("\n\n", plain))
    found = [one.strip() for text in paragraphs for one in END.split(" ".join(text.split()))]
    return [one for one in found if len(one.split()) > 1]


def measure(page: str) -> tuple[int, float, float]:
    """Return how many sentences a page has, and the words and semicolons of one on average."""
    found = sentences(page)
    words = sum(len(re.findall(r"\w[\w'-]*", one)) for one in found)
    return len(found), words / len(found), sum(one.count(";") for one in found) / len(found)


def main() -> None:
    """Print a line for each file, and one for all of them."""
    pages = {name: Path(name).read_text() for name in sys.argv[1:]}
    for name, page in [*pages.items(), ("all", "\n\n".join(pages.values()))]:
        count, words, semicolons = measure(page)
        print(f"{name}: {count} sentences, {words:.1f} words and {semicolons:.2f} semicolons each")


if __name__ == "__main__":
    main()
