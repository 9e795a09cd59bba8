"""Finds problems of a study and its storage, and says what mends them. A repair never loses anything."""

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

from hpo.errors import Fault, SpecError, StorageError
from hpo.spec import budget, usercode
from hpo.storage import clock, filesystem, sql, study_rows
from hpo.storage.connect import FAILURES, Storage, cause, check_connections, count_connections
from hpo.storage.tables import Hold
from hpo.study import plain, resolve, retention
from hpo.study import study as studies
from hpo.study.plain import PlainStudy
from hpo.study.query import trouble, worker_rows
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.text import command, page, short

MAX_SKEW_SECONDS = 2.0  # between a worker's clock and the database's, or before and after a change of one clock
MIN_FREE_BYTES = 2**30  # on the disk of the checkpoints


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem or note."""

    where: str  # a study's name, or the storage
    what: str
    mend: str
    is_ill: bool = True  # a problem; False is a note
    is_repaired: bool = False

    @property
    def text(self) -> str:
        """Two lines: what was found, and what mends it. The second one is missing after a repair."""
        mark = "mended" if self.is_repaired else "ill" if self.is_ill else "note"
        mend = [] if self.is_repaired else [f"        {self.mend}"]
        return page([f"{mark.ljust(7)} {short(self.where)}: {self.what}", *mend])


def findings(place: Storage, name: str | None, *, repair: bool, workers: int | None) -> Iterator[Finding]:
    """Yield the findings on the storage and on one study, or on all of hpo's. Raises StudyError for an unknown name."""
    yield from examine_storage(place, workers)
    try:
        names = [name] if name else studies.names(place)
    except FAILURES as error:
        yield Finding(where=place.shown, what=f"no study can be read: {cause(error)}", mend="mend the storage first")
        return
    for one in names:
        yield from examine(place, one, repair=repair)


def examine_storage(place: Storage, workers: int | None) -> Iterator[Finding]:
    """Yield the findings on the storage itself.

    Args:
        place: the storage.
        workers: the number of planned workers, if there are any.
    """
    if place.is_sqlite:
        if (said := _quick_check(place)) != "ok":
            yield Finding(where=place.shown, what=f"the file is damaged: {said}", mend="restore a copy of it")
    elif workers is not None:
        try:
            check_connections(place, workers)
        except StorageError as error:
            yield Finding(
                where=place.shown, what=_in_a_line(error), mend="start fewer workers, or raise max_connections"
            )
        else:
            yield from _behind_a_pooler(place, workers)


def _behind_a_pooler(place: Storage, workers: int) -> Iterator[Finding]:
    """Yield what can be known of the connections that a pooler shares out."""
    found = count_connections(place, workers)
    if found.is_pooled:
        yield Finding(
            where=place.shown,
            what=f"is reached through a pooler: {workers} workers and this process are up to {found.needed} clients of it; "
            f"Postgres has {found.left} connections left (max_connections {found.limit}, {found.reserved} reserved)",
            mend="the pooler does not tell its clients its own limit: see that max_client_conn of pgbouncer is "
            f"{found.needed} or more",
            is_ill=False,
        )


def _quick_check(place: Storage) -> str:
    try:
        said = sql.quick_check(place.engine)
    except FAILURES as error:  # too damaged for the check
        said = cause(error)
    return " ".join(str(said).split())


def examine(place: Storage, name: str, *, repair: bool) -> list[Finding]:
    """Return the findings on a study, as far as it can be read. Raises StudyError if there is no such study."""
    try:
        study = plain.open_any(place, name)
        if isinstance(study, PlainStudy):
            return [_made_by_optuna(study)]
        return [finding for check in CHECKS for finding in check(study, repair)]
    except FAILURES as error:
        return [Finding(where=name, what=f"cannot be read: {cause(error)}", mend="mend the storage first")]
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
        mend="hpo shows, exports and forks it, and changes nothing in it",
        is_ill=False,
    )


def _in_a_line(error: Fault) -> str:
    return "; ".join(error.lines)


#: Holds that `hpo resume` does not end.
MENDS: dict[str, str] = {Hold.FORKING: "delete it and fork again", Hold.SPENT: budget.MEND}


def _standing(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001  (a check's signature)
    summary = summarize(study)
    if summary.hold:
        reason = summary.stop_reason or "by `hpo pause`"
        yield Finding(
            where=study.name,
            what=f"{summary.hold}: {reason}",
            mend=MENDS.get(summary.hold) or command("resume", study.name),
            is_ill=summary.hold not in (Hold.PAUSED, Hold.COPIED, Hold.SPENT),
        )
    for parked in summary.parked:
        yield Finding(
            where=study.name,
            what=f"trial {parked.number} is parked"
            + (f" after epoch {parked.epoch}" if parked.unit == "epoch" else ""),
            mend="hpo run, or hpo worker, goes on with it",
            is_ill=False,
        )


def _dead_leases(study: Study, repair: bool) -> Iterator[Finding]:
    """Find our RUNNING trials with an expired lease."""
    with study.storage.engine.connect() as connection:
        expired = trouble.expired(connection, study)
    if expired and repair:
        with sql.writing(study.storage.engine) as connection:
            from hpo.queue import reaper

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
    """Find foreign RUNNING trials: a notebook's, or those that plain Optuna leaves behind on a full disk."""
    with study.storage.engine.connect() as connection:
        found = trouble.foreign_running(connection, study)
    for row in found:
        yield Finding(
            where=study.name,
            what=f"trial {row.number} was started by another program at {row.datetime_start:%Y-%m-%d %H:%M:%S} UTC",
            mend=f"if that is dead: {command('doctor', study.name, options=f'--fail {row.number}')}",
        )


def _ended_elsewhere(study: Study, repair: bool) -> Iterator[Finding]:
    """Find our trials that another program ended, for example the dashboard."""
    with study.storage.engine.connect() as connection:
        found = trouble.ended_elsewhere(connection, study)
    if found and repair:
        with sql.writing(study.storage.engine) as connection:
            from hpo.queue import finish

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
    """Load the user's own code as a worker on this machine would. Find errors and changes."""
    path = list(sys.path)
    try:
        digest = _load(study)
    except Fault as error:
        what = f"no worker here can load it: {_in_a_line(error)}"
        yield Finding(
            where=study.name, what=what, mend="mend that, give --code FOLDER, or use the version of hpo that made it"
        )
        return
    finally:
        sys.path[:] = path  # a child process would inherit it
    with study.storage.engine.connect() as connection:
        row = study_rows.living_row(connection, study.study_id)
    if row is not None and not studies.lets_in(row, digest) and summarize(study).spent:
        yield Finding(
            where=study.name,
            what=f"your own code in {study.code_folder} changed since the study was made",
            mend="undo the change, or run with --allow-code-change",
        )


def _load(study: Study) -> str:
    """Load a study's code and return its digest. If other user code is loaded here, this happens in a child process."""
    spec, folder = study.spec, study.code_folder
    if not spec.code_references or usercode.is_alone(spec.code_references, folder):
        return resolve.check_stored(spec, folder)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            return alone.submit(resolve.check_stored, spec, folder).result()
    except BrokenProcessPool:
        raise SpecError("it ends the process that imports it") from None


def _workers(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """Find living workers whose clock differs from Postgres's, or whose versions differ from most workers'."""
    with study.storage.engine.connect() as connection:
        living = worker_rows.living_workers(connection, study)
    for row in living:
        if row.booted_at is None and abs(row.clock_skew) > MAX_SKEW_SECONDS:
            yield Finding(
                where=study.name,
                what=f"the clock of {row.host} is {row.clock_skew:+.1f} s off the database's (worker {row.worker})",
                mend="set that clock, for example by NTP; times in logs and receipts follow it, leases do not",
            )
    usual = Counter(row.versions for row in living).most_common(1)
    for row in living:
        if differences := _differences(json.loads(usual[0][0]), json.loads(row.versions)):
            yield Finding(
                where=study.name,
                what=f"worker {row.worker} has other versions than most workers: {differences}",
                mend="install the same versions; curves repeat bit for bit only with equal versions",
            )


def _clock_steps(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """On SQLite, find that this machine's wall clock was set while workers ran, or between workers."""
    with study.storage.engine.connect() as connection:
        found = worker_rows.workers_since_boot(connection, study)
        living = worker_rows.living_workers(connection, study)
    started_at = clock.started_at()
    steps = [(started_at - row.booted_at, row.worker) for row in found]
    here = {row.worker for row in found}
    steps += [(row.clock_skew, row.worker) for row in living if row.worker in here]
    step, worker = max(steps, key=lambda one: abs(one[0]), default=(0.0, ""))
    if abs(step) > MAX_SKEW_SECONDS:
        yield Finding(
            where=study.name,
            what=f"the clock of this machine was set by {step:+.1f} s after worker {worker} had begun",
            mend="nothing to do for leases; times in trials and logs from before and after differ by this",
            is_ill=False,
        )


def _elsewhere(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """On SQLite, find trials that a worker of another machine holds."""
    for row in trouble.held_elsewhere(study):
        yield Finding(
            where=study.name,
            what=f"trial {row.number} is held by {row.worker} of another machine, whose clock cannot be read here",
            mend=f"if that worker is gone: {command('doctor', study.name, options=f'--release {row.number}')}",
        )


def _differences(usual: dict[str, str], found: dict[str, str]) -> str:
    keys = sorted(key for key in usual.keys() | found.keys() if usual.get(key) != found.get(key))
    return ", ".join(f"{key} {found.get(key, 'none')} for {usual.get(key, 'none')}" for key in keys)


def _checkpoints(study: Study, repair: bool) -> Iterator[Finding]:
    """Check the place of the checkpoints: that it is visible, has room on this machine, and holds no stale checkpoints."""
    if not study.sees_checkpoints:
        what, mend = study.store.why_unseen(study.uid)
        where = f"checkpoints {study.store.place}: {what}"
        yield Finding(where=study.name, what=where, mend=f"{mend}; until then workers here refuse to join")
        return
    is_used = study.checkpoints.is_dir()  # not yet by a worker, if the checkpoints are in a bucket
    if is_used and (free := shutil.disk_usage(study.checkpoints).free) < MIN_FREE_BYTES:
        yield Finding(
            where=study.name,
            what=f"the disk of {study.checkpoints} has {free / 2**20:.0f} MiB left",
            mend="free some space; if a checkpoint cannot be written, the epochs since the last one may be lost",
        )
    stale = retention.delete_stale(study) if repair else retention.stale(study)
    if stale:
        yield Finding(
            where=study.name,
            what=f"checkpoints of {len(stale)} finished trials are left in {study.store.place}",
            mend="hpo doctor --repair removes them",
            is_repaired=repair,
            is_ill=not repair,
        )


def _filesystem(study: Study, repair: bool) -> Iterator[Finding]:  # noqa: ARG001
    """Find a checkpoint folder on a local disk though workers of several machines use it."""
    if not study.store.is_folder:
        return
    with study.storage.engine.connect() as connection:
        hosts = {row.host for row in worker_rows.living_workers(connection, study)}
    kind = filesystem.kind_of(study.checkpoints)
    if len(hosts) > 1 and kind and kind not in filesystem.NETWORK:
        yield Finding(
            where=study.name,
            what=f"workers of {len(hosts)} machines share {study.checkpoints}, which is on a local disk here ({kind})",
            mend="make sure that it is one folder for all of them, or set HPO_CHECKPOINTS to one that is",
            is_ill=False,
        )


#: In the order of their findings.
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
