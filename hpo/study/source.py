"""Studies that trials are taken from: one of ours, or one that Optuna made, in any storage that Optuna can read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import StorageError, StudyError, nearest
from hpo.spec.objectives import Goals
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import FAILURES, cause, connect
from hpo.storage.redaction import redacted_text
from hpo.study import plain
from hpo.study.plain import PlainStudy
from hpo.study.study import Study

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

OURS = ("sqlite:", "postgresql", "postgres:")  # beginnings of URLs that our own storage opens
MAY_BE = "sqlite:///FILE, postgresql://USER@HOST/DB, another URL of Optuna's, or the file of a JournalStorage"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A study that trials are taken from. It is only read."""

    study: optuna.Study
    goals: Goals
    spec: StudySpec | None  # None for a study that Optuna made
    shown: str  # its storage, without secrets

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def origin(self) -> Mapping[str, str]:
        """What a study remembers of it."""
        return {"study": self.name, "storage": self.shown, "made_by": "hpo" if self.spec else "Optuna"}


def of(study: Study | PlainStudy) -> Source:
    """Return an open study as a source."""
    spec = None if isinstance(study, PlainStudy) else study.spec
    return Source(study=study.optuna, goals=study.goals, spec=spec, shown=study.storage.shown)


@contextmanager
def opened(url: str, name: str) -> Iterator[Source]:
    """Open a study in any storage of Optuna's. Raises StorageError or StudyError if there is none."""
    if url.startswith(OURS):
        ours = connect(url, only_reads=True)
        try:
            yield of(plain.open_any(ours, name))
        finally:
            ours.close()
        return
    import optuna

    shown = redacted_text(url)
    with _storage(url) as place:
        try:
            study = optuna.load_study(study_name=name, storage=place)
        except KeyError:
            known = optuna.get_all_study_names(place)
            raise StudyError(f"there is no study {name!r} in {shown}{nearest(name, known)}") from None
        yield Source(study=study, goals=plain.goals_of(study), spec=None, shown=shown)


@contextmanager
def _storage(url: str) -> Iterator[BaseStorage]:
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" not in url:
        _check_journal(Path(url))
        yield JournalStorage(JournalFileBackend(url))
        return
    try:
        theirs = RDBStorage(url, skip_table_creation=True)
    except (
        ImportError,
        ValueError,
        RuntimeError,
        *FAILURES,
        optuna.exceptions.OptunaError,
    ) as error:
        raise StorageError(f"storage {redacted_text(url)}: cannot be opened: {cause(error)}") from None
    try:
        yield theirs
    finally:
        theirs.remove_session()
        theirs.engine.dispose()


def _check_journal(path: Path) -> None:
    """Raise StorageError if a file is not one of Optuna's JournalStorage. Opening another one would not fail."""
    try:
        with path.open(encoding="utf-8") as file:
            first: Any = json.loads(file.readline())
    except OSError as error:
        raise StorageError(f"storage {path}: cannot be read: {error.strerror}; give {MAY_BE}") from None
    except ValueError:
        first = None
    if not isinstance(first, dict) or "op_code" not in first:
        raise StorageError(f"storage {path}: is no file of Optuna's JournalStorage; give {MAY_BE}")
