"""Makes studies and opens them, and refuses workers that do not fit.

A study stores its spec, the spec's fingerprint, and the digests of code and data. So a worker needs only the study's
name and the storage. A worker with another spec, other code or other data is refused. The error shows the difference.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import MismatchError, SpecError, StorageError, StudyError, closest
from hpo.files import cache_folder
from hpo.queue import limits, workers
from hpo.spec import bucket_url, pickled, study_file
from hpo.spec.objectives import Goals
from hpo.spec.study_file import StudySpec
from hpo.storage import sql, study_rows
from hpo.storage.connect import Storage
from hpo.storage.tables import SCHEMA, UID_KEY, Hold
from hpo.study.checkpoint_store import CheckpointStore, FolderStore
from hpo.text import command

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from hpo.queue.ledger import Ledger
    from hpo.queue.models import Post

log = logging.getLogger(__name__)
FINGERPRINT_KEY = "hpo:fingerprint"  # user attribute; shown by optuna-dashboard
TAKEN_FROM_KEY = "hpo:taken_from"  # user attribute: the study that a fork or an import took trials from
OWN_KEYS = (UID_KEY, FINGERPRINT_KEY, TAKEN_FROM_KEY)  # user attributes that no objective has set
METRIC_NAMES_KEY = "study:metric_names"  # Optuna's system attribute with the names of the objectives
MOST_NAMES = 20  # of studies in a message
LOGS_FOLDER = "logs"  # in this machine's folder of the study
CODE_FOLDER = (
    "code"  # in the machine's folder of the study; holds a folder for each pickled function, named by its digest
)
REQUEST_SHARE = 0.5  # of `recovery.grace` that one request to a bucket may take, so that a worker can still park


@dataclass(frozen=True, kw_only=True)
class TakenTrials:
    """Finished trials of another study, as a new one begins with them. Its budget is not charged for them."""

    trials: Sequence[FrozenTrial]
    origin: Mapping[str, str]  # the other study: its name, its storage without secrets, and what made it


@dataclass(frozen=True, kw_only=True)
class Study:
    """An open study: its ids, its spec and its folders. Optuna's study object is made at its first use."""

    storage: Storage
    study_id: int
    uid: str
    spec: StudySpec
    budget: int  # rows that may be spent, those that a fork copied included
    stop_reason: str | None
    store: CheckpointStore
    code_folder: Path

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def goals(self) -> Goals:
        return self.spec.goals

    @cached_property
    def optuna(self) -> optuna.Study:
        """Optuna's object, with the study's sampler and pruner."""
        import optuna

        from hpo.strategy import pruners, samplers

        sampler, pruner = samplers.build(self.spec, 0), pruners.build(self.spec)
        return optuna.load_study(study_name=self.name, storage=self.storage.optuna, sampler=sampler, pruner=pruner)

    @property
    def checkpoints(self) -> Path:
        """This machine's folder of the study: its logs, its code, and its checkpoints or those of a bucket used here."""
        return self.store.folder

    @property
    def logs(self) -> Path:
        """Where the workers that `hpo run` starts write what they and user code print."""
        return self.checkpoints / LOGS_FOLDER

    @property
    def sees_checkpoints(self) -> bool:
        """Whether this machine sees the study's checkpoints, and not an empty folder or another bucket in their place."""
        return self.store.is_of(self.uid)

    def trial_folder(self, number: int) -> Path:
        """Return this machine's folder of a trial's checkpoints. It need not exist."""
        return self.checkpoints / trial_name(number)

    def ledger(self, worker: str, *, lease_seconds: float | None = None, post: Post | None = None) -> Ledger:
        """Return the ledger through which one worker writes to this study.

        Args:
            worker: its name.
            lease_seconds: the length of its leases, by default `recovery.lease`.
            post: its place in a launch, if an engine has started it.
        """
        from hpo.queue.ledger import Ledger
        from hpo.strategy import samplers

        return Ledger(
            engine=self.storage.engine,
            study_id=self.study_id,
            uid=self.uid,
            worker=worker,
            lease_seconds=self.spec.recovery.lease_seconds if lease_seconds is None else lease_seconds,
            grid_points=samplers.grid_size(self.spec),
            policies=self.spec.failures,
            post=post,
        )


def trial_name(number: int) -> str:
    """Return the name of a trial's folder in the study's store."""
    return f"trial-{number:06d}"


def create_or_join(
    place: Storage,
    wanted: StudySpec,
    *,
    code_folder: Path,
    code_digest: str,
    trials_budget: int | None = None,
    allow_code_change: bool = False,
    taken: TakenTrials | None = None,
    forking: str | None = None,
) -> Study:
    """Make the study, or join the stored one of this name if its fingerprint is the same.

    A new study is written in one transaction, with the trials that it takes and those that it queues.

    Args:
        place: the storage.
        wanted: the resolved spec.
        code_folder: the folder that the user's code is loaded from. A pickled function is copied from it into the study's own.
        code_digest: the digest of that code.
        trials_budget: the study's budget; by default the larger one of the stored study and the spec.
        allow_code_change: record a changed code digest instead of refusing it.
        taken: finished trials of another study, which a new study begins with. No study is joined then.
        forking: the stop reason of a new study that starts nothing until its maker allows it.

    Raises MismatchError if the stored study has another spec or other code, or if Optuna made it and has begun trials in it.
    Raises it too if workers of another schema work on it, or if trials are to go on from a checkpoint folder that is missing.
    Raises StudyError if checkpoints cannot be written, or if a study that takes trials is there already. Raises SpecError for
    checkpoints in a place where the study cannot have them.
    """
    import optuna

    from hpo.storage.optuna_private import id_of
    from hpo.strategy import samplers

    uid = uuid.uuid4().hex  # of a new study
    store = store_of(place, f"{checkpoint_root(place, wanted)}/{uid}", wanted)
    store.check_writable()
    directions = list(wanted.goals.directions.values())
    made = optuna.create_study(storage=place.optuna, study_name=wanted.name, directions=directions, load_if_exists=True)
    study_id = id_of(made)
    with sql.writing(place.engine) as connection:
        row = study_rows.lock_and_read(connection, study_id)
        if taken is not None and (row is not None or study_rows.count_trials(connection, study_id)):
            raise StudyError(f"there is a study {wanted.name!r} already; choose another name")
        if row is None:
            wanted = samplers.recorded(wanted, trials_budget or wanted.budget.trials)
            _refuse_a_plain_optuna_study(connection, study_id, [one.name.lower() for one in made.directions], wanted)
            _insert(connection, study_id, wanted, uid, store, code_folder, code_digest, taken, forking)
            row = study_rows.lock_and_read(connection, study_id)
        _check_identity(row, wanted)
        _check_schema(connection, row, wanted.name)
        budget = trials_budget or max(row.trials, wanted.budget.trials)
        managed = _stored_spec(row, wanted.name).managed_by(wanted)
        study_rows.update(connection, row.uid, trials=budget, spec=_to_store(managed))
        limits.reopen(connection, row)
        limits.enforce(connection, study_rows.lock_and_read(connection, study_id))
        _check_code(connection, row, code_digest, allow_code_change, code_folder, place)
    study = join(place, wanted.name)
    _mark_checkpoints(study)
    if wanted.checkpoints and Path(study.store.place).parent != Path(store.place).parent:
        log.warning(
            "study %r has its checkpoints in %s, not in the file's %r",
            study.name,
            study.store.place,
            wanted.checkpoints,
        )
    if wanted.is_pickled:  # the one that is given, also if the study has taken another one since
        study = replace(study, code_folder=_home_of_pickled(study.checkpoints, code_digest))
        pickled.keep(code_folder, study.code_folder)
    return study


def join(place: Storage, name: str) -> Study:
    """Open a study that hpo made. Raises StudyError if there is none, or if a later hpo has worked on it."""
    study_id, row = study_rows.look_up(place.engine, name)
    if study_id is not None and row is None:
        raise StudyError(
            f"study {name!r} in {place.shown} was made by Optuna, not by hpo; hpo only reads it, with `hpo status`, "
            "`hpo export`, `hpo fork` and `hpo doctor`"
        )
    if row is None and not (known := all_names(place)):
        raise StudyError(f"there is no study of hpo in {place.shown}; `hpo run FILE` makes one")
    if row is None:
        meant = closest(name, known) or ""
        why = f"there is no study {name!r} in {place.shown}{meant and f' (did you mean {meant!r}?)'}"
        further = f", and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
        raise StudyError(why, *([f"  studies: {', '.join(known[:MOST_NAMES])}{further}"] if known != [meant] else []))
    if (row.schema or 1) > SCHEMA:
        raise StudyError(
            f"study {name!r} was worked on by a later hpo: its schema is {row.schema}, here {SCHEMA}; update hpo here"
        )
    assert study_id is not None
    spec = _stored_spec(row, name)
    return Study(
        storage=place,
        study_id=study_id,
        uid=row.uid,
        spec=spec,
        budget=row.trials + row.imported,
        stop_reason=row.stop_reason,
        store=store_of(place, row.checkpoints, spec),
        code_folder=Path(row.code_folder),
    )


def is_plain(place: Storage, name: str) -> bool:
    """Return whether the storage has a study of this name that hpo did not make."""
    study_id, row = study_rows.look_up(place.engine, name)
    return study_id is not None and row is None


def is_in_use(place: Storage, name: str) -> bool:
    """Return whether the storage has a study of this name that hpo made, or that has trials.

    A study of Optuna's without trials is what is left of a process that was killed as it made one.
    """
    study_id, row = study_rows.look_up(place.engine, name)
    if study_id is None or row is not None:
        return row is not None
    with place.engine.connect() as connection:
        return study_rows.count_trials(connection, study_id) > 0


def _stored_spec(row: Any, name: str) -> StudySpec:
    try:
        return StudySpec.from_document(study_file.as_meant(json.loads(row.spec)))
    except (SpecError, ValueError, TypeError) as error:
        said = "; ".join(error.lines) if isinstance(error, SpecError) else error
        raise StudyError(f"study {name!r}: its spec in the database cannot be read: {said}") from None


def names(place: Storage) -> list[str]:
    """Return the names of the studies that `hpo` made in a storage."""
    return study_rows.our_names(place.engine)


def all_names(place: Storage) -> list[str]:
    """Return the names of all studies in a storage, those that Optuna made included."""
    return study_rows.all_names(place.engine)


def check_worker(study: Study, *, mine: StudySpec | None, code_digest: str, allow_code_change: bool) -> None:
    """Refuse a worker that does not fit the study.

    Args:
        study: the study.
        mine: the spec of the worker's own study file, if it has one.
        code_digest: the digest of the worker's code.
        allow_code_change: record a changed code digest instead of refusing it.

    Raises MismatchError if spec, code or schema differ, or if the worker does not see the study's checkpoints.
    Raises StudyError if the study was deleted, or if checkpoints cannot be written. Raises StorageError if a bucket does not
    answer: a worker that restarts waits for it.
    """
    with sql.writing(study.storage.engine) as connection:
        row = study_rows.lock_and_read(connection, study.study_id)
        if row is None:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        if mine is not None:
            _check_identity(row, mine)
        _check_schema(connection, row, study.name)
        _check_code(connection, row, code_digest, allow_code_change, study.code_folder, study.storage)
    if not study.store.is_folder:
        study.store.check_writable()
    if not study.sees_checkpoints:
        what, mend = study.store.why_unseen(study.uid)
        said = f"checkpoints {study.store.place}: {what}; {mend}"
        raise StorageError(said) if study.store.is_away else MismatchError(said)


def check_data(study: Study, digest: str) -> None:
    """Store the data digest of the first worker. Raises MismatchError for a later worker with other data."""
    with sql.writing(study.storage.engine) as connection:
        row = study_rows.lock_and_read(connection, study.study_id)
        if row is None:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        if row.data_digest is None:
            study_rows.update(connection, study.uid, data_digest=digest)
        elif row.data_digest != digest:
            raise MismatchError(
                f"data: the study was made on {row.data_digest[:12]}, here the data is {digest[:12]}; "
                "restore the files, or start a new study with --name"
            )


def _refuse_a_plain_optuna_study(
    connection: sql.Connection, study_id: int, directions: list[str], wanted: StudySpec
) -> None:
    if directions != list(wanted.goals.directions.values()):
        raise MismatchError(
            f"study {wanted.name!r} is there already, was not made by hpo and has other directions: {', '.join(directions)}; "
            "choose another name with --name"
        )
    if held := study_rows.count_trials(connection, study_id, begun=True):
        raise MismatchError(
            f"study {wanted.name!r} is there already with {held} trials and was not made by hpo; choose another name with --name"
        )


def _insert(
    connection: sql.Connection,
    study_id: int,
    wanted: StudySpec,
    uid: str,
    store: CheckpointStore,
    code_folder: Path,
    code_digest: str,
    taken: TakenTrials | None,
    forking: str | None,
) -> None:
    from hpo.storage import trial_writes

    folder = _home_of_pickled(store.folder, code_digest) if wanted.is_pickled else code_folder.absolute()
    row = {
        "uid": uid,
        "schema": SCHEMA,
        "spec": _to_store(wanted),
        "fingerprint": wanted.fingerprint,
        "trials": wanted.budget.trials,
        "code_folder": str(folder),
        "code_digest": _recorded(code_digest),
        "checkpoints": store.place,
        "imported": len(taken.trials) if taken else 0,
        "stop_reason": forking,
        "hold": Hold.FORKING if forking else None,
    }
    attributes: dict[str, Any] = {UID_KEY: uid, FINGERPRINT_KEY: wanted.fingerprint}
    study_rows.insert(
        connection,
        study_id,
        row,
        user_attributes=attributes | ({TAKEN_FROM_KEY: taken.origin} if taken else {}),
        system_attributes={METRIC_NAMES_KEY: wanted.goals.names} if wanted.objectives else {},
    )
    trial_writes.insert_templates(connection, study_id, taken.trials if taken else [])
    trial_writes.insert_queued(connection, study_id, [wanted.as_stored(one) for one in wanted.start])


def checkpoint_root(place: Storage, wanted: StudySpec) -> str:
    """Return the folder or the URL under which a new study has its checkpoints. Raises SpecError for a wrong URL."""
    given = wanted.checkpoints or os.environ.get("HPO_CHECKPOINTS")
    if given and bucket_url.is_url(given):
        bucket_url.check(given, "checkpoints" if wanted.checkpoints else "HPO_CHECKPOINTS")
        if wanted.command:
            raise SpecError(
                f"checkpoints = {given!r}: the program of `command` saves in a folder, which other machines would not see; "
                "name a folder that all workers see"
            )
        return given.rstrip("/")
    beside = Path(place.url.database or "").parent if place.is_sqlite else Path.cwd()
    return str(Path(given or beside / ".hpo").absolute())


def store_of(place: Storage, recorded: str, spec: StudySpec) -> CheckpointStore:
    """Return the store of a study's checkpoints from the place that the database has. Nothing is read or written yet."""
    if not bucket_url.is_url(recorded):
        return FolderStore(Path(recorded))
    from hpo.study.bucket_store import BucketStore

    folder = _machine_root(place) / recorded.rpartition("/")[2]
    return BucketStore(recorded, folder, patience=REQUEST_SHARE * spec.recovery.grace_seconds)


def _machine_root(place: Storage) -> Path:
    """Return the folder in which studies with checkpoints in a bucket have their folders of this machine.

    It is HPO_CHECKPOINTS if that is a folder, else `.hpo` beside an SQLite file, else one in the user's cache folder: with
    Postgres it must not depend on where a command is called.
    """
    given = os.environ.get("HPO_CHECKPOINTS")
    if given and not bucket_url.is_url(given):
        return Path(given).absolute()
    if place.is_sqlite:
        return (Path(place.url.database or "").parent / ".hpo").absolute()
    return cache_folder().absolute() / "studies"


def _mark_checkpoints(study: Study) -> None:
    """Mark the store as the study's own. Raises MismatchError if it is missing and trials go on from it."""
    if waiting := study_rows.count_open_checkpoints(study.storage.engine, study.uid):
        why = study.store.why_missing(waiting, study.uid)
        if why is not None:
            raise MismatchError(why)
    study.store.mark(study.uid)


def _check_identity(row: Any, wanted: StudySpec) -> None:
    if row.fingerprint == wanted.fingerprint:
        return
    stored = _stored_spec(row, wanted.name)
    lines = study_file.differences(stored, wanted) or ["the meaning of the file changed with the version of hpo"]
    queues = [
        f"(The configurations of start are queued once, when the study is made; `{command('enqueue', wanted.name)}` queues more.)"
    ]
    raise MismatchError(
        f"study {wanted.name!r} was made with other settings:",
        *(f"  {line}" for line in lines),
        "undo the change, start a new study with --name NEW, "
        f"or take its trials along with `{command('fork', wanted.name)} NEW FILE`",
        *(queues if stored.start != wanted.start else []),
        "(You changed nothing? Then a new version of hpo added an option.)",
    )


def _check_schema(connection: sql.Connection, row: Any, name: str) -> None:
    """Refuse to work beside workers of another schema, and set the study's schema to ours.

    From schema 2 on, the stored spec always has the key `format`. An hpo of schema 1 does not know that key and cannot
    join.
    """
    spec = _stored_spec(row, name)
    if others := workers.of_another_schema(connection, row.uid, spec.recovery.lease_seconds):
        raise MismatchError(
            f"study {name!r}: {', '.join(others)} of another version of hpo work on it, and the two read leases differently; "
            f"end them, or wait until they have been silent for {spec.recovery.lease} (recovery.lease)"
        )
    if row.schema != SCHEMA:
        study_rows.update(connection, row.uid, schema=SCHEMA, spec=_to_store(spec))


def _to_store(spec: StudySpec) -> str:
    return json.dumps({"format": spec.format, **spec.document})


def lets_in(row: Any, digest: str) -> bool:
    """Return whether a study, by its row of ours, accepts code with this digest of `usercode.digest`."""
    return not {row.code_digest, *json.loads(row.code_changes)}.isdisjoint(digest.split(" "))


def _recorded(digest: str) -> str:
    """Return what a study records of a digest of code: the part that comments do not change."""
    return digest.partition(" ")[0]


def _home_of_pickled(home: Path, digest: str) -> Path:
    """Return the folder of a pickled function of a study. Running workers read theirs while a changed one gets another."""
    return home / CODE_FOLDER / digest[:12]


def _check_code(
    connection: sql.Connection, row: Any, digest: str, allow_change: bool, folder: Path, place: Storage
) -> None:
    if lets_in(row, digest):
        return
    now, spec = _recorded(digest), _stored_spec(row, "")
    home = store_of(place, row.checkpoints, spec).folder
    moved = {"code_folder": str(_home_of_pickled(home, digest))} if spec.is_pickled else {}
    in_use = spec.is_pickled and workers.at_work(connection, row.uid, spec.recovery.lease_seconds)
    if not in_use and not study_rows.count_trials(connection, row.study_id, begun=True):  # nothing has run the old code
        study_rows.update(connection, row.uid, code_digest=now, **moved)
        return
    if not allow_change and spec.is_pickled:
        parts = pickled.changed(Path(row.code_folder), folder)
        raise MismatchError(
            f"the function changed since the study was made{f': {parts}' if parts else ''}; undo the change, start a new study "
            "with another name, or call hpo.search with allow_code_change=True, which is recorded"
        )
    if not allow_change:
        raise MismatchError(
            "your own code, or a file of weights, changed since the study was made "
            f"({row.code_digest[:12]} is now {now[:12]}); undo the change, "
            "start a new study with --name, or join with --allow-code-change, which is recorded"
        )
    study_rows.update(connection, row.uid, code_changes=json.dumps([*json.loads(row.code_changes), now]), **moved)
