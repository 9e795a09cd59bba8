"""Lets mkdocs read a list right below a line as GitHub does; Python-Markdown wants an empty line between."""

from __future__ import annotations

import re
from typing import Any

BOLD_LINE = re.compile(r"^(\*\*.+\*\*)\n(?=- )", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with an empty line between a bold line and the list below it. mkdocs calls this for each page."""
    return BOLD_LINE.sub(r"\1\n\n", markdown)
