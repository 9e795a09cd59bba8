"""What ails a study and its storage, and what mends it: read with plain statements, repaired only where nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import Fault, SpecError, StorageError
from hpo.queue import finish, lease_clock, reaper, workers
from hpo.spec import usercode
from hpo.storage import clock, filesystem, sql
from hpo.storage.connect import FAILURES, Storage, cause, check_connections
from hpo.storage.tables import FINISHED, Hold, hpo_studies, hpo_trials, hpo_workers, trials
from hpo.study import plain, query, resolve, retention
from hpo.study import study as studies
from hpo.study.plain import PlainStudy
from hpo.study.status import summarize
from hpo.study.study import PROBE_FILE, Study
from hpo.text import command, page, short

MAX_SKEW_SECONDS = 2.0  # between a worker's clock and the database's, or its own of before
MIN_FREE_BYTES = 2**30  # of the disk that takes the checkpoints


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found."""

    where: str  # a study's name, or the storage
    what: str
    mend: str
    is_ill: bool = True  # something to mend; else merely good to know
    is_repaired: bool = False

    @property
    def text(self) -> str:
        """Two lines: what was found, and what mends it."""
        mark = "mended" if self.is_repaired else "ill" if self.is_ill else "note"
        mend = [] if self.is_repaired else [f"        {self.mend}"]
        return page([f"{mark.ljust(7)} {short(self.where)}: {self.what}", *mend])


def findings(place: Storage, name: str | None, *, repair: bool, workers: int | None) -> Iterator[Finding]:
    """Yield what is wrong with the storage and with one study, or with all of them; StudyError for an unknown name."""
    yield from examine_storage(place, workers)
    try:
        names = [name] if name else studies.names(place)
    except FAILURES as error:
        yield Finding(where=place.shown, what=f"no study can be read: {cause(error)}", mend="see above")
        return
    for one in names:
        yield from examine(place, one, repair=repair)


def examine_storage(place: Storage, workers: int | None) -> Iterator[Finding]:
    """Yield what is wrong with the storage itself.

    Args:
        workers: how many it is to carry, if that is planned.
    """
    if place.is_sqlite:
        if (said := _quick_check(place)) != "ok":
            yield Finding(where=place.shown, what=f"the file is damaged: {said}", mend="restore a copy of it")
    elif workers is not None:
        try:
            check_connections(place, workers)
        except StorageError as error:
            yield Finding(where=place.shown, what=_in_a_line(error), mend="see there")


def _quick_check(place: Storage) -> str:
    try:
        with place.engine.connect() as connection:
            said = connection.exec_driver_sql("PRAGMA quick_check").scalars().first()
    except FAILURES as error:  # so badly damaged that it cannot be looked at
        said = cause(error)
    return " ".join(str(said).split())


def examine(place: Storage, name: str, *, repair: bool) -> list[Finding]:
    """Return what is wrong with a study, as far as it can be read; StudyError if there is no such study."""
    try:
        study = plain.open_any(place, name)
        if isinstance(study, PlainStudy):
            return [_made_by_optuna(study)]
        return [finding for check in CHECKS for finding in check(study, repair)]
    except FAILURES as error:
        return [Finding(where=name, what=f"cannot be read: {cause(error)}", mend="see to the storage first")]
    except Fault as error:
        if name not in studies.names(place):
            raise
        mend = "use the version of hpo that made it"
        return [Finding(where=name, what=f"no worker can load its spec: {_in_a_line(error)}", mend=mend)]


def _made_by_optuna(study: PlainStudy) -> Finding:
    summary = plain.summarize(study)
    running = f", of which {summary.counts['foreign']} run" if summary.counts["foreign"] else ""
    return Finding(
        where=study.name,
        what=f"was made by Optuna, not by hpo: {sum(summary.counts.values())} trials{running}",
        mend="hpo shows, exports and forks it; it changes nothing in it, so there is nothing for it to mend",
        is_ill=False,
    )


def _in_a_line(error: Fault) -> str:
    return "; ".join(error.lines)


def _standing(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001  (a check's signature)
    summary = summarize(study)
    if summary.hold:
        reason = summary.stop_reason or "by `hpo pause`"
        yield Finding(
            where=study.name,
            what=f"{summary.hold}: {reason}",
            mend="see there" if summary.hold == Hold.FORKING else command("resume", study.name),
            is_ill=summary.hold != Hold.PAUSED,
        )
    for parked in summary.parked:
        yield Finding(
            where=study.name,
            what=f"trial {parked.number} is parked after epoch {parked.epoch}",
            mend="hpo run, or hpo worker, goes on with it",
            is_ill=False,
        )


def _dead_leases(study: Study, repair: bool) -> Iterator[Finding]:
    """RUNNING trials of ours whose lease has run out and that nobody has taken yet."""
    with study.storage.engine.connect() as connection:
        expired = connection.execute(
            _ours(study).where(
                hpo_trials.c.settled.is_(False),
                trials.c.state == TrialState.RUNNING,
                lease_clock.has_passed(connection.dialect.name, hpo_trials.c.lease_until, hpo_trials.c.lease_clock),
            )
        ).all()
    if expired and repair:
        with sql.writing(study.storage.engine) as connection:
            reaper.reap(connection, study.ledger("doctor"))
    for row in expired:
        yield Finding(
            where=study.name,
            what=f"trial {row.number} is RUNNING without a live lease; its worker was {row.worker}",
            mend="hpo doctor --repair, or any worker, parks it",
            is_repaired=repair,
            is_ill=not repair,
        )


def _foreign(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """RUNNING trials without a row of ours: a notebook's, or the orphans that plain Optuna leaves on a full disk."""
    with study.storage.engine.connect() as connection:
        found = connection.execute(
            sa.select(trials.c.number, trials.c.datetime_start)
            .select_from(query.with_ours(study))
            .where(
                trials.c.study_id == study.study_id,
                trials.c.state == TrialState.RUNNING,
                hpo_trials.c.trial_id.is_(None),
            )
            .order_by(trials.c.number)
        ).all()
    for row in found:
        yield Finding(
            where=study.name,
            what=f"trial {row.number} was started by another program at {row.datetime_start:%Y-%m-%d %H:%M:%S} UTC",
            mend=f"if that is dead: {command('doctor', study.name, options=f'--fail {row.number}')}",
        )


def _ended_elsewhere(study: Study, repair: bool) -> Iterator[Finding]:
    """Trials that something else, the dashboard for one, ended under our lease."""
    is_open = sa.and_(hpo_trials.c.settled.is_(False), trials.c.state.in_(FINISHED))
    with study.storage.engine.connect() as connection:
        found = connection.execute(_ours(study).where(is_open)).all()
    if found and repair:
        with sql.writing(study.storage.engine) as connection:
            for row in found:
                finish.close(connection, row, outcome=finish.ELSEWHERE, reason=None)
    for row in found:
        yield Finding(
            where=study.name,
            what=f"trial {row.number} was ended by another program; our row of it is still open",
            mend="hpo doctor --repair closes it",
            is_repaired=repair,
            is_ill=not repair,
        )


def _code(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """The user's own code, as a worker on this machine would load it."""
    path = list(sys.path)
    try:
        digest = _load(study)
    except Fault as error:
        what = f"no worker here can load it: {_in_a_line(error)}"
        yield Finding(where=study.name, what=what, mend="mend that, or --code FOLDER")
        return
    finally:
        sys.path[:] = path  # a child process would inherit it
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_studies).where(hpo_studies.c.uid == study.uid)).one()
    if not studies.lets_in(row, digest) and summarize(study).spent:
        yield Finding(
            where=study.name,
            what=f"your own code in {study.code_folder} changed since the study was made",
            mend="undo the change, or run with --allow-code-change",
        )


def _load(study: Study) -> str:
    """Load a study's code and return its digest; in a child process if other code is loaded here, as workers never share one."""
    spec, folder = study.spec, study.code_folder
    if not spec.code_references or usercode.is_alone(spec.code_references, folder):
        return resolve.check_stored(spec, folder)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            return alone.submit(resolve.check_stored, spec, folder).result()
    except BrokenProcessPool:
        raise SpecError("it ends the process that imports it") from None


def _workers(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """Living workers whose clock differs from Postgres's, or whose versions differ from the others'."""
    with study.storage.engine.connect() as connection:
        living = connection.execute(_living(connection, study, *hpo_workers.c)).all()
    for row in living:
        if row.booted_at is None and abs(row.clock_skew) > MAX_SKEW_SECONDS:
            yield Finding(
                where=study.name,
                what=f"the clock of {row.host} is {row.clock_skew:+.1f} s off the database's (worker {row.worker})",
                mend="set it, by NTP for one: leases are safe, times in logs and receipts are not",
            )
    usual = Counter(row.versions for row in living).most_common(1)
    for row in living:
        if differences := _differences(json.loads(usual[0][0]), json.loads(row.versions)):
            yield Finding(
                where=study.name,
                what=f"worker {row.worker} has other versions than the most: {differences}",
                mend="install the same: curves repeat bit for bit only under one version of everything",
            )


def _clock_steps(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """On SQLite: that this machine's wall clock was set since processes began to work on the study, or so a living one says."""
    of_this_boot = (hpo_workers.c.clock == clock.name(), hpo_workers.c.booted_at.is_not(None))
    columns = (hpo_workers.c.worker, hpo_workers.c.clock_skew, hpo_workers.c.booted_at)
    with study.storage.engine.connect() as connection:
        found = connection.execute(sa.select(*columns).where(hpo_workers.c.study_uid == study.uid, *of_this_boot)).all()
        living = connection.execute(_living(connection, study, *columns).where(*of_this_boot)).all()
    started_at = clock.started_at()
    steps = [(started_at - row.booted_at, row.worker) for row in found]
    steps += [(row.clock_skew, row.worker) for row in living]
    step, worker = max(steps, key=lambda one: abs(one[0]), default=(0.0, ""))
    if abs(step) > MAX_SKEW_SECONDS:
        yield Finding(
            where=study.name,
            what=f"the clock of this machine was set by {step:+.1f} s after worker {worker} had begun",
            mend="leases do not follow it; times of trials and in logs from before and after differ by it",
            is_ill=False,
        )


def _elsewhere(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """On SQLite: trials that a worker of another machine holds."""
    for row in query.held_elsewhere(study):
        yield Finding(
            where=study.name,
            what=f"trial {row.number} is held by {row.worker} of another machine, whose clock cannot be read here",
            mend=f"if that worker is gone: {command('doctor', study.name, options=f'--release {row.number}')}",
        )


def _living(connection: sa.Connection, study: Study, *columns: sa.Column[Any]) -> sa.Select[Any]:
    """Select of the processes that were seen within the last lease and have not said that they leave."""
    return sa.select(*columns).where(
        hpo_workers.c.study_uid == study.uid,
        hpo_workers.c.left_at.is_(None),
        workers.seen_lately(connection.dialect.name, study.spec.recovery.lease_seconds),
    )


def _differences(usual: dict[str, str], found: dict[str, str]) -> str:
    keys = sorted(key for key in usual.keys() | found.keys() if usual.get(key) != found.get(key))
    return ", ".join(f"{key} {found.get(key, 'none')} for {usual.get(key, 'none')}" for key in keys)


def _checkpoints(study: Study, repair: bool) -> Iterator[Finding]:
    """The folder of checkpoints: there, with room, and without what nobody needs any more."""
    probe = study.checkpoints / PROBE_FILE
    if not probe.is_file() or probe.read_text() != study.uid:
        yield Finding(
            where=study.name,
            what=f"this machine does not see the study's checkpoints in {study.checkpoints}",
            mend="mount the folder; workers here refuse to join",
        )
        return
    if (free := shutil.disk_usage(study.checkpoints).free) < MIN_FREE_BYTES:
        yield Finding(
            where=study.name,
            what=f"the disk of {study.checkpoints} has {free / 2**20:.0f} MiB left",
            mend="free some: a checkpoint that cannot be written costs the epochs since the last one",
        )
    stale = retention.delete_stale(study) if repair else retention.stale(study)
    if stale:
        yield Finding(
            where=study.name,
            what=f"checkpoints of {len(stale)} finished trials are left in {study.checkpoints}",
            mend="hpo doctor --repair removes them",
            is_repaired=repair,
            is_ill=not repair,
        )


def _filesystem(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """Checkpoints of several machines need a path that all of them see."""
    with study.storage.engine.connect() as connection:
        hosts = set(connection.execute(_living(connection, study, hpo_workers.c.host)).scalars())
    kind = filesystem.kind_of(study.checkpoints)
    if len(hosts) > 1 and kind and kind not in filesystem.NETWORK:
        yield Finding(
            where=study.name,
            what=f"workers of {len(hosts)} machines share {study.checkpoints}, which is on a local disk here ({kind})",
            mend="make sure that it is one folder for all of them, or set HPO_CHECKPOINTS to one that is",
            is_ill=False,
        )


def _ours(study: Study) -> sa.Select[Any]:
    return (
        sa.select(hpo_trials.c.study_uid, hpo_trials.c.trial_id, trials.c.number, hpo_trials.c.worker)
        .join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
        .where(hpo_trials.c.study_uid == study.uid)
        .order_by(trials.c.number)
    )


#: In the order in which they are told.
CHECKS: list[Callable[[Study, bool], Iterator[Finding]]] = [
    _standing,
    _dead_leases,
    _ended_elsewhere,
    _foreign,
    _code,
    _workers,
    _clock_steps,
    _elsewhere,
    _checkpoints,
    _filesystem,
]
