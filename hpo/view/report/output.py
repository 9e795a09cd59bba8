"""Writes a report in the format that is asked for, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hpo.errors import SpecError, StudyError, nearest
from hpo.files import atomic_write
from hpo.spec import extras
from hpo.study.plain import PlainStudy
from hpo.study.study import Study
from hpo.view.report.privacy import Privacy

FORMATS = ("html", "json", "csv", "png")
USUAL = "report"  # the name of a file without one


def choose(output: Path | None, format: str | None) -> tuple[Path, str]:
    """Return the file to write and its format. Raises SpecError for a format that does not exist, or whose package is missing.

    Args:
        output: the file, as given.
        format: the format, as given; else the file's suffix tells it, else it is html.
    """
    chosen = format or (output.suffix.removeprefix(".").lower() if output and output.suffix else FORMATS[0])
    if chosen == "htm":
        chosen = "html"
    if chosen not in FORMATS:
        where = f"--format {format}" if format else f"{output}: the suffix .{chosen}"
        raise SpecError(f"{where}: there is no such format{nearest(chosen, FORMATS)}")
    if chosen == "png" and find_spec("matplotlib") is None:
        raise SpecError(f"--format png: {extras.missing('plots')}")
    return output or Path(f"{USUAL}.{chosen}"), chosen


def check_place(path: Path) -> None:
    """Raise StudyError if a file cannot be written there, before anything is read."""
    if path.is_dir():
        raise StudyError(f"{path}: is a folder; name a file with -o")
    if not path.parent.is_dir():
        raise StudyError(f"{path}: there is no folder {path.parent}; make it, or name another file with -o")


def write(path: Path, format: str, studies: Sequence[Study | PlainStudy], *, is_full: bool) -> int:
    """Write a report on these studies. Return its size in bytes.

    Raises StudyError for a study without trials, and if the file cannot be written.
    """
    from hpo.view.report import document, page, picture, reading, sheet

    reports = [reading.read(study) for study in studies]
    hosts = {str(one.receipt["host"]) for report in reports for one in report.leaders if one.receipt.get("host")}
    hosts |= {host for study in studies if isinstance(study, Study) for host in reading.hosts(study)}
    privacy = Privacy.of(studies, hosts, is_full=is_full)
    if format == "png":
        content = picture.render(reports, privacy)
    else:
        render = {"html": page.render, "json": document.render, "csv": sheet.render}[format]
        content = render(reports, privacy).encode("utf-8", "replace")
    try:
        with atomic_write(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}; name another file with -o") from None
    return len(content)
