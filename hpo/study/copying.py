"""Copies a study into another storage: its rows, whole or not at all, and its checkpoints.

A copy is the same study at another place. It keeps the uid, so exports, confirmations and MLflow's runs know it. It has a
folder of its own, since two studies that share one delete each other's checkpoints. Afterwards the old one is held.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from hpo.study.checkpoint_store import CheckpointStore, digest_of
from hpo.study.query import worker_rows
from hpo.study.study import CODE_FOLDER, LOGS_FOLDER, Study
from hpo.text import command

if TYPE_CHECKING:
    from hpo.storage.transfer import TableCopy

OF_TRIAL = re.compile(r"trial-\d+/")
NOTE = re.compile(r"-handover\.json$")  # of `worker.pending_reports`; it names the file of a checkpoint
WITHOUT = "--no-checkpoints"


@dataclass(frozen=True, kw_only=True)
class Files:
    """The copied files of a study."""

    store: CheckpointStore
    checkpoints: int
    size: int  # bytes of the checkpoints and of what lies beside them


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
    source: Storage, target: Storage, name: str, *, to: str | None = None, checkpoints: bool = True, hold: bool = True
) -> Copied:
    """Copy a study, whole or not at all.

    Args:
        source: the storage of the study.
        target: the other storage, with all tables.
        name: the study's name.
        to: the folder or the URL under which studies have their checkpoints; by default the one of a new study there.
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
                changes = transfer.as_parked(_places(study, files.store), checkpoints=checkpoints)
            try:
                with sql.writing(target.engine) as write:
                    sql.may_be_idle(write)
                    if row is not None:
                        study_rows.delete_dead(write, row.uid)
                    tables = transfer.copy_rows(read, write, study_id, row and row.uid, changes)
                    if study is not None and hold:
                        _refuse_if_worked_on(read, study)
            except (*FAILURES, transfer.RowsDiffer) as error:
                why = str(error) if isinstance(error, transfer.RowsDiffer) else cause(error)
                what = "look whether it arrived in" if _may_have_arrived(target, name) else "nothing was copied to"
                raise StorageError(f"study {name!r}: {what} {target.shown}: {why}") from None
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


def _refuse_if_worked_on(before: sql.Connection, study: Study) -> None:
    """Raise StudyError if a worker was at work on the old study since it was read. Its trials would be lost by the hold."""
    with study.storage.engine.connect() as now:
        _unworked(now, study)
        if worker_rows.last_seen(now, study) != worker_rows.last_seen(before, study):
            raise StudyError(
                f"study {study.name!r}: a worker was at work on it during the copy; nothing was copied; try again"
            )


# --- checkpoints ------------------------------------------------------------------------------------------------------


@contextmanager
def _files(study: Study | None, target: Storage, to: str | None, *, checkpoints: bool) -> Iterator[Files | None]:
    """Make the store of a copy, with what is in the old one. All in it is removed if the block fails and no study arrived."""
    if study is None:
        yield None
        return
    if checkpoints and not study.sees_checkpoints:
        raise StudyError(
            f"study {study.name!r}: its checkpoints in {study.store.place} are not seen from here; "
            f"copy on a machine that sees them, or leave them out with {WITHOUT}: unfinished trials then start again"
        )
    store = _new_store(study, target, to)
    try:
        yield _filled(study, store, checkpoints=checkpoints)
    except BaseException as error:
        if not _may_have_arrived(target, study.name):
            with suppress(OSError):
                store.delete_all()
        if not isinstance(error, OSError):
            raise
        why = f"study {study.name!r}: its checkpoints cannot be copied to {store.place}: {error.strerror or error}"
        raise StudyError(why) from None


def _may_have_arrived(target: Storage, name: str) -> bool:
    """Return whether the target may have the study: a commit can succeed although its answer is lost or awaited no more."""
    try:
        return name in studies.all_names(target)
    except FAILURES:
        return True


def _new_store(study: Study, target: Storage, to: str | None) -> CheckpointStore:
    """Return an empty store for a copy. The place that is named by the uid alone may be the old study's."""
    spec = study.spec.model_copy(update={"checkpoints": to}) if to else study.spec
    root = studies.checkpoint_root(target, spec)
    studies.store_of(target, f"{root}/{study.uid}", spec).check_writable()
    for name in (study.uid, *(f"{study.uid}-{secrets.token_hex(3)}" for _ in range(8))):
        store = studies.store_of(target, f"{root}/{name}", spec)
        if store.folder.exists() or (not store.is_folder and store.sizes()):
            continue
        store.folder.mkdir(parents=True)
        return store
    raise StudyError(f"checkpoints {root}: no place for the copy could be made; name another one by --checkpoints")


def _filled(study: Study, store: CheckpointStore, *, checkpoints: bool) -> Files:
    """Copy a study's files into an empty store. Logs and code lie on this machine, also where checkpoints lie in a bucket."""
    old = study.store
    recorded = {old.name_of(row.checkpoint_path): row for row in _recorded(study)} if checkpoints else {}
    sizes = {name: size for name, size in old.sizes().items() if OF_TRIAL.match(name)} if checkpoints else {}
    for name in sizes:
        if NOTE.search(name):
            _put_note(name, old, store)
        else:
            store.put(name, old.get(name))
        if name in recorded:
            _compare(study, recorded[name], old, store)
    for part in (CODE_FOLDER, LOGS_FOLDER):
        if (old.folder / part).is_dir():
            shutil.copytree(old.folder / part, store.folder / part, symlinks=True)
    store.mark(study.uid)
    counted = sum(name.endswith(".pt") for name in sizes)
    return Files(store=store, checkpoints=counted, size=sum(sizes.values()))


def _recorded(study: Study) -> Sequence[Any]:
    with study.storage.engine.connect() as connection:
        return study_rows.open_checkpoints(connection, study.uid)


def _places(study: Study, store: CheckpointStore) -> transfer.Places:
    old = study.store

    def code(folder: str) -> str:
        path = Path(folder)
        return str(store.folder / path.relative_to(old.folder)) if path.is_relative_to(old.folder) else folder

    return transfer.Places(store=store.place, code=code, checkpoint=lambda place: _moved(place, old, store))


def _moved(place: str, old: CheckpointStore, new: CheckpointStore) -> str:
    """Return the place of a copied checkpoint. One that is not the study's stays where it is."""
    name = old.name_of(place)
    return place if name == place else new.place_of(name)


def _put_note(name: str, old: CheckpointStore, new: CheckpointStore) -> None:
    """Copy a note of pending reports, which then names the copied checkpoint. One that cannot be read stays as it is."""
    text = old.get(name).read_text(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        document = json.loads(text)
        document["checkpoint"]["path"] = _moved(document["checkpoint"]["path"], old, new)
        text = json.dumps(document)
    note = new.folder / name
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(note) as part:
        part.write_text(text)
    new.put(name)


def _compare(study: Study, row: Any, old: CheckpointStore, new: CheckpointStore) -> None:
    """Raise StudyError if the copied checkpoint of an open trial is not the one that is recorded."""
    name = old.name_of(row.checkpoint_path)
    if digest_of(new.get(name)) == row.checkpoint_digest:
        return
    if digest_of(old.get(name)) == row.checkpoint_digest:
        raise StudyError(f"trial {row.number} of study {study.name!r}: its checkpoint did not arrive whole; try again")
    raise StudyError(
        f"trial {row.number} of study {study.name!r}: its checkpoint {row.checkpoint_path} is damaged; nothing was copied; "
        f"leave checkpoints out with {WITHOUT}, or remove that file: the trial then starts again"
    )
