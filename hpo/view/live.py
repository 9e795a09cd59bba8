"""A study in the terminal: the live view of a run, and plain lines without a terminal.

It shows what `hpo.study` has read and accesses no database. It imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from hpo import text
from hpo.view.pages import finished_line
from hpo.view.picture import Around, render

if TYPE_CHECKING:
    from hpo.study.status import Summary
    from hpo.study.trial_history import FinishedTrial

ECHO = 2  # characters of the ^C that a terminal writes behind the last line, which must not wrap there


class Picture(Protocol):
    """A picture that is replaced in place, as `rich.live.Live` does it in a terminal."""

    transient: bool

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update(self, picture: RenderableType, /) -> None: ...
    def refresh(self) -> None: ...


class LiveView:
    """The output of a search: a live picture in a terminal or notebook, else one plain line per finished trial.

    Args:
        is_quiet: show nothing.
        console: where it is shown. By default stdout; of a command it is silenced for good once its reader is gone.
        live: draws the picture; by default rich, if the console is a terminal that can show it.
    """

    def __init__(self, *, is_quiet: bool = False, console: Console | None = None, live: Picture | None = None) -> None:
        self.console = console or Console(file=sys.stdout, emoji=False)
        self._owns_stream = live is None and self.console.file is sys.stdout  # stderr and a notebook are the caller's
        self.is_quiet = is_quiet
        can_draw = self.console.is_terminal and not self.console.is_dumb_terminal
        if can_draw and self.console.encoding.startswith("utf"):
            # No refresh thread: the caller updates several times a second anyway, and can fork or exit at any time.
            live = live or Live(console=self.console, auto_refresh=False)
        self.live = None if is_quiet else live
        self.has_drawn = False  # whether the terminal shows a picture
        self.size = self.console.size  # when something was drawn last
        self.said: list[str] = []  # lines above the picture

    def __enter__(self) -> LiveView:
        if self.live:
            with self._heard():
                self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            with self._heard():
                self.live.transient = not self.has_drawn
                self.live.stop()

    def stage(self, words: str) -> None:
        """Show what is being waited for before there is a study to show."""
        with self._heard():
            if self.live:
                line = Text(text.safe(words), style="dim", no_wrap=True, overflow="ellipsis")
                self._draw(line)

    def update(self, summary: Summary, newly_finished: Sequence[FinishedTrial], around: Around | None = None) -> None:
        """Show the study as it is now.

        Args:
            summary: the study.
            newly_finished: trials that have finished since the last call.
            around: what the picture shows besides.
        """
        with self._heard():
            if self.live:
                width, height = self.console.size
                self._draw(render(summary, width - ECHO, height, around))
                self.has_drawn = True
            elif not self.is_quiet:
                for trial in newly_finished:
                    text.say(finished_line(trial, summary), to=self.console.file)

    def _draw(self, picture: RenderableType) -> None:
        """Draw the picture in place of the last one; after a resize, on a cleared screen: the terminal has wrapped lines anew."""
        assert self.live
        self.live.update(picture)
        if isinstance(self.live, Live) and self.console.size != self.size:
            self.size = self.console.size
            self.console.clear()
            self.live._live_render._shape = None  # else rich goes up by as many lines as the old picture had
            for line in self.said:
                self._print(line)
        self.live.refresh()

    def _print(self, line: str) -> None:
        self.console.print(Text(line, style="yellow"))

    def say(self, line: str) -> None:
        """Print a line, above the picture if there is one."""
        with self._heard():
            if self.live:
                self.said.append(text.safe(line))
                self._print(self.said[-1])
            elif not self.is_quiet:
                text.say(line, to=self.console.file)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Stop all output when the reader is gone, as after `hpo run ... | head`. The search continues."""
        try:
            yield
        except (OSError, SystemExit):  # rich raises SystemExit for a broken pipe
            self.is_quiet = True
            live, self.live = self.live, None
            if self._owns_stream:
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    # Buffered output is discarded too; else flushing it at the exit of the process would fail.
                    os.dup2(nowhere.fileno(), self.console.file.fileno())
            with suppress(OSError, SystemExit, IndexError):  # IndexError: from rich, if it was interrupted in its start
                if live:
                    live.stop()
