"""The progress of a search that a Python program has started: in a notebook below the cell, else on stderr."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from hpo.view.live import LiveView

WIDTH, HEIGHT = 100, 32  # of the picture in a notebook, in characters
#: What rich's HTML is put into. It has no colours of its own, so the notebook's own background stays.
FORMAT = '<pre style="white-space: pre; overflow-x: auto; line-height: normal; font-family: monospace">{code}</pre>'


def view(*, is_quiet: bool) -> LiveView:
    """Return the view for the place where this program runs."""
    if not Console(file=io.StringIO()).is_jupyter:
        return LiveView(is_quiet=is_quiet, console=Console(file=sys.stderr, emoji=False))
    console = Console(file=sys.stdout, force_jupyter=False, force_terminal=False, width=WIDTH, height=HEIGHT)
    return LiveView(is_quiet=is_quiet, console=console, live=NotebookLive())


class NotebookLive:
    """A picture below a notebook's cell, in the way of `rich.live.Live`, which would need ipywidgets for it."""

    def __init__(self) -> None:
        self.transient = False  # whether the picture goes when it stops
        self._picture: RenderableType = Text("")
        self._shown: dict[str, str] = {}  # by type
        self._display: Any = None  # IPython's handle

    def start(self) -> None:
        """Begin. Nothing is shown before the first picture."""

    def stop(self) -> None:
        """Show the last picture, or none."""
        if self.transient:
            self._picture = Text("")
        self.refresh()

    def update(self, picture: RenderableType) -> None:
        self._picture = picture

    def refresh(self) -> None:
        """Show the picture in place of the last one."""
        shown = _drawn(self._picture)
        if shown == self._shown:
            return
        page: Any = importlib.import_module("IPython.display")  # by name: not everyone who searches has it

        self._shown = shown
        if self._display is None:
            self._display = page.display(shown, raw=True, display_id=True)
        else:
            self._display.update(shown, raw=True)


def _drawn(picture: RenderableType) -> dict[str, str]:
    """Return a picture as HTML and as plain text, by type."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        height=HEIGHT,
        force_terminal=True,
        force_jupyter=False,
        emoji=False,
    )
    console.print(picture)
    html = console.export_html(inline_styles=True, code_format=FORMAT, clear=False) if str(picture) else ""
    return {"text/html": html, "text/plain": console.export_text()}
