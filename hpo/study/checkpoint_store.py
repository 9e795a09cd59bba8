"""Where the checkpoints of a study lie. A store is a folder that all workers see, or a bucket (`bucket_store`).

A worker writes each file into its machine's folder of the study. `put` then lets every worker read it: in a folder that is
so already, a bucket gets one request. The database records the place of a checkpoint, `place_of` its name.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from hpo.errors import StudyError
from hpo.files import atomic_write
from hpo.text import quoted

PROBE_FILE = "study.uid"  # a machine that cannot read it does not share the study's checkpoints


class CheckpointStore(Protocol):
    """A study's checkpoints. A name is relative to the study, such as `trial-000003/attempt-1-epoch-7-17.pt`.

    Each method raises OSError if the disk or the bucket fails.
    """

    is_folder: bool  # no bucket

    @property
    def folder(self) -> Path:
        """This machine's folder of the study: logs, code, and the files themselves or those that were used here."""

    @property
    def place(self) -> str:
        """The path or the URL, as the database has it. It holds no secret."""

    @property
    def is_away(self) -> bool:
        """Whether the store failed a moment ago. Then a trial that needs its checkpoint waits."""

    @property
    def failing_seconds(self) -> float:
        """How long every request has failed; 0.0 if the last one was answered."""

    def place_of(self, name: str) -> str:
        """Return the place of a file, as the database records it."""

    def name_of(self, place: str) -> str:
        """Return the name of the file at a recorded place."""

    def put(self, name: str, file: Path | None = None) -> None:
        """Let every worker read a file, whole or not at all. By default it is the one of this name in `folder`."""

    def get(self, name: str, digest: str | None = None) -> Path:
        """Return a file of this machine with the content. Raises FileNotFoundError if there is none.

        Args:
            name: the name.
            digest: the expected SHA-256. It is not checked, but a file that this machine has kept must have it.
        """

    def exists(self, name: str) -> bool:
        """Return whether a file can be read. If the store fails, it is False with a warning."""

    def names(self, folder: str, *, anew: bool = False) -> set[str]:
        """Return the names of what lies in a trial's folder, here and for every worker.

        Args:
            folder: the folder's name.
            anew: what other workers have put there since this process has looked is found too.
        """

    def trials(self) -> set[str]:
        """Return the names of what lies beside the folders of trials, these included."""

    def sizes(self) -> dict[str, int]:
        """Return the names of all files that every worker sees, with their sizes in bytes."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. One that is missing is no error."""

    def delete_trial(self, folder: str) -> None:
        """Delete a trial's folder as far as possible. It raises nothing."""

    def delete_all(self) -> None:
        """Delete all of the study."""

    # --- is it the study's own? --------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise StudyError, with the mend, if files cannot be written and deleted; StorageError if a later try may succeed."""

    def mark(self, uid: str) -> None:
        """Write the probe file."""

    def is_of(self, uid: str) -> bool:
        """Return whether this machine reads the study's own probe file. It is False if the store fails."""

    def why_unseen(self, uid: str) -> tuple[str, str]:
        """Return why `is_of` is False, and the mend."""

    def why_missing(self, waiting: int, uid: str) -> str | None:
        """Return what is missing and what mends it if so many trials are to go on from here; None if nothing is.

        Raises StudyError or StorageError if a bucket fails.
        """


class FolderStore:
    """A folder, which all workers see under one path."""

    is_folder = True
    is_away = False
    failing_seconds = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    def place_of(self, name: str) -> str:
        return str(self.folder / name)

    def name_of(self, place: str) -> str:
        path = Path(place)
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else place

    def put(self, name: str, file: Path | None = None) -> None:
        target = self.folder / name
        if file is None or file == target:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as part:
            shutil.copyfile(file, part)

    def get(self, name: str, digest: str | None = None) -> Path:  # noqa: ARG002 - there is one file
        file = self.folder / name
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return file

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def names(self, folder: str, *, anew: bool = False) -> set[str]:  # noqa: ARG002
        return names_in(self.folder, folder)

    def trials(self) -> set[str]:
        return {file.name for file in self.folder.iterdir()}

    def sizes(self) -> dict[str, int]:
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def delete_trial(self, folder: str) -> None:
        shutil.rmtree(self.folder / folder, ignore_errors=True)

    def delete_all(self) -> None:
        shutil.rmtree(self.folder)

    def check_writable(self) -> None:
        root = self.folder.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise StudyError(
                f"checkpoints {root}: cannot be written: {error.strerror}; "
                "name another folder by `checkpoints = PATH` in the study file or HPO_CHECKPOINTS"
            ) from None

    def mark(self, uid: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / PROBE_FILE) as part:  # a worker may read it at any time
            part.write_text(uid)

    def is_of(self, uid: str) -> bool:
        try:
            return (self.folder / PROBE_FILE).read_text() == uid
        except OSError:
            return False

    def why_unseen(self, uid: str) -> tuple[str, str]:  # noqa: ARG002
        return (
            "this machine does not see the study's own folder there",
            "mount it, or make the study with `checkpoints = PATH` on a path that every worker can read",
        )

    def why_missing(self, waiting: int, uid: str) -> str | None:  # noqa: ARG002
        if self.folder.exists():
            return None
        return (
            f"checkpoints {self.folder}: the folder is missing, and {waiting} trials are to go on from it; mount its disk. "
            f"If it is lost, let them start again: `mkdir -p {quoted(self.folder)}`"
        )


def names_in(root: Path, folder: str) -> set[str]:
    """Return the names of what lies in a folder of this machine. Empty if it is missing."""
    try:
        return {f"{folder}/{file.name}" for file in (root / folder).iterdir()}
    except FileNotFoundError:
        return set()


def digest_of(file: Path) -> str | None:
    """Return the SHA-256 of a file as hex, None if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
