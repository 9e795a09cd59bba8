"""Files that sources read: where they lie, and what is said about one that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

HOME = "~/.cache/hpo/data"  # where HPO_DATA_DIR says nothing else

FILE = "file"
#: An option that names a file or a folder; a relative one lies beside the study file.
File = Annotated[str, FILE]
OptionalFile = Annotated[str | None, FILE]


class BadFile(OSError):
    """Raised for a file that is missing, damaged, or not what it should be; names file, place in it, cause and mend.

    Each argument is a line of the message.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def data_dir() -> Path:
    """Return the folder of everything that is downloaded or prepared: HPO_DATA_DIR, by default outside any repository."""
    return Path(os.environ.get("HPO_DATA_DIR") or HOME).expanduser().absolute()


def existing_file(path: str, option: str) -> Path:
    """Return the path of a file that an option names; BadFile if it is not there, or is no file to be read to its end."""
    found = _existing(path, option)
    if not found.is_file():
        raise BadFile(
            f"{option} = {path!r}: is {'a folder' if found.is_dir() else 'a FIFO, socket or device'}; name a file"
        )
    return found


def existing_folder(path: str, option: str) -> Path:
    """Return the path of a folder that an option names; BadFile if it is not there."""
    found = _existing(path, option)
    if not found.is_dir():
        raise BadFile(f"{option} = {path!r}: is no folder; name the folder that the images lie in")
    return found


def _existing(path: str, option: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise BadFile(f"{option} = {path!r}: is not there; a relative path is looked up beside the study file")
    return found
