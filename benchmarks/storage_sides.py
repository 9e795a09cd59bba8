"""What `benchmarks/storage.py` measures: the same work by plain Optuna and by `hpo`, and the databases it is done on.

Each function of `TASKS` runs in a fresh process of its own and returns plain numbers. Plain Optuna is what its users write:
`load_study(storage=URL)`, `ask`, `suggest_*`, `report`, `should_prune`, `tell`, on an RDBStorage with its defaults. Our side
is what a worker of ours runs: `worker.loop.work`, or its pieces where a thread's ticks would blur an exact count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState

from hpo.queue import claiming, workers
from hpo.queue.ledger import Ledger
from hpo.spec import seeds
from hpo.spec.metrics import OWN_METRIC
from hpo.spec.study_file import StudySpec
from hpo.storage import tables
from hpo.storage.connect import Storage, connect, parse_url
from hpo.storage.optuna_private import as_in_optimize
from hpo.storage.retry import Retry
from hpo.storage.tables import (
    INTERMEDIATE_TYPE,
    VALUE_TYPE,
    hpo_curves,
    hpo_trials,
    intermediate_values,
    trial_params,
    trials,
)
from hpo.strategy import array_pruners, samplers
from hpo.study import status
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.worker import attempt, runner
from hpo.worker import loop as worker_loop
from hpo.worker.client import ClaimRequest, QueueClient
from hpo.worker.lease import Lease
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

OPTUNA, HPO = "optuna", "hpo"
HISTORY_STEPS = 20  # values of each trial of a history
COUNTED_STEPS = 20  # of the trial whose SQL statements are counted
SHORT_STEPS = 10  # of the trials whose throughput is measured
WARM_UP_TRIALS = 6  # before statements are counted: the median pruner begins to look after five
COUNTED_TRIALS = 4
SLOW_SECONDS = 1.1  # of an epoch: longer than a write of ours may wait to go with another
AT_ONCE = 16  # trials of which everything is written by one call each
LATENCY_TRIALS = 6  # the first of which is not counted: it loads the history
WARM_TRIALS = 6  # whose suggestions are timed, after a first one
REFRESHES = 5
READY_SECONDS = 180  # for all workers of a throughput run to be at work
NO_STATEMENT = re.compile(r"\s*(BEGIN|COMMIT|ROLLBACK|SAVEPOINT|RELEASE)", re.IGNORECASE)
BUDGET = 10_000_000  # trials: more than any run makes
BASE_SPEC: dict[str, Any] = {
    "objective": "none.py:objective",  # never loaded: the tasks bring functions of their own
    "direction": "minimize",
    "sampler": {"name": "random"},
    "pruner": {"name": "median"},
    "budget": {"trials": BUDGET},
    "recovery": {"recycle_trials": BUDGET},  # the tasks start their processes themselves
}

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement of one side."""

    side: str
    task: str
    url: str
    study: str
    folder: str  # for the checkpoints that our studies want a folder for
    workers: int = 1
    seconds: float = 0.0


# --- the search spaces ------------------------------------------------------------------------------------------------

#: Mixed and conditional: the first six always, then two by the choice of `opt`; so eight are suggested.
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-5, 1.0, log=True),
    "wd": FloatDistribution(1e-6, 1e-1, log=True),
    "layers": IntDistribution(1, 8),
    "opt": CategoricalDistribution(("sgd", "adam", "lion")),
    "drop": FloatDistribution(0.0, 0.5),
    "batch": CategoricalDistribution((32, 64, 128, 256)),
    "momentum": FloatDistribution(0.5, 0.99),
    "dampening": FloatDistribution(0.0, 0.5),
    "beta1": FloatDistribution(0.8, 0.99),
    "beta2": FloatDistribution(0.9, 0.9999),
}
FIVE = ("lr", "wd", "layers", "opt", "drop")
SIX = (*FIVE, "batch")
PENALTIES = {"sgd": 0.3, "adam": 0.0, "lion": 0.1}
Take = Callable[[str], Any]


def eight(take: Take) -> dict[str, Any]:
    """Return the eight parameters of a trial, each got by its name from `take`."""
    params = {name: take(name) for name in SIX}
    rest = ("momentum", "dampening") if params["opt"] == "sgd" else ("beta1", "beta2")
    return params | {name: take(name) for name in rest}


def suggesting(trial: optuna.Trial) -> Take:
    """Return what suggests a parameter of SPACE as a user's objective does."""

    def take(name: str) -> Any:
        found = SPACE[name]
        if isinstance(found, CategoricalDistribution):
            return trial.suggest_categorical(name, found.choices)
        if isinstance(found, IntDistribution):
            return trial.suggest_int(name, found.low, found.high)
        assert isinstance(found, FloatDistribution)
        return trial.suggest_float(name, found.low, found.high, log=found.log)

    return take


def drawing(source: random.Random) -> Take:
    """Return what draws a parameter of SPACE at random, without a study."""

    def take(name: str) -> Any:
        found = SPACE[name]
        if isinstance(found, CategoricalDistribution):
            return source.choice(found.choices)
        if isinstance(found, IntDistribution):
            return source.randint(found.low, found.high)
        assert isinstance(found, FloatDistribution)
        if found.log:
            return math.exp(source.uniform(math.log(found.low), math.log(found.high)))
        return source.uniform(found.low, found.high)

    return take


def value_of(params: Mapping[str, Any]) -> float:
    """Return a trial's value: smooth in most parameters, so that TPE has something to learn."""
    bowl = (math.log10(params["lr"]) + 3) ** 2 + 0.2 * (math.log10(params["wd"]) + 4) ** 2
    return float(bowl + 0.1 * abs(params["layers"] - 4) + PENALTIES[params["opt"]] + params["drop"])


# --- databases --------------------------------------------------------------------------------------------------------


def make_our_study(place: Storage, name: str, folder: str) -> Study:
    """Make a study of ours with an objective of the user's own."""
    spec = StudySpec.from_document({**BASE_SPEC, "name": name, "checkpoints": folder})
    return studies.create_or_join(place, spec, code_folder=Path(folder), code_digest="")


def make_history(url: str, name: str, folder: str, size: int) -> None:
    """Make a study of ours with so many finished trials: the first by a worker, the others copied after it in bulk."""
    place = connect(url, create=True)
    try:
        make_our_study(place, name, folder)
        if size:
            our = OurWorker.join(place, name)
            our.run(_first_trial)
    finally:
        place.close()
    if size > 1:
        add_trials(url, name, size - 1)
    if not place.is_sqlite:
        with _engine(url).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")


def _first_trial(trial: optuna.Trial) -> float:
    params = eight(suggesting(trial))
    trial.set_user_attr("host", "gpu-0")
    for step in range(1, HISTORY_STEPS + 1):
        trial.report(value_of(params) + 3 / step, step)
    return value_of(params)


def add_trials(url: str, name: str, count: int, *, running: bool = False) -> None:
    """Add finished trials to a history, or RUNNING ones that another worker holds, as our workers leave them."""
    engine = _engine(url)
    with engine.begin() as connection:
        grower = Grower.of(connection, name)
        for start in range(0, count, 1000):
            grower.add(connection, min(1000, count - start), running=running)
    engine.dispose()


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(parse_url(url), poolclass=sa.pool.NullPool)


@dataclass(frozen=True, kw_only=True)
class Grower:
    """Adds trials to a history; what our tables hold of each is copied from its first trial."""

    study_id: int
    pattern: Mapping[str, Any]  # our row of the first trial
    has_curves: bool  # whether our workers write a curve of their own beside Optuna's

    @classmethod
    def of(cls, connection: sa.Connection, name: str) -> Grower:
        """Learn from the first trial of a history."""
        study_id = _study_id(connection, name)
        first = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.number == 0)
        pattern = connection.execute(sa.select(hpo_trials).where(hpo_trials.c.trial_id.in_(first))).one()
        curve = sa.select(sa.func.count()).where(hpo_curves.c.trial_id.in_(first))
        has_curves = bool(connection.execute(curve).scalar_one())
        return cls(study_id=study_id, pattern=dict(pattern._mapping), has_curves=has_curves)

    def add(self, connection: sa.Connection, count: int, *, running: bool) -> None:
        """Add the next trials, with what hangs on them."""
        of_study = trials.c.study_id == self.study_id
        known = connection.execute(sa.select(sa.func.max(trials.c.number)).where(of_study)).scalar_one()
        source = random.Random(f"{known}")
        numbers = range(known + 1, known + 1 + count)
        states = [_state(source, running=running) for _ in numbers]
        rows = [self._trial(number, state) for number, state in zip(numbers, states, strict=True)]
        _insert(connection, trials, rows)
        made = sa.select(trials.c.number, trials.c.trial_id).where(of_study, trials.c.number > known)
        ids = {row.number: row.trial_id for row in connection.execute(made)}
        children: dict[sa.Table, list[Mapping[str, Any]]] = {}
        for number, state in zip(numbers, states, strict=True):
            for table, row in self._children(ids[number], state, source):
                children.setdefault(table, []).append(row)
        for table, found in children.items():
            _insert(connection, table, found)

    def _trial(self, number: int, state: TrialState) -> Mapping[str, Any]:
        start = tables.utc() - timedelta(hours=100) + timedelta(seconds=number)
        end = start + timedelta(seconds=30) if state.is_finished() else None
        times = {"datetime_start": start, "datetime_complete": end}
        return {"number": number, "study_id": self.study_id, "state": state} | times

    def _children(
        self, trial_id: int, state: TrialState, source: random.Random
    ) -> Iterator[tuple[sa.Table, Mapping[str, Any]]]:
        """Yield the rows that hang on one trial."""
        of_trial = {"trial_id": trial_id}
        params = eight(drawing(source))
        value = value_of(params) + source.gauss(0, 0.05)
        for name, param in params.items():
            internal = {"param_name": name, "param_value": SPACE[name].to_internal_repr(param)}
            yield trial_params, of_trial | internal | {"distribution_json": DISTRIBUTIONS[name]}
        for step in range(1, HISTORY_STEPS + 1):
            number = value + 3 / step + source.gauss(0, 0.02)
            kind = {"intermediate_value": number, "intermediate_value_type": INTERMEDIATE_TYPE.FINITE}
            yield intermediate_values, of_trial | {"step": step} | kind
            if self.has_curves:
                own = {"study_uid": self.pattern["study_uid"], "metric": OWN_METRIC, "epoch": step, "value": number}
                yield hpo_curves, of_trial | own
        if state.is_finished():
            yield tables.trial_values, of_trial | {"objective": 0, "value": value, "value_type": VALUE_TYPE.FINITE}
        yield SYSTEM_ATTRIBUTES, of_trial | {"key": "completed_rung_0", "value_json": json.dumps(value + 3)}
        yield USER_ATTRIBUTES, of_trial | {"key": "host", "value_json": json.dumps(f"gpu-{trial_id % 8}")}
        yield hpo_trials, {**self.pattern, **of_trial, **_held_or_settled(state)}


SYSTEM_ATTRIBUTES = models.TrialSystemAttributeModel.__table__
USER_ATTRIBUTES = models.TrialUserAttributeModel.__table__
DISTRIBUTIONS = {name: distribution_to_json(found) for name, found in SPACE.items()}


def _state(source: random.Random, *, running: bool) -> TrialState:
    if running:
        return TrialState.RUNNING
    return TrialState.PRUNED if source.random() < 0.3 else TrialState.COMPLETE


def _held_or_settled(state: TrialState) -> Mapping[str, Any]:
    """Return what our row says of a trial in this state; a running one is held for longer than any measurement."""
    if state.is_finished():
        return {"outcome": state.name.lower()}
    return {"settled": False, "outcome": None, "worker": "another", "lease_until": time.time() + 1e6}


def _insert(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    connection.execute(table.insert(), [dict(row) for row in rows])


def _study_id(connection: sa.Connection, name: str) -> int:
    found = sa.select(tables.studies.c.study_id).where(tables.studies.c.study_name == name)
    return int(connection.execute(found).scalar_one())


def forget(url: str, name: str, *, beyond: int | None = None) -> None:
    """Delete a study, or its trials from the number `beyond` on; Optuna's own way of it loads every trial first."""
    engine = _engine(url)
    with engine.begin() as connection:
        found = connection.execute(
            sa.select(tables.studies.c.study_id).where(tables.studies.c.study_name == name)
        ).scalar_one_or_none()
        if found is not None:
            _forget_trials(connection, found, beyond or 0)
            if beyond is None:
                _delete(connection, "study_id", sa.select(sa.literal(found)), {"studies", "trials"})
                connection.execute(tables.studies.delete().where(tables.studies.c.study_id == found))
    engine.dispose()


def _forget_trials(connection: sa.Connection, study_id: int, beyond: int) -> None:
    doomed = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.number >= beyond)
    _delete(connection, "trial_id", doomed, {"trials"})
    connection.execute(trials.delete().where(trials.c.study_id == study_id, trials.c.number >= beyond))


def _delete(connection: sa.Connection, column: str, doomed: sa.Select[Any], but: Collection[str]) -> None:
    """Delete from every table that has this column, Optuna's and ours."""
    there = set(sa.inspect(connection).get_table_names())
    for table in (*models.BaseModel.metadata.sorted_tables, *tables.metadata.sorted_tables):
        if column in table.c and table.name in there and table.name not in but:
            connection.execute(table.delete().where(table.c[column].in_(doomed)))


# --- our worker, piece by piece ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OurWorker:
    """What `worker.loop.work` runs trials with, without its second thread."""

    study: Study
    ledger: Ledger
    retry: Retry

    @classmethod
    def join(cls, place: Storage, name: str, **changes: Any) -> OurWorker:
        """Join a study as a worker does.

        Args:
            changes: to the study's spec, in this process only: another sampler, for one.
        """
        joined = studies.join(place, name)
        joined = replace(joined, spec=joined.spec.model_copy(update=changes))
        retry = Retry(joined.spec.recovery.outage_seconds)
        study = worker_loop.with_retry(joined, retry)
        return cls(study=study, ledger=study.ledger(workers.new_name()), retry=retry)

    def claim(self) -> attempt.Attempt:
        """Claim a trial and return the attempt at it."""
        client = QueueClient(self.ledger, self.retry, StopSignal())
        leases = client.claim(ClaimRequest(count=1))
        assert not isinstance(leases, claiming.Idle)
        return attempt.Attempt(self.study, client, leases[0])

    def run(self, objective: worker_loop.Objective) -> None:
        """Claim a trial and run it to its end; RuntimeError if it did not come to a good one."""
        taken = self.claim()
        runner.run_trial(taken, objective)
        if taken.failed_by is not None:
            raise RuntimeError(f"trial {taken.number} failed by {taken.failed_by}")


def plain_study(job: Job, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """Open the study as a user of Optuna does, with the median pruner."""
    return optuna.load_study(study_name=job.study, storage=job.url, sampler=sampler, pruner=MedianPruner())


# --- SQL statements of a trial ----------------------------------------------------------------------------------------


class Statements:
    """Counts the SQL statements of every engine in this process, without those that begin or end a transaction.

    Pings are counted apart: a pool that is asked to sends one for each connection that it hands out again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.pings = 0
        sa.event.listen(sa.Engine, "before_cursor_execute", self._see)
        sa.event.listen(sa.pool.Pool, "checkout", self._see_checkout)

    def _see(self, connection: Any, cursor: Any, statement: str, *more: Any) -> None:  # noqa: ARG002  (SQLAlchemy's)
        self.count += not NO_STATEMENT.match(statement)

    def _see_checkout(self, connection: Any, record: Any, proxy: Any) -> None:  # noqa: ARG002  (SQLAlchemy's)
        self.pings += bool(getattr(proxy._pool, "_pre_ping", False))

    def of(self, action: Callable[[], object], times: int, trials: int = 1) -> Result:
        """Do something several times and return how many statements and pings it took for each of its trials."""
        each, pings = [], self.pings
        for _ in range(times):
            before = self.count
            action()
            each.append((self.count - before) / trials)
        return {"statements": sum(each) / times, "each": each, "pings": (self.pings - pings) / times / trials}


def curve(take: Take) -> Iterator[tuple[int, float]]:
    """Take five parameters and yield the steps and values of a counted trial."""
    params = {name: take(name) for name in FIVE}
    yield from ((step, value_of(params) + 3 / step) for step in range(1, COUNTED_STEPS + 1))


def counted_objective(trial: optuna.Trial, epoch_seconds: float = 0.0) -> float:
    """Suggest five parameters, report twenty times, ask the pruner each time and go on whatever it says."""
    value = math.nan
    for step, value in curve(suggesting(trial)):
        time.sleep(epoch_seconds)
        trial.report(value, step)
        trial.should_prune()
    return value


def statements_of_optuna(job: Job) -> Result:
    """Count the statements of `ask`, five suggestions, twenty reports and questions to the pruner, and `tell`."""
    optuna.create_study(study_name=job.study, storage=job.url)
    counted = Statements()
    study = plain_study(job, RandomSampler(seed=0))

    def trial() -> None:
        asked = study.ask()
        study.tell(asked, counted_objective(asked))

    counted.of(trial, WARM_UP_TRIALS)
    return counted.of(trial, COUNTED_TRIALS)


def statements_of_hpo(job: Job) -> Result:
    """Count the same by a worker's claim and `run_trial`: no second thread, whose looks come by the second.

    Once more with epochs so long that what may wait for the next write does not find one in time.
    """
    our = _first_worker(job)
    counted = Statements()
    counted.of(lambda: our.run(counted_objective), WARM_UP_TRIALS)
    quick = counted.of(lambda: our.run(counted_objective), COUNTED_TRIALS)
    slow = counted.of(lambda: our.run(partial(counted_objective, epoch_seconds=SLOW_SECONDS)), 1)
    return quick | {"slow": slow}


def batched_statements_of_hpo(job: Job) -> Result:
    """Count the same of trials side by side in one process."""
    our = _first_worker(job)
    counted = Statements()
    counted.of(lambda: our.run(counted_objective), WARM_UP_TRIALS)
    return counted.of(lambda: run_side_by_side(our), 2, AT_ONCE)


def _first_worker(job: Job) -> OurWorker:
    place = connect(job.url, create=True)
    make_our_study(place, job.study, job.folder)
    return OurWorker.join(place, job.study)


def run_side_by_side(our: OurWorker) -> None:
    """Run AT_ONCE trials in step, as a worker does that trains them as one model: what is suggested, reported and decided in
    an epoch, and how they end, is written for all at once.
    """
    study, client = our.study, QueueClient(our.ledger, our.retry, StopSignal())
    leases = client.claim(ClaimRequest(count=AT_ONCE))
    assert not isinstance(leases, claiming.Idle)
    with as_in_optimize(study.optuna):
        with study.storage.optuna.snapshot(study.study_id):
            trials = [_open(our, client, lease) for lease in leases]
            proposed = [trial.suggested(lambda trial: list(curve(suggesting(trial)))) for trial in trials]
        client.write_suggested([given for _, given in proposed])
        for points in zip(*(points for points, _ in proposed), strict=True):
            reports = [
                trial.reporting(step, value, {OWN_METRIC: value})
                for trial, (step, value) in zip(trials, points, strict=True)
            ]
            client.report(reports)
            for trial, report in zip(trials, reports, strict=True):
                trial.take_note(report)
            study.storage.optuna.set_known_finished(study.study_id, client.finished)
            array_pruners.decide(study.optuna, [trial.frozen for trial in trials])
        ends = [
            attempt.ending(trial, TrialState.COMPLETE, points[-1][1])
            for trial, (points, _) in zip(trials, proposed, strict=True)
        ]
        assert client.finish(ends) == set()


def _open(our: OurWorker, client: QueueClient, lease: Lease) -> LeasedTrial:
    our.study.optuna.sampler = samplers.build(our.study.spec, lease.claim.number)
    return attempt.open_trial(our.study, client, lease)


# --- trials a second --------------------------------------------------------------------------------------------------

Lap = tuple[float, float]  # when report + should_prune came back (seconds since 1970), and how long it took


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the processes of a throughput run share."""

    ready: Semaphore  # released by each process when it has run a first trial
    stop: Any  # a ctypes value without a lock: 1 ends the window


@dataclass(kw_only=True)
class Pace:
    """The short trials of one process."""

    shared: Shared
    laps: list[Lap] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    begun: int = 0

    @property
    def is_over(self) -> bool:
        return bool(self.shared.stop.value)

    def begin(self) -> None:
        """Count a trial; from the second on this process is at work and past its start-up."""
        self.begun += 1
        if self.begun == 2:
            self.shared.ready.release()

    def run(self, trial: optuna.Trial) -> float | None:
        """Suggest, report and ask, without any training; None if the window ends meanwhile."""
        take = suggesting(trial)
        value = value_of({name: take(name) for name in FIVE})
        for step in range(1, SHORT_STEPS + 1):
            started = time.perf_counter()
            trial.report(value + 3 / step, step)
            trial.should_prune()
            self.laps.append((time.time(), time.perf_counter() - started))
            if self.is_over:
                return None
        return value


_shared: list[Shared] = []  # one, in a worker process


def _share(shared: Shared) -> None:
    _shared[:] = [shared]


def plain_worker(job: Job, index: int) -> Pace:
    """Run short trials by ask and tell until the window ends; what the storage throws costs the trial, not the process."""
    pace = Pace(shared=_shared[0])
    study = plain_study(job, RandomSampler(seed=index))
    while not pace.is_over:
        pace.begin()
        try:
            trial = study.ask()
            value = pace.run(trial)
            if value is not None:
                study.tell(trial, value)
        except Exception as error:
            pace.errors[f"{type(error).__name__}: {error.__cause__ or error}"[:100]] += 1
    return pace


def our_worker(job: Job, index: int) -> Pace:  # noqa: ARG001  (both sides are called alike)
    """Run short trials by our worker's own loop until the window ends."""
    pace = Pace(shared=_shared[0])
    place = connect(job.url)
    study = studies.join(place, job.study)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        pace.begin()
        value = pace.run(trial)
        if value is None:
            stopping.request()
            trial.client.let_go(trial.lease)  # raises what parks the trial
        assert value is not None
        return value

    worker_loop.work(study, objective, study.ledger(workers.new_name()), stopping)
    place.close()
    return pace


WORKERS: dict[str, Callable[[Job, int], Pace]] = {OPTUNA: plain_worker, HPO: our_worker}


def throughput(job: Job) -> Result:
    """Count the trials that real processes finish within a window in which all of them are at work."""
    if job.side == OPTUNA:
        optuna.create_study(study_name=job.study, storage=job.url)
    else:
        place = connect(job.url, create=True)
        make_our_study(place, job.study, job.folder)
        place.close()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that the processes do not import one after the other
    shared = Shared(ready=context.Semaphore(0), stop=context.RawValue(ctypes.c_byte, 0))
    with ProcessPoolExecutor(job.workers, mp_context=context, initializer=_share, initargs=(shared,)) as pool:
        running = [pool.submit(_work, job, index) for index in range(job.workers)]
        try:
            _wait_until_ready(shared, running)
            began = time.time()
            time.sleep(job.seconds)
            ended = time.time()
        finally:
            shared.stop.value = 1
        done = [future.result() for future in running]
    return _rates(job, began, ended, done)


def _work(job: Job, index: int) -> tuple[list[Lap], Counter[str]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pace = WORKERS[job.side](job, index)
    return pace.laps, pace.errors


def _wait_until_ready(shared: Shared, running: Sequence[Future[Any]]) -> None:
    """Wait until every process has begun its second trial."""
    deadline = time.monotonic() + READY_SECONDS
    ready = 0
    while ready < len(running):
        ready += shared.ready.acquire(timeout=0.2)
        for future in running:
            if future.done():
                future.result()  # raises what ended it
                raise RuntimeError("a worker ended before the window began")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ready} of {len(running)} workers were at work after {READY_SECONDS} s")


def _rates(job: Job, began: float, ended: float, done: Sequence[tuple[list[Lap], Counter[str]]]) -> Result:
    laps = [1000 * seconds for of_process, _ in done for at, seconds in of_process if began <= at < ended]
    errors: Counter[str] = sum((of_process for _, of_process in done), Counter())
    finished, faults = _look_through(job, began, ended)
    return {
        "per_second": finished / (ended - began),
        "finished": finished,
        "per_second_by_reports": len(laps) / SHORT_STEPS / (ended - began),  # finer where few trials finish
        "errors": dict(errors),
        "faults": faults,
        **percentiles(laps),
    }


def percentiles(milliseconds: Sequence[float]) -> Result:
    """Return the median and the 99th percentile, and how many numbers they are of."""
    if len(milliseconds) < 2:
        return {"p50_ms": math.nan, "p99_ms": math.nan, "n": len(milliseconds)}
    p99 = quantiles(milliseconds, n=100, method="inclusive")[98]
    return {"p50_ms": median(milliseconds), "p99_ms": p99, "n": len(milliseconds)}


def _look_through(job: Job, began: float, ended: float) -> tuple[int, list[str]]:
    """Return how many trials were finished in the window, and what is wrong with the study."""
    engine = _engine(job.url)
    with engine.connect() as connection:
        study_id = _study_id(connection, job.study)
        rows = connection.execute(
            sa.select(trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_complete).where(
                trials.c.study_id == study_id
            )
        ).all()
        ids = [row.trial_id for row in rows if row.state == TrialState.COMPLETE]
        values = _children_of(connection, intermediate_values, study_id, ids)
        params = _children_of(connection, trial_params, study_id, ids)
    engine.dispose()
    first, last = (datetime.fromtimestamp(moment, UTC).replace(tzinfo=None) for moment in (began, ended))
    finished = [row for row in rows if row.state == TrialState.COMPLETE and first <= row.datetime_complete < last]
    numbers = sorted(row.number for row in rows)
    wrong = {
        "trial numbers that are missing or given twice": numbers != list(range(len(numbers))),
        f"COMPLETE trials without {SHORT_STEPS} values": set(values) - {SHORT_STEPS},
        f"COMPLETE trials without {len(FIVE)} parameters": set(params) - {len(FIVE)},
        "FAIL trials": any(row.state == TrialState.FAIL for row in rows),
    }
    return len(finished), [what for what, is_so in wrong.items() if is_so]


def _children_of(connection: sa.Connection, table: sa.Table, study_id: int, ids: Sequence[int]) -> list[int]:
    """Return how many rows of a table hang on each of these trials."""
    counts = (
        sa.select(table.c.trial_id, sa.func.count().label("times"))
        .join(trials, trials.c.trial_id == table.c.trial_id)
        .where(trials.c.study_id == study_id)
        .group_by(table.c.trial_id)
    )
    found = {row.trial_id: row.times for row in connection.execute(counts)}
    return [found.get(trial_id, 0) for trial_id in ids]


# --- report and should_prune in a study with a history ----------------------------------------------------------------


class Timed:
    """An objective that times its reports with the pruner's answer to each."""

    def __init__(self) -> None:
        self.laps: list[list[float]] = []  # milliseconds, by trial

    def __call__(self, trial: optuna.Trial) -> float:
        take = suggesting(trial)
        value = value_of({name: take(name) for name in FIVE})
        laps = []
        for step in range(1, HISTORY_STEPS + 1):
            started = time.perf_counter()
            trial.report(value + 3 / step, step)
            trial.should_prune()
            laps.append(1000 * (time.perf_counter() - started))
        self.laps.append(laps)
        return value

    @property
    def result(self) -> Result:
        """What it took, without the first trial, whose pruner loads the history."""
        return percentiles([lap for laps in self.laps[1:] for lap in laps])


def latency_of_optuna(job: Job) -> Result:
    """Time report + should_prune of trials one after the other."""
    study, timed = plain_study(job, RandomSampler(seed=0)), Timed()
    for _ in range(LATENCY_TRIALS):
        trial = study.ask()
        study.tell(trial, timed(trial))
    return timed.result


def latency_of_hpo(job: Job) -> Result:
    """Time the same in a worker of ours, its second thread at work."""
    study, timed, stopping = studies.join(connect(job.url), job.study), Timed(), StopSignal()

    def objective(trial: LeasedTrial) -> float:
        value = timed(trial)
        if len(timed.laps) == LATENCY_TRIALS:
            stopping.request()
        return value

    worker_loop.work(study, objective, study.ledger(workers.new_name()), stopping)
    if len(timed.laps) != LATENCY_TRIALS:
        raise RuntimeError(f"{len(timed.laps)} of {LATENCY_TRIALS} trials came to their end")
    return timed.result


# --- opening a study with a history -----------------------------------------------------------------------------------


@contextmanager
def opening(job: Job, result: Result) -> Iterator[None]:
    """Time what a process does to know a study's trials, and take its peak of memory; imports come before."""
    optuna.create_study(storage="sqlite:///:memory:")  # Optuna imports half of itself at the first use
    _engine(job.url)  # imports the driver
    gc.collect()
    started, used = time.perf_counter(), time.process_time()
    yield
    result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    result["peak_kb"] = peak_kb()


def peak_kb() -> float:
    """Return the peak of this process's resident memory; getrusage's may be that of the process that started it."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return float(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else float(peak)


def opening_of_optuna(job: Job) -> Result:
    """Open the study and have every trial as Optuna's object."""
    result: Result = {}
    with opening(job, result):
        known = plain_study(job).get_trials(deepcopy=False)
    return result | {"trials": len(known)}


def opening_of_hpo(job: Job) -> Result:
    """Open our storage and have every trial as Optuna's object."""
    result: Result = {}
    with opening(job, result):
        backend = connect(job.url).optuna
        known = backend.get_all_trials(backend.get_study_id_from_name(job.study), deepcopy=False)
    return result | {"trials": len(known)}


def columns_of_hpo(job: Job) -> Result:
    """Open our storage and have every trial as our worker has it, in columns; nothing where there is no such thing yet."""
    result: Result = {}
    with opening(job, result):
        backend: Any = connect(job.url).optuna
        if not hasattr(backend, "columns"):
            return {}
        known = backend.columns(backend.get_study_id_from_name(job.study))
    return result | {"trials": len(known)}


# --- suggestions by TPE from a history --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Suggestions:
    """Suggestions of some trials, and what they took."""

    params: list[dict[str, Any]] = field(default_factory=list)
    suggest_ms: list[float] = field(default_factory=list)  # CPU
    ask_ms: list[float] = field(default_factory=list)  # wall clock, in which a server works too
    asked_at: float = 0.0

    def about_to_ask(self) -> None:
        """Start the clock of asking for a trial."""
        self.asked_at = time.perf_counter()

    def objective(self, trial: optuna.Trial) -> float:
        """Suggest the eight parameters."""
        self.ask_ms.append(1000 * (time.perf_counter() - self.asked_at))
        used = time.process_time()
        params = eight(suggesting(trial))
        self.suggest_ms.append(1000 * (time.process_time() - used))
        self.params.append(params)
        return value_of(params)

    @property
    def result(self) -> Result:
        """The medians without the first trial, which loads the history."""
        warm = {"suggest_ms": median(self.suggest_ms[1:]), "ask_ms": median(self.ask_ms[1:])}
        return warm | {"first_ms": self.suggest_ms[0], "params": self.params}


def suggestions_of_optuna(job: Job) -> Result:
    """Let one TPE sampler for all trials, as users have it, suggest with the seed that our side has for each trial."""
    spec = StudySpec.from_document({**BASE_SPEC, "name": job.study})
    study, found = plain_study(job), dict[str, Any]()
    for group in (False, True):
        sampler = TPESampler(multivariate=True, constant_liar=True, group=group, warn_independent_sampling=False)
        study.sampler = sampler
        suggestions = Suggestions()
        for number in _next_numbers(job):
            sampler._rng.rng.seed(seeds.derive(spec.seed, "sampler", number) % 2**32)
            suggestions.about_to_ask()
            trial = study.ask()
            study.tell(trial, suggestions.objective(trial))
        found[f"group={group}"] = suggestions.result
    return found


def suggestions_of_hpo(job: Job) -> Result:
    """Let our workers' TPE sampler suggest, in trials that our worker runs."""
    place, found = connect(job.url), dict[str, Any]()
    for group in (False, True):
        our = OurWorker.join(place, job.study, sampler={"name": "tpe", "group": group})
        suggestions = Suggestions()
        for _ in _next_numbers(job):
            suggestions.about_to_ask()
            our.run(suggestions.objective)
        found[f"group={group}"] = suggestions.result
    return found


def _next_numbers(job: Job) -> range:
    """Return the numbers of the next trials: a first one and the warm ones."""
    engine = _engine(job.url)
    with engine.connect() as connection:
        of_study = trials.c.study_id == _study_id(connection, job.study)
        last = connection.execute(sa.select(sa.func.max(trials.c.number)).where(of_study)).scalar_one()
    engine.dispose()
    return range(last + 1, last + 2 + WARM_TRIALS)


# --- a look at a study ------------------------------------------------------------------------------------------------


def status_of_optuna(job: Job) -> Result:
    """Time a look at a study that has one new trial: by a bare storage, as the dashboard has it, and by `study.trials`."""
    bare = RDBStorage(job.url)
    study_id = bare.get_study_id_from_name(job.study)
    bare_ms = _refreshes(job, lambda: bare.get_all_trials(study_id, deepcopy=False), 1)
    study = plain_study(job)
    len(study.trials)
    return {"bare_ms": bare_ms, "cached_ms": _refreshes(job, lambda: study.trials, 1)}


def status_of_hpo(job: Job) -> Result:
    """Time the summary that `hpo status` and the live view refresh."""
    look = Look(studies.join(connect(job.url), job.study))
    before = look.finished()
    took = _refreshes(job, look.finished, REFRESHES)
    if look.finished() != before + REFRESHES:
        raise RuntimeError("a summary missed a new trial")
    return {"bare_ms": took, "cached_ms": took}


class Look:
    """Reads a study's summary again and again, each time going on from what was read before."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._reader: Any = status  # whose function for it was `summarize` until 2026-11-24
        self._last: Any = None

    def finished(self) -> int:
        """Read the summary and return how many trials have finished."""
        if hasattr(self._reader, "read"):
            self._last = self._reader.read(self._study, self._last and self._last.past)
            return int(self._last.summary.finished)
        self._last = self._reader.summarize(self._study, self._last)
        return int(self._last.finished)


def _refreshes(job: Job, refresh: Callable[[], object], times: int) -> float:
    """Return the median milliseconds of refreshes, before each of which another process's trial has finished."""
    found = []
    for _ in range(times):
        add_trials(job.url, job.study, 1)
        started = time.perf_counter()
        refresh()
        found.append(1000 * (time.perf_counter() - started))
    return median(found)


TASKS: dict[tuple[str, str], Callable[[Job], Result]] = {
    ("statements", OPTUNA): statements_of_optuna,
    ("statements", HPO): statements_of_hpo,
    ("batched", HPO): batched_statements_of_hpo,
    ("throughput", OPTUNA): throughput,
    ("throughput", HPO): throughput,
    ("latency", OPTUNA): latency_of_optuna,
    ("latency", HPO): latency_of_hpo,
    ("opening", OPTUNA): opening_of_optuna,
    ("opening", HPO): opening_of_hpo,
    ("columns", HPO): columns_of_hpo,
    ("suggest", OPTUNA): suggestions_of_optuna,
    ("suggest", HPO): suggestions_of_hpo,
    ("status", OPTUNA): status_of_optuna,
    ("status", HPO): status_of_hpo,
}


def run(job: Job) -> Result:
    """Do one measurement in this process."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return TASKS[job.task, job.side](job)
