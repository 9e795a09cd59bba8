"""Launches workers on an engine, changes their number, and calls them back. Each launch is recorded in the study's database.

The database decides which slots have a worker. An engine is asked before and after: what was refused is not recorded, and
what waits in its queue need not begin.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import Fault, LaunchError
from hpo.launch.engines.engine import Engine, Request
from hpo.launch.engines.known import ENGINES, engine
from hpo.queue import launches
from hpo.queue.launches import Change, Launch, Seen
from hpo.queue.models import Post
from hpo.spec import bucket_url
from hpo.spec.launch import Launch as LaunchSection
from hpo.spec.study_file import StudySpec
from hpo.storage import filesystem
from hpo.storage.connect import FAILURES, check_connections, connect
from hpo.study import study as studies
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.text import command
from hpo.view import words

BY_OWN_URL = ("slurm", "ray")  # engines whose workers get the storage's URL as it is here


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a person wants to launch."""

    on: str
    workers: int
    section: LaunchSection  # with the settings of the command line

    @classmethod
    def of(cls, section: LaunchSection, *, on: str | None, workers: int | None, gpus: float | None) -> Wanted:
        """Return what the study file and the options say; an option comes first. Raises LaunchError if it is too little."""
        section = LaunchSection.checked(
            section.document
            | {key: value for key, value in {"on": on, "gpus_per_worker": gpus}.items() if value is not None}
        )
        if section.on is None:
            raise LaunchError(
                'engine: not given; use --on slurm, ray, kubernetes or compose, or on = "..." in [launch]'
            )
        by_kind = sum(section.slurm.gpu_types.values()) if section.on == "slurm" else 0
        count = workers or by_kind or section.workers
        if count is None:
            raise LaunchError("workers: not given; use --workers N, or workers = N in [launch]")
        if by_kind and count != by_kind:
            raise LaunchError(
                f"--workers {count}: launch.slurm.gpu_types asks for {by_kind}; leave --workers out, or change gpu_types"
            )
        return cls(on=section.on, workers=count, section=section)


def _request(
    wanted: Wanted,
    spec: StudySpec,
    *,
    code_folder: Path,
    storage: str,
    checkpoints: str | None,
    making: Path | None = None,
) -> Request:
    """Return what is asked of an engine, as far as it is known without a launch in the database.

    Raises LaunchError if a worker has fewer GPUs than a trial has processes.
    """
    _refuse_too_few_gpus(wanted.section.gpus_per_worker, spec.processes)
    return Request(
        study=spec.name,
        launch=None,
        slots=range(wanted.workers),
        workers=wanted.workers,
        section=wanted.section,
        code_folder=code_folder.absolute(),
        folder=Path.cwd(),
        logs=None,
        grace=spec.recovery.grace_seconds,
        environment={},
        storage=storage,
        needs_code=_needs_code(spec),
        checkpoints=checkpoints,
        making=making,
    )


def _refuse_too_few_gpus(gpus: float | None, processes: int) -> None:
    """Refuse what would let several ranks of a trial share a GPU, which NCCL does not do, or let the engine choose."""
    if processes > 1 and (gpus is None or 0 < gpus < processes):
        raise LaunchError(
            f"launch.gpus_per_worker{'' if gpus is None else f' = {gpus:g}'}: {'not given' if gpus is None else 'too few'}; "
            f"with processes_per_trial = {processes} use {processes}, or 0 on the CPU"
        )


def _needs_code(spec: StudySpec) -> bool:
    """Return whether a study has code in files of the user's own."""
    return not spec.is_pickled and (spec.command is not None or bool(spec.code_references))


def printed(study: Study, wanted: Wanted, *, code_folder: Path) -> str:
    """Return the script or manifest of a launch, without its submission. Needs no engine."""
    storage, checkpoints = study.storage.shown, study.store.place
    asked = _request(wanted, study.spec, code_folder=code_folder, storage=storage, checkpoints=checkpoints)
    engine(wanted.on).check(asked)
    return engine(wanted.on).render(asked)


def printed_of_file(file: Path, wanted: Wanted, spec: StudySpec, *, code_folder: Path, storage: str) -> str:
    """Return the script or manifest of a launch of a study that need not be there yet. Needs neither engine nor storage."""
    checkpoints = spec.checkpoints or os.environ.get("HPO_CHECKPOINTS")
    asked = _request(
        wanted, spec, code_folder=code_folder, storage=storage, checkpoints=checkpoints, making=file.absolute()
    )
    engine(wanted.on).check(asked)
    return engine(wanted.on).render(asked)


def launch(study: Study, wanted: Wanted, *, code_folder: Path, allow_code_change: bool = False) -> Launch:
    """Record a launch and submit it. Return it.

    Raises LaunchError if the engine is missing or refuses; then nothing is recorded. Raises StorageError if the storage
    has too few connections.
    """
    storage, checkpoints = study.storage.shown, study.store.place
    asked = _request(wanted, study.spec, code_folder=code_folder, storage=storage, checkpoints=checkpoints)
    runner = engine(wanted.on)
    runner.check(asked)
    _refuse_if_idle(study)
    _check_storage(study, runner, wanted)
    study.logs.mkdir(parents=True, exist_ok=True)
    about = {
        "section": wanted.section.document,
        "code_folder": str(asked.code_folder),
        "folder": str(asked.folder),
        "allow_code_change": allow_code_change,
    }
    made = launches.begin(
        study.storage.engine,
        study.study_id,
        study.uid,
        slots=wanted.workers,
        on=wanted.on,
        asked=json.dumps(about),
        launched_by=person(),
    )
    try:
        _submit(study, runner, made, range(made.slots))
    except BaseException:
        launches.forget(study.storage.engine, study.uid, made.number)
        raise
    return made


def _submit(study: Study, runner: Engine, launch: Launch, slots: range) -> None:
    """Submit workers for slots of a launch, and record the engine's handles."""
    asked = Request(
        study=study.name,
        launch=launch.number,
        slots=slots,
        workers=slots.stop,
        section=LaunchSection.checked(launch.asked["section"]),
        code_folder=Path(launch.asked["code_folder"]),
        folder=Path(launch.asked["folder"]),
        logs=None if bucket_url.is_url(study.store.place) else study.logs,  # of a bucket each host has its own
        grace=study.spec.recovery.grace_seconds,
        environment=study.storage.environment,
        storage=study.storage.shown,
        allow_code_change=launch.asked["allow_code_change"],
        needs_code=_needs_code(study.spec),
        checkpoints=study.store.place,
        uid=study.uid,
    )
    handles = runner.submit(asked)
    try:
        launches.add_handles(study.storage.engine, study.study_id, study.uid, launch.number, handles)
    except BaseException:
        runner.cancel(handles)
        raise


def _refuse_if_idle(study: Study) -> None:
    """Refuse to start workers that would leave at once."""
    summary = summarize(study)
    if summary.is_over or summary.hold:
        why = (
            words.held(summary)
            or f"its budget is spent; `{command('run', 'FILE', options='--trials N --workers 0')}` raises it"
        )
        raise LaunchError(f"study {study.name!r}: workers would find nothing to do: {why}")


def _check_storage(study: Study, runner: Engine, wanted: Wanted) -> None:
    """Refuse what other hosts cannot reach."""
    if runner.spans_hosts and study.storage.is_sqlite:
        raise LaunchError(
            f"storage {study.storage.shown}: workers on other hosts cannot use a SQLite file; "
            f"use Postgres: `{command('copy', study.storage.shown, 'postgresql://USER@HOST/DATABASE')}` takes all studies along"
        )
    check_connections(study.storage, wanted.workers)


def present(launch: Launch) -> Mapping[int, str] | None:
    """Return the states of the slots that a launch's engine still has; None if it cannot be asked on this machine."""
    try:
        return engine(launch.engine).present(launch.handles)
    except LaunchError:
        return None


def doubts(study: Study, launch: Launch) -> list[str]:
    """Return what may keep workers on other hosts from joining, in words."""
    if not ENGINES[launch.engine].spans_hosts:
        return []
    place, found = study.store.place, list[str]()
    kind = "" if bucket_url.is_url(place) else filesystem.kind_of(Path(place))
    if kind and kind not in filesystem.NETWORK:
        found.append(
            f"checkpoints {place} lie on {kind}, which looks local to this machine. A worker that does not see them is "
            "refused, and `hpo fleet` shows it. Then use a shared folder or a bucket: checkpoints = PATH or s3://BUCKET/PREFIX"
        )
    if launch.engine in BY_OWN_URL and study.storage.url.host in ("localhost", "127.0.0.1", "::1"):
        found.append(
            f"storage {study.storage.shown}: {study.storage.url.host} is another machine on each host. Workers elsewhere do "
            "not reach it; name this machine, such as postgresql://USER@HOST/DATABASE"
        )
    return found


def scale(study: Study, count: int) -> Change:
    """Let a study's launches have so many workers together. Surplus workers park their trials and leave.

    Raises StudyError if there is no launch that could have more. Raises LaunchError if its engine is missing or refuses.
    """
    where = study.storage.engine, study.study_id, study.uid
    open_ones = {one.number: one for one in launches.of_study(study.storage.engine, study.uid) if not one.recalled_at}
    seen = {number: Seen(submitted=one.submitted, states=present(one)) for number, one in open_ones.items()}
    have = sum(len(seen[number].alive(one)) for number, one in open_ones.items())
    if count > have:
        _refuse_if_idle(study)
        check_connections(study.storage, count - have)
    change = launches.resize(*where, count, seen)
    for number, slots in change.added.items():
        try:
            _submit(study, engine(open_ones[number].engine), open_ones[number], slots)
        except BaseException:
            launches.retire(*where, number, slots)
            raise
    for number, leaving in change.retired.items():
        with suppress(LaunchError):  # they leave by themselves when they begin
            engine(open_ones[number].engine).dismiss(open_ones[number].handles, leaving)
    return change


def log_commands(study: Study, number: int | None, slot: int | None) -> list[str]:
    """Return the engines' own commands that show logs which do not lie in the study's folder.

    Args:
        study: the study.
        number: of this launch only.
        slot: of this slot only.
    """
    found = []
    for one in launches.of_study(study.storage.engine, study.uid):
        if number in (None, one.number) and one.engine in ENGINES:
            found.append(ENGINES[one.engine].log_command(one.handles, slot or 0))
    return [said for said in found if said is not None]


def recall(study: Study) -> dict[int, str]:
    """Call all launched workers back: they park their trials and leave, and their jobs are cancelled.

    Return, for each launch that was open, why its jobs could not be cancelled; "" if they were.
    """
    said: dict[int, str] = {}
    for one in launches.recall(study.storage.engine, study.study_id, study.uid):
        try:
            engine(one.engine).cancel(one.handles)
            said[one.number] = ""
        except LaunchError as error:
            said[one.number] = str(error)
    return said


def note_refusal(url: str, name: str, post: Post, why: Exception) -> None:
    """Record why a worker of a launch was refused, if that is possible. `hpo fleet` shows it."""
    with suppress(Fault, *FAILURES):
        place = connect(url)
        try:
            launches.note_refusal(place.engine, studies.join(place, name).uid, post, str(why))
        finally:
            place.close()


def person() -> str:
    """Return the user and the machine, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have it
        user = str(os.getuid())
    return f"{user}@{platform.node()}"
