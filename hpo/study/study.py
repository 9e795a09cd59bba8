"""A study: made from a spec, joined by workers, and the settings under which Optuna's parts run in it.

The spec, its fingerprint and the digests of code and data are stored with the study, so a worker needs only a name and a
storage; whoever comes with another spec, other code or other data is refused with the difference shown.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa

from hpo.errors import MismatchError, SpecError, StudyError, nearest
from hpo.queue import workers
from hpo.queue.ledger import Ledger
from hpo.search import pruners, samplers
from hpo.spec import study_file
from hpo.spec.objectives import Goals
from hpo.spec.study_file import StudySpec
from hpo.storage import sql, trial_writes
from hpo.storage.connect import Storage
from hpo.storage.tables import (
    SCHEMA,
    UID_KEY,
    Hold,
    hpo_studies,
    living_row,
    studies,
    study_system_attributes,
    study_user_attributes,
    trials,
)
from hpo.text import command

FINGERPRINT_KEY = "hpo:fingerprint"  # user attribute; shown by optuna-dashboard
METRIC_NAMES_KEY = "study:metric_names"  # Optuna's system attribute for how its objectives are called
PROBE_FILE = "study.uid"  # in the checkpoint folder: who cannot read it there would lose checkpoints


@dataclass(frozen=True, kw_only=True)
class Study:
    """An open study: Optuna's object on it, our row's uid, its spec and its folders."""

    storage: Storage
    optuna: optuna.Study
    uid: str
    spec: StudySpec
    budget: int  # trials in all, with the rows that a fork brought along on top
    stop_reason: str | None
    checkpoints: Path
    code_folder: Path

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def goals(self) -> Goals:
        return self.spec.goals

    @property
    def study_id(self) -> int:
        return int(self.optuna._study_id)

    def trial_folder(self, number: int) -> Path:
        """Where the checkpoints of a trial lie while it may be gone on with."""
        return self.checkpoints / f"trial-{number:06d}"

    def ledger(self, worker: str, *, lease_seconds: float | None = None) -> Ledger:
        """Return the writes of one worker to this study."""
        return Ledger(
            engine=self.storage.engine,
            study_id=self.study_id,
            uid=self.uid,
            worker=worker,
            lease_seconds=self.spec.recovery.lease_seconds if lease_seconds is None else lease_seconds,
            grid_points=samplers.grid_size(self.spec),
            policies=self.spec.failures,
        )


def create_or_join(
    place: Storage,
    wanted: StudySpec,
    *,
    code_folder: Path,
    code_digest: str,
    trials_budget: int | None = None,
    allow_code_change: bool = False,
    forking: str | None = None,
) -> Study:
    """Make the study, or join the one that is there if its identity is the same.

    Args:
        trials_budget: sets the study's budget; without it the larger of the stored and the file's own stands.
        forking: makes a new study in which nothing is started before this reason is taken away.

    Raises MismatchError with each difference if the stored study is another one.
    """
    root = checkpoint_root(place, wanted)
    directions = list(wanted.goals.directions.values())
    made = optuna.create_study(storage=place.optuna, study_name=wanted.name, directions=directions, load_if_exists=True)
    with sql.writing(place.engine) as connection:
        row = _lock_and_read(connection, made._study_id)
        if row is None:
            _refuse_a_plain_optuna_study(connection, made, wanted)
            _insert(connection, made._study_id, wanted, root, code_folder, code_digest, forking)
            row = _lock_and_read(connection, made._study_id)
        _check_identity(row, wanted)
        _check_schema(connection, row, wanted.name)
        budget = trials_budget or max(row.trials, wanted.budget.trials)
        managed = _stored_spec(row, wanted.name).managed_by(wanted)
        connection.execute(
            hpo_studies.update().where(hpo_studies.c.uid == row.uid).values(trials=budget, spec=_to_store(managed))
        )
        _check_code(connection, row, code_digest, allow_code_change)
    study = join(place, wanted.name)
    _place_probe_file(study)
    return study


def join(place: Storage, name: str) -> Study:
    """Open a study that `hpo run` made; StudyError, with the names that are there, if there is none."""
    study_id, row = _look_up(place, name)
    if study_id is not None and row is None:
        raise StudyError(
            f"study {name!r} in {place.shown} was made by Optuna, not by hpo; `hpo status`, `hpo export`, `hpo fork` and "
            "`hpo doctor` read it, and nothing of hpo's changes it"
        )
    if row is None and not (known := all_names(place)):
        raise StudyError(f"there is no study of hpo in {place.shown}; `hpo run FILE` makes one")
    if row is None:
        raise StudyError(f"there is no study {name!r} in {place.shown}{nearest(name, known)}")
    if (row.schema or 1) > SCHEMA:
        raise StudyError(
            f"study {name!r} was worked on by a later hpo: its schema is {row.schema}, here {SCHEMA}; update hpo here"
        )
    stored = _stored_spec(row, name)
    opened = optuna.load_study(
        study_name=name, storage=place.optuna, sampler=samplers.build(stored, 0), pruner=pruners.build(stored)
    )
    return Study(
        storage=place,
        optuna=opened,
        uid=row.uid,
        spec=stored,
        budget=row.trials + row.imported,
        stop_reason=row.stop_reason,
        checkpoints=Path(row.checkpoints),
        code_folder=Path(row.code_folder),
    )


def is_plain(place: Storage, name: str) -> bool:
    """Say whether a storage holds a study of this name that is not ours."""
    study_id, row = _look_up(place, name)
    return study_id is not None and row is None


def _look_up(place: Storage, name: str) -> tuple[int | None, Any]:
    """Return a study's id, None if there is none, and our row of it, None if it is not ours."""
    is_shared = sa.inspect(place.engine).has_table(hpo_studies.name)
    with place.engine.connect() as connection:
        found = sa.select(studies.c.study_id).where(studies.c.study_name == name)
        study_id = connection.execute(found).scalar_one_or_none()
        return study_id, living_row(connection, study_id) if is_shared and study_id is not None else None


def _stored_spec(row: Any, name: str) -> StudySpec:
    try:
        return StudySpec.from_document(study_file.as_meant(json.loads(row.spec)))
    except (SpecError, ValueError, TypeError) as error:
        said = "; ".join(error.lines) if isinstance(error, SpecError) else error
        raise StudyError(f"study {name!r}: its spec in the database cannot be read: {said}") from None


def names(place: Storage) -> list[str]:
    """Return the names of the studies that `hpo` made in a storage."""
    if not sa.inspect(place.engine).has_table(hpo_studies.name):
        return []
    with place.engine.connect() as connection:
        rows = connection.execute(
            sa.select(studies.c.study_name, studies.c.study_id).order_by(studies.c.study_id)
        ).all()
        return [row.study_name for row in rows if living_row(connection, row.study_id) is not None]


def all_names(place: Storage) -> list[str]:
    """Return the names of all studies in a storage, whoever made them."""
    with place.engine.connect() as connection:
        return list(connection.execute(sa.select(studies.c.study_name).order_by(studies.c.study_id)).scalars())


def check_worker(study: Study, *, mine: StudySpec | None, code_digest: str, allow_code_change: bool) -> None:
    """Refuse a worker whose file or code differs from the study's, or that cannot read its checkpoints."""
    with sql.writing(study.storage.engine) as connection:
        row = _lock_and_read(connection, study.study_id)
        if row is None:
            raise StudyError(f"study {study.name!r} was deleted")
        if mine is not None:
            _check_identity(row, mine)
        _check_schema(connection, row, study.name)
        _check_code(connection, row, code_digest, allow_code_change)
    probe = study.checkpoints / PROBE_FILE
    if not probe.is_file() or probe.read_text() != study.uid:
        raise MismatchError(
            f"checkpoints {study.checkpoints}: this machine does not see the study's own folder there; "
            "mount it, or make the study with `checkpoints = PATH` on a path that every worker can read"
        )


def check_data(study: Study, digest: str) -> None:
    """Remember the digest of the first worker's data; MismatchError for a worker that has other data."""
    with sql.writing(study.storage.engine) as connection:
        row = _lock_and_read(connection, study.study_id)
        if row is None:
            raise StudyError(f"study {study.name!r} was deleted")
        if row.data_digest is None:
            connection.execute(hpo_studies.update().where(hpo_studies.c.uid == study.uid).values(data_digest=digest))
        elif row.data_digest != digest:
            raise MismatchError(
                f"data: the study was made on {row.data_digest[:12]}, here the data is {digest[:12]}; "
                "restore the files, or start a new study with --name"
            )


def _lock_and_read(connection: sa.Connection, study_id: int) -> Any:
    trial_writes.lock_study(connection, study_id)
    return living_row(connection, study_id)


def _refuse_a_plain_optuna_study(connection: sa.Connection, made: optuna.Study, wanted: StudySpec) -> None:
    study_id, directions = made._study_id, [direction.name.lower() for direction in made.directions]
    if directions != list(wanted.goals.directions.values()):
        raise MismatchError(
            f"study {wanted.name!r} is there already, was not made by hpo and is to {', '.join(directions)}; "
            "choose another name with --name"
        )
    held = connection.execute(
        sa.select(sa.func.count()).where(
            trials.c.study_id == study_id, trials.c.state != optuna.trial.TrialState.WAITING
        )
    ).scalar_one()
    if held:
        raise MismatchError(
            f"study {wanted.name!r} is there already with {held} trials and was not made by hpo; choose another name with --name"
        )


def _insert(
    connection: sa.Connection,
    study_id: int,
    wanted: StudySpec,
    checkpoints: Path,
    code_folder: Path,
    code_digest: str,
    forking: str | None,
) -> None:
    uid = uuid.uuid4().hex
    connection.execute(
        hpo_studies.insert().values(
            uid=uid,
            study_id=study_id,
            schema=SCHEMA,
            spec=_to_store(wanted),
            fingerprint=wanted.fingerprint,
            trials=wanted.budget.trials,
            code_folder=str(code_folder.absolute()),
            code_digest=code_digest,
            checkpoints=str(checkpoints / uid),
            stop_reason=forking,
            hold=Hold.FORKING if forking else None,
        )
    )
    connection.execute(
        study_user_attributes.insert(),
        [
            {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
            for key, value in {UID_KEY: uid, FINGERPRINT_KEY: wanted.fingerprint}.items()
        ],
    )
    if wanted.objectives:
        names = {"study_id": study_id, "key": METRIC_NAMES_KEY, "value_json": json.dumps(wanted.goals.names)}
        sql.upsert(connection, study_system_attributes, names, key=["study_id", "key"])


def checkpoint_root(place: Storage, wanted: StudySpec) -> Path:
    """Return the folder that holds the studies' checkpoint folders, made now; StudyError if it cannot be written."""
    given = wanted.checkpoints or os.environ.get("HPO_CHECKPOINTS")
    beside = Path(place.url.database or "").parent if place.is_sqlite else Path.cwd()
    root = Path(given or beside / ".hpo").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise StudyError(
            f"checkpoints {root}: cannot be written: {error.strerror}; "
            "name another folder by `checkpoints = PATH` in the study file or HPO_CHECKPOINTS"
        ) from None
    return root


def _place_probe_file(study: Study) -> None:
    study.checkpoints.mkdir(parents=True, exist_ok=True)
    (study.checkpoints / PROBE_FILE).write_text(study.uid)


def _check_identity(row: Any, wanted: StudySpec) -> None:
    if row.fingerprint == wanted.fingerprint:
        return
    stored = _stored_spec(row, wanted.name)
    lines = study_file.differences(stored, wanted) or ["the meaning of the file changed with the version of hpo"]
    raise MismatchError(
        f"study {wanted.name!r} was made with another spec:",
        *(f"  {line}" for line in lines),
        "undo the change (if there was none, an option came with this version of hpo), start a new study with --name NEW, "
        f"or take its trials along with `{command('fork', wanted.name)} NEW FILE`",
    )


def _check_schema(connection: sa.Connection, row: Any, name: str) -> None:
    """Refuse to work beside processes that read our rows in another way, and keep later ones of an earlier hpo out.

    From schema 2 on the format always stands in the stored spec: an hpo of schema 1 knows no such key and cannot join.
    """
    spec = _stored_spec(row, name)
    if others := workers.of_another_schema(connection, row.uid, spec.recovery.lease_seconds):
        raise MismatchError(
            f"study {name!r}: {', '.join(others)} of another version of hpo work on it, and the two read leases differently; "
            f"end them, or wait until they have been silent for {spec.recovery.lease} (recovery.lease)"
        )
    if row.schema != SCHEMA:
        connection.execute(
            hpo_studies.update().where(hpo_studies.c.uid == row.uid).values(schema=SCHEMA, spec=_to_store(spec))
        )


def _to_store(spec: StudySpec) -> str:
    return json.dumps({"format": spec.format, **spec.document})


def lets_in(row: Any, digest: str) -> bool:
    """Say whether the study, by our row of it, knows code with this digest."""
    return digest in {row.code_digest, *json.loads(row.code_changes)}


def _check_code(connection: sa.Connection, row: Any, digest: str, allow_change: bool) -> None:
    if lets_in(row, digest):
        return
    begun = sa.select(sa.func.count()).where(trials.c.study_id == row.study_id)
    if not connection.execute(begun).scalar_one():  # code that no trial has run may still be mended
        connection.execute(hpo_studies.update().where(hpo_studies.c.uid == row.uid).values(code_digest=digest))
        return
    if not allow_change:
        raise MismatchError(
            "your own code, or a file of weights, changed since the study was made "
            f"({row.code_digest[:12]} is now {digest[:12]}); undo the change, "
            "start a new study with --name, or join with --allow-code-change, which is recorded"
        )
    connection.execute(
        hpo_studies.update()
        .where(hpo_studies.c.uid == row.uid)
        .values(code_changes=json.dumps([*json.loads(row.code_changes), digest]))
    )


@contextmanager
def as_in_optimize(study: optuna.Study) -> Iterator[None]:
    """Run a trial as `study.optimize` does: `study.stop()` is allowed, and the sampler looks at the study anew."""
    look_anew(study)
    study._thread_local.in_optimize_loop = True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def look_anew(study: optuna.Study) -> None:
    """Let the sampler see the trials that there are now.

    Optuna keeps the list that a sampler took until its `ask` or `tell` is called; we call neither, and a worker's TPE and
    CMA-ES would for ever see the study as it was at their first trial.
    """
    study._thread_local.cached_all_trials = None


def forget_stop(study: optuna.Study) -> None:
    """Take note that a stop was passed on: the study may be resumed while this process lives."""
    study._stop_flag = False


def stop_was_requested(study: optuna.Study) -> bool:
    """Say whether a sampler or an objective called `study.stop()` in this process."""
    return bool(study._stop_flag)
