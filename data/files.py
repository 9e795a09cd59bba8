"""Files of the sources: where they are, and the error for a file that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

HOME = "~/.cache/hpo/data"  # if HPO_DATA_DIR is not set

FILE = "file"
#: An option that names a file or a folder. A relative path starts at the folder of the study file.
File = Annotated[str, FILE]
OptionalFile = Annotated[str | None, FILE]


class BadFile(OSError):
    """Raised for a file that is missing, damaged or of the wrong kind. Names the file, the place in it, cause and mend.

    Each argument is one line of the message.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def data_dir() -> Path:
    """Return the folder of downloaded and prepared data: HPO_DATA_DIR, else `HOME`."""
    return Path(os.environ.get("HPO_DATA_DIR") or HOME).expanduser().absolute()


def existing_file(path: str, option: str) -> Path:
    """Return the path of a file that an option names; BadFile if it is missing or not a regular file."""
    found = _existing(path, option)
    if not found.is_file():
        raise BadFile(
            f"{option} = {path!r}: is {'a folder' if found.is_dir() else 'a FIFO, socket or device'}; name a file"
        )
    return found


def existing_folder(path: str, option: str) -> Path:
    """Return the path of a folder that an option names; BadFile if it is missing or not a folder."""
    found = _existing(path, option)
    if not found.is_dir():
        raise BadFile(f"{option} = {path!r}: is not a folder; name the folder of the images")
    return found


def _existing(path: str, option: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise BadFile(f"{option} = {path!r}: does not exist; a relative path starts at the folder of the study file")
    return found
