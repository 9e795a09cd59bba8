"""What a report that is handed on does not say: hosts, users, paths, and where a storage is."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from hpo.study.plain import PlainStudy
from hpo.study.study import Study

Shown = TypeVar("Shown")
HIDDEN = "…"
OF_A_HOME = re.compile(r"(?:/home|/Users)/[^/\s'\"<>:,;()\[\]&]+|/root\b")
A_PATH = re.compile(r"(?<![\w./])(?:~|…)?/(?:[^/\s'\"<>:,;()\[\]&]+/)+([^/\s'\"<>:,;()\[\]&]+)/?")
A_DRIVE = re.compile(r"\b[A-Za-z]:\\(?:[^\\\s'\"<>:,;]+\\)*([^\\\s'\"<>:,;]+)")
A_URL = re.compile(r"\w[\w+.-]*://[^\s'\"]+")
OF_A_MACHINE = {"host", "pid", "storage", "code_folder", "checkpoint", "worker"}  # keys of a receipt
COMMON = {"root", "user", "localhost", "home"}  # names that say nothing, and that many texts hold
SHORTEST = 3  # characters of a name that is looked for


class Privacy:
    """Cleans texts before they are shown."""

    def __init__(self, *, names: Iterable[str], folders: Iterable[str], is_off: bool = False) -> None:
        """Hide these names of machines and users, these folders, and all other absolute paths.

        Args:
            names: names, hidden where they stand as a word.
            folders: paths.
            is_off: hide nothing.
        """
        self.is_off = is_off
        known = {name for name in names if len(name) >= SHORTEST and name.lower() not in COMMON}
        self._folders = sorted({folder for folder in folders if folder.count("/") > 1}, key=len, reverse=True)
        words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        self._names = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if words else None

    @classmethod
    def of(cls, found: Iterable[Study | PlainStudy], hosts: Iterable[str], *, is_full: bool) -> Privacy:
        """Return what cleans a report on these studies."""
        names, folders = {platform.node(), *hosts}, {str(Path.cwd()), str(Path.home())}
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            names.add(getpass.getuser())
        for study in found:
            url = study.storage.url
            names |= {part for part in (url.host, url.username) if part}
            if isinstance(study, Study):
                folders |= {str(study.code_folder), str(study.checkpoints), study.store.place}
        return cls(names=names, folders=folders, is_off=is_full)

    def text(self, foreign: str) -> str:
        """Return a text without what is hidden. Of a path the last part is kept."""
        if self.is_off:
            return foreign
        shown = A_URL.sub(HIDDEN, foreign) if "://" in foreign else foreign
        for folder in self._folders:
            shown = shown.replace(folder, HIDDEN)
        if "/" in shown:
            shown = A_PATH.sub(rf"{HIDDEN}/\1", OF_A_HOME.sub(HIDDEN, shown))
        if "\\" in shown:
            shown = A_DRIVE.sub(rf"{HIDDEN}/\1", shown)
        return self._names.sub(HIDDEN, shown) if self._names else shown

    def clean(self, value: Shown) -> Shown:
        """Return a value with all its texts cleaned, inside dataclasses, dicts, lists and tuples too."""
        made: Any = value
        if self.is_off:
            return value
        if isinstance(value, str):
            made = self.text(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {one.name: self.clean(getattr(value, one.name)) for one in dataclasses.fields(value) if one.init}
            made = dataclasses.replace(value, **fields)
        elif isinstance(value, dict):
            made = {self.clean(key): self.clean(item) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            made = type(value)(map(self.clean, value))
        return cast(Shown, made)

    def receipt(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return a receipt without what it says of a machine."""
        return found if self.is_off else {key: value for key, value in found.items() if key not in OF_A_MACHINE}
