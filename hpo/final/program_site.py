"""A command's program in `hpo train`: its folder lies in the output folder, and what it prints is shown."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpo import text
from hpo.errors import StudyError
from hpo.own.command import GRACE_SECONDS
from hpo.own.process import Lines
from hpo.spec.study_file import StudySpec


class ShownProgram:
    """A program's site outside of a search. Nothing ends it but the person at the terminal."""

    grace = GRACE_SECONDS

    def __init__(self, output: Path) -> None:
        """Use a folder for the program.

        Args:
            output: the folder; the program's own checkpoints lie in `checkpoint` in it.
        """
        self.folder = output.absolute() / "checkpoint"
        self.reports = output.absolute() / "reports.jsonl"
        self._lines = Lines()

    def begin(self, words: Sequence[str]) -> None:  # noqa: ARG002  (the same signature as a worker's)
        """Make the folder. Raises StudyError if it holds files of an earlier run, or cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.reports.unlink(missing_ok=True)
            if any(self.folder.iterdir()):
                raise StudyError(
                    f"{self.folder}: holds files of an earlier run; remove it, or name another folder with -o"
                )
        except OSError as error:
            raise StudyError(
                f"{self.folder}: cannot be written: {error.strerror}; name another folder with -o"
            ) from None

    def known(self) -> dict[int, float]:
        """Return no values: the program begins at its first epoch."""
        return {}

    def keep(self, output: bytes) -> None:
        """Show the lines that the program has printed."""
        for line in self._lines.of(output):
            text.say_page(line)

    def let_go(self) -> None:
        """Do nothing: no worker ends this run."""

    def start_over(self) -> None:
        """Do nothing: there is no earlier attempt."""

    def note_unread(self, last: int, first: int) -> None:
        """Do nothing: there is no earlier attempt."""

    def record(self) -> None:
        """Do nothing: there is no later attempt."""

    def end(self) -> None:
        """Show a last line that no newline has ended. What the program has left running ends with this process."""
        for line in self._lines.rest():
            text.say_page(line)


@contextmanager
def given(spec: StudySpec, output: Path, *, replaying: bool) -> Iterator[ShownProgram | None]:
    """Give a command's program a site in the output folder, or for a replay in a folder that is removed afterwards.

    An objective gets None: it needs none.
    """
    if not spec.has_program:
        yield None
    elif replaying:
        with tempfile.TemporaryDirectory(prefix="hpo-replay-") as folder:
            yield ShownProgram(Path(folder))
    else:
        yield ShownProgram(output)
