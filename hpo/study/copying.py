"""Copies a study into another storage: its rows, whole or not at all, and its checkpoints.

A copy is the same study at another place. It keeps the uid, so exports, confirmations and MLflow's runs know it. It has a
folder of its own, since two studies that share one delete each other's checkpoints. Afterwards the old one is held.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import StorageError, StudyError
from hpo.files import atomic_write
from hpo.storage import sql, study_rows, transfer
from hpo.storage.connect import FAILURES, Storage, cause
from hpo.storage.tables import Hold
from hpo.study import control, deletion
from hpo.study import study as studies
from hpo.study.study import CODE_FOLDER, PROBE_FILE, Study
from hpo.text import command

if TYPE_CHECKING:
    from hpo.storage.transfer import TableCopy

NOTES = "trial-*/attempt-*-handover.json"  # of `worker.pending_reports`; each names the file of a checkpoint
WITHOUT = "--no-checkpoints"
ANOTHER = "name another folder by --checkpoints"


@dataclass(frozen=True, kw_only=True)
class Files:
    """The copied folder of a study."""

    folder: Path
    checkpoints: int
    size: int  # bytes of all its files


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A study that was copied."""

    name: str
    tables: Sequence[TableCopy]
    files: Files | None  # None for a study that Optuna made
    open: int  # trials of ours that go on in the copy
    foreign: int  # RUNNING trials of other programs; nobody goes on with them
    is_held: bool  # whether nobody can work on the old one now

    def rows_of(self, table: str) -> int:
        """Return how many rows of a table were copied."""
        return sum(one.rows for one in self.tables if one.name == table)


def refuse_unfit(source: Storage, names: Sequence[str]) -> None:
    """Raise StudyError if there is nothing to copy, or if one of these studies does not exist or cannot be read."""
    if not names:
        raise StudyError(f"there is no study in {source.shown} to copy")
    for name in names:
        if not studies.is_plain(source, name):
            studies.join(source, name)


def refuse_clash(source: Storage, target: Storage, names: Sequence[str]) -> None:
    """Raise StorageError if the two storages are one, StudyError if the target has a study of one of these names."""
    if source.url == target.url or _are_one_file(source, target):
        raise StorageError(f"storage {target.shown}: is where the studies are already; name another target")
    there = set(studies.all_names(target))
    if clash := [name for name in names if name in there]:
        rest = [name for name in names if name not in there]
        mend = f"delete it there with `{command('delete', clash[0], options='--storage TO')}`, or name the others"
        raise StudyError(
            f"study {clash[0]!r} is in {target.shown} already, and nothing is overwritten; {mend}",
            *([f"  also there: {', '.join(clash[1:])}"] if clash[1:] else []),
            *([f"  not there yet: {', '.join(rest)}"] if rest else []),
        )


def _are_one_file(source: Storage, target: Storage) -> bool:
    paths = [Path(one.url.database or "") for one in (source, target)]
    return source.is_sqlite and target.is_sqlite and paths[0].exists() and paths[0].samefile(paths[1])


def copy_study(
    source: Storage, target: Storage, name: str, *, to: Path | None = None, checkpoints: bool = True, hold: bool = True
) -> Copied:
    """Copy a study, whole or not at all.

    Args:
        source: the storage of the study.
        target: the other storage, with all tables.
        name: the study's name.
        to: the folder of the studies' checkpoint folders; by default the one of a new study there.
        checkpoints: copy checkpoints. Without them open trials start again.
        hold: let nobody work on the old study afterwards.

    Raises StudyError if there is no such study, if it is being worked on or made, if the target has one of this name, or if
    its checkpoints are not seen from here. Raises StorageError if the rows that arrive are not those that were read.
    """
    refuse_clash(source, target, [name])
    study = None if studies.is_plain(source, name) else studies.join(source, name)
    with sql.snapshot(source.engine) as read:
        if study is None:
            study_id, row = study_rows.id_of(read, name), None
        else:
            study_id, row = study.study_id, _unworked(read, study)
        if study_id is None:
            raise StudyError(f"study {name!r} was deleted")
        with _files(study, target, to, checkpoints=checkpoints) as files:
            changes = transfer.Changes()
            if study is not None and files is not None:
                changes = transfer.as_parked(_mover(study.checkpoints, files.folder), checkpoints=checkpoints)
            try:
                with sql.writing(target.engine) as write:
                    sql.may_be_idle(write)
                    if row is not None:
                        study_rows.delete_dead(write, row.uid)
                    tables = transfer.copy_rows(read, write, study_id, row and row.uid, changes)
            except (*FAILURES, transfer.RowsDiffer) as error:
                why = str(error) if isinstance(error, transfer.RowsDiffer) else cause(error)
                raise StorageError(f"study {name!r}: nothing was copied to {target.shown}: {why}") from None
        ours, foreign = study_rows.count_running(read, study_id, row and row.uid)
    is_held = study is not None and hold
    if study is not None and hold:
        control.hold_as_copied(study, target.shown)
    return Copied(name=name, tables=tables, files=files, open=ours, foreign=foreign, is_held=is_held)


def _unworked(connection: sql.Connection, study: Study) -> Any:
    """Return the row of a study that nobody works on."""
    row = study_rows.living_row(connection, study.study_id)
    if row is None or row.uid != study.uid:
        raise StudyError(f"study {study.name!r} was deleted")
    if row.hold == Hold.FORKING:
        raise StudyError(f"study {study.name!r} is not whole yet: {row.stop_reason}")
    deletion.refuse_if_at_work(study, connection)
    return row


# --- checkpoints ------------------------------------------------------------------------------------------------------


@contextmanager
def _files(study: Study | None, target: Storage, to: Path | None, *, checkpoints: bool) -> Iterator[Files | None]:
    """Make the folder of a copy, with what is in the old one. It is removed if the block fails."""
    if study is None:
        yield None
        return
    if checkpoints and not study.sees_checkpoints:
        raise StudyError(
            f"study {study.name!r}: its checkpoints in {study.checkpoints} are not seen from here; "
            f"copy on a machine that sees them, or leave them out with {WITHOUT}: unfinished trials then start again"
        )
    root = to.absolute() if to else studies.checkpoint_root(target, study.spec)
    folder = _new_folder(root, study.uid)
    try:
        yield _filled(study, folder, checkpoints=checkpoints)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        why = error.strerror or error
        raise StudyError(f"study {study.name!r}: its checkpoints cannot be copied to {folder}: {why}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_folder(root: Path, uid: str) -> Path:
    """Make a folder for a copy. The one that is named by the uid alone may be the old study's."""
    for name in (uid, *(f"{uid}-{secrets.token_hex(3)}" for _ in range(8))):
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StudyError(f"checkpoints {root}: cannot be written: {error.strerror}; {ANOTHER}") from None
        return root / name
    raise StudyError(f"checkpoints {root}: no folder for the copy could be made; {ANOTHER}")


def _filled(study: Study, folder: Path, *, checkpoints: bool) -> Files:
    if checkpoints:
        shutil.copytree(study.checkpoints, folder, symlinks=True, dirs_exist_ok=True)
        for note in folder.glob(NOTES):
            _rename_in(note, study.checkpoints, folder)
        _compare(study, folder)
    elif (code := study.checkpoints / CODE_FOLDER).is_dir():
        shutil.copytree(code, folder / CODE_FOLDER, symlinks=True)
    with atomic_write(folder / PROBE_FILE) as part:
        part.write_text(study.uid)
    files = [file for file in folder.rglob("*") if file.is_file()]
    counted = sum(file.suffix == ".pt" for file in files)
    return Files(folder=folder, checkpoints=counted, size=sum(file.stat().st_size for file in files))


def _mover(old: Path, new: Path) -> Any:
    """Return what gives the new place of a file or folder. One outside the old folder stays where it is."""

    def moved(path: str) -> str:
        return str(new / Path(path).relative_to(old)) if Path(path).is_relative_to(old) else path

    return moved


def _rename_in(note: Path, old: Path, new: Path) -> None:
    """Let a note of pending reports name the copied checkpoint. One that cannot be read is left to its reader."""
    try:
        document = json.loads(note.read_text())
        document["checkpoint"]["path"] = _mover(old, new)(document["checkpoint"]["path"])
    except (ValueError, KeyError, TypeError):
        return
    with atomic_write(note) as part:
        part.write_text(json.dumps(document))


def _compare(study: Study, folder: Path) -> None:
    """Raise StudyError if a copied checkpoint of an open trial is not the one that is recorded."""
    moved = _mover(study.checkpoints, folder)
    with study.storage.engine.connect() as connection:
        recorded = study_rows.open_checkpoints(connection, study.uid)
    for row in recorded:
        path = Path(moved(row.checkpoint_path))
        if not path.exists():  # the trial would start again in the old study, too
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != row.checkpoint_digest:
                raise StudyError(
                    f"trial {row.number} of study {study.name!r}: its checkpoint {row.checkpoint_path} is damaged; "
                    f"nothing was copied; leave checkpoints out with {WITHOUT}, or remove that file: the trial then starts again"
                )
