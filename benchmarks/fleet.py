"""Hundreds of simulated workers on one Postgres through pgbouncer, with our real statements: a markdown table.

Nothing is trained. Each worker is a real `QueueClient` with a `Reaper`: it claims, writes the suggested parameters of a
recorded trial, reports its recorded curve epoch by epoch, ends it and claims again. Beside that it does the heartbeat's
duties each second. The workers live in a few driver processes and take turns on their threads. They hold as many client
connections as real workers would, two each.

- start: all workers claim at one instant. Claims a second, and how long one takes.
- run: the fleet at work until the budget is spent. Calls a second, latencies, CPU of the server and of the pooler.
- cost: CPU of the server for one call, of one caller at a time, with so many trials RUNNING.
- exact: trials, attempts and reports are counted at the end. A lost trial, a second attempt or a missing report ends the
  benchmark with an error.

On a machine with fewer cores than drivers the latencies are those of the machine. The CPU figures are not.

    python benchmarks/fleet.py
    python benchmarks/fleet.py --workers 64 --epochs 3 --epoch-seconds 2
    python benchmarks/fleet.py --cost 1000,10000
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks and the tests are no packages that are installed

from hpo.lab import table  # noqa: E402  (after the path)
from hpo.queue.claiming import Idle, claim_many  # noqa: E402
from hpo.queue.finish import End  # noqa: E402
from hpo.queue.ledger import Ledger  # noqa: E402
from hpo.queue.reaper import Reaper  # noqa: E402
from hpo.queue.report import Report  # noqa: E402
from hpo.queue.start import SuggestedParams  # noqa: E402
from hpo.spec.study_file import StudySpec  # noqa: E402
from hpo.storage import engine, sql  # noqa: E402
from hpo.storage.connect import Storage, connect, parse_url, plain_url  # noqa: E402
from hpo.storage.retry import Retry  # noqa: E402
from hpo.storage.tables import hpo_trials, intermediate_values, trials  # noqa: E402
from hpo.study import study as studies  # noqa: E402
from hpo.study.study import Study  # noqa: E402
from hpo.worker.client import ClaimRequest, QueueClient  # noqa: E402
from hpo.worker.lease import Lease  # noqa: E402
from hpo.worker.signals import StopSignal  # noqa: E402

CURVES = ROOT / "benchmarks" / "tables" / "mlp.npz"
THREADS = 16  # of one driver: how many of its workers call at one instant
TICK_SECONDS, IDLE_SECONDS = 1.0, 2.0  # as a worker's heartbeat, and its longest pause between claims
WITH_LIMITS = "pooled, limits of the role"
SERVER_CONNECTIONS = 20  # of the pooler
COST_CALLS, READERS = 200, 20
DRAWING = threading.Lock()  # the workers of a driver share its recorded trials


# --- one worker -------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker without a training: what it holds, and when it acts next."""

    client: QueueClient
    rows: Iterator[table.Row]  # recorded trials
    epochs: int
    epoch_seconds: float
    reaper: Reaper = field(init=False)
    lease: Lease | None = None
    row: table.Row | None = None
    epoch: int = 0
    is_done: bool = False

    def __post_init__(self) -> None:
        self.reaper = Reaper(self.client.ledger)

    def advance(self, timed: Callable[[str, Callable[[], Any]], Any]) -> float | None:
        """Claim, report or end. Return after how many seconds it acts next, None if nothing is left."""
        if self.lease is None:
            found = timed("claim", lambda: self.client.claim(ClaimRequest(count=1)))
            if isinstance(found, Idle):
                self.is_done = found is Idle.DONE
                return None if self.is_done else IDLE_SECONDS
            (self.lease,), self.epoch = found, 0
            with DRAWING:
                self.row = next(self.rows)
            timed("suggest", lambda: self.client.write_suggested([suggested(self.lease, self.row)]))
            return self.epoch_seconds
        assert self.row is not None
        self.epoch += 1
        value = self.row.curve[min(self.epoch, len(self.row.curve)) - 1]
        report = Report(claim=self.lease.claim, step=self.epoch, value=value, metrics={"loss": value})
        timed("report", lambda: self.client.report([report]))
        if self.epoch < self.epochs:
            return self.epoch_seconds
        timed("metrics", lambda: self.client.flush(self.lease))
        end = End(claim=self.lease.claim, state=TrialState.COMPLETE, value=value, outcome="complete")
        lost = timed("finish", lambda: self.client.finish([end]))
        assert not lost, f"trial {self.lease.claim.number} was lost"
        self.client.held.remove(self.lease)
        self.lease = None
        return 0.0

    def beat(self, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
        """Do the heartbeat's duties."""
        client = self.client
        if client.upkeep.is_to_be_renewed:
            timed("renew", client.upkeep.renew)
        timed("send", client.send if client.calls.is_cut_off else client.send_metrics)
        if client.held.leases:
            timed("orders", client.upkeep.poll_commands)
        if client.has_doubled_a_study:
            timed("analyze", client.refresh_statistics)
        if self.reaper.is_due:
            timed("stamp and reap", self.reaper)


def suggested(lease: Lease | None, row: table.Row | None) -> SuggestedParams:
    assert lease is not None
    assert row is not None
    params = [
        {"param_name": name, "param_value": value, "distribution_json": distribution_to_json(row.space[name])}
        for name, value in zip(row.space, row.params, strict=True)
    ]
    return SuggestedParams(claim=lease.claim, params=params, attributes=[])


# --- one driver: many workers on a few threads ------------------------------------------------------------------------


def drive(job: dict[str, Any]) -> None:
    """Be one driver process. It says when its connections are open, and waits for a line before it starts."""
    from hpo.queue import workers

    count = job["workers"]
    url = parse_url(job["url"])
    arguments = engine.arguments(url) | {"pool_size": engine.POOL_SIZE * count, "max_overflow": 0}
    opened = sa.create_engine(plain_url(url), **arguments)
    held = [opened.connect() for _ in range(engine.POOL_SIZE * count)]
    for one in held:
        one.close()
    fleet = []
    rows = itertools.cycle(row for row in table.load(CURVES).rows if row.curve)
    for place in range(count):
        ledger = Ledger(
            engine=opened,
            study_id=job["study_id"],
            uid=job["uid"],
            worker=f"{job['driver']}:{place}",
            lease_seconds=60.0,
        )
        workers.register(ledger)
        client = QueueClient(ledger, Retry(600.0), StopSignal())
        fleet.append(Worker(client, rows, job["epochs"], job["epoch_seconds"]))
    print("ready", flush=True)
    sys.stdin.readline()
    Path(job["answer"]).write_text(json.dumps(Turns(fleet).run()))
    opened.dispose()


class Turns:
    """Lets workers act when they are due, and times each call."""

    def __init__(self, fleet: list[Worker]) -> None:
        now = time.monotonic()
        self._began = now
        self._order = itertools.count()
        self._due: list[tuple[float, int, Worker, bool]] = []
        for place, worker in enumerate(fleet):
            heapq.heappush(self._due, (now, next(self._order), worker, True))
            beat = now + TICK_SECONDS * (1 + place / len(fleet))
            heapq.heappush(self._due, (beat, next(self._order), worker, False))
        self._left = len(fleet)
        self._ready = threading.Condition()
        self._took: dict[str, list[float]] = defaultdict(list)
        self._started: list[float] = []  # when each of the first claims was answered

    def run(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self._turn) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"took": self._took, "started": self._started, "seconds": time.monotonic() - self._began}

    def _turn(self) -> None:
        while (taken := self._next()) is not None:
            worker, acts = taken
            after: float | None = TICK_SECONDS
            if acts:
                is_first = worker.row is None
                after = worker.advance(self._timed)
                if is_first and worker.row is not None:
                    self._started.append(time.monotonic() - self._began)
            elif worker.is_done:
                after = None
            else:
                worker.beat(self._timed)
            with self._ready:
                if after is not None:
                    heapq.heappush(self._due, (time.monotonic() + after, next(self._order), worker, acts))
                elif acts:
                    self._left -= 1
                self._ready.notify_all()

    def _next(self) -> tuple[Worker, bool] | None:
        with self._ready:
            while self._left:
                wait = self._due[0][0] - time.monotonic() if self._due else 1.0
                if wait <= 0:
                    _, _, worker, acts = heapq.heappop(self._due)
                    return worker, acts
                self._ready.wait(min(wait, 0.5))
            return None

    def _timed(self, what: str, do: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        answer = do()
        self._took[what].append(time.perf_counter() - began)
        return answer


# --- a fleet ----------------------------------------------------------------------------------------------------------


def make_study(place: Storage, name: str, budget: int) -> Study:
    document = {
        "name": name,
        "objective": "fleet.py:objective",
        "direction": "minimize",
        "budget": {"trials": budget},
        "sampler": {"name": "random"},
        "pruner": {"name": "none"},
        "checkpoints": tempfile.mkdtemp(),
    }
    return studies.create_or_join(place, StudySpec.from_document(document), code_folder=ROOT, code_digest="")


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process and of its children, those that have ended included."""
    process = psutil.Process(pid)
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children())]
    return float(sum(one.user + one.system for one in times) + times[0].children_user + times[0].children_system)


def run_fleet(url: str, pids: tuple[int, int], options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Let so many workers spend a budget of two trials each, and count everything afterwards."""
    place, budget = connect(url, create=True), options.trials * count
    study = make_study(place, f"fleet {count}", budget)
    drivers, folder = [], Path(tempfile.mkdtemp())
    for driver in range(options.drivers):
        share = count // options.drivers + (driver < count % options.drivers)
        job = {"url": url, "study_id": study.study_id, "uid": study.uid, "workers": share, "driver": driver}
        job |= {"epochs": options.epochs, "epoch_seconds": options.epoch_seconds, "answer": f"{folder}/{driver}"}
        command = [sys.executable, __file__, "--drive", json.dumps(job)]
        drivers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for one in drivers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    before = [cpu_of(pid) for pid in pids]
    for one in drivers:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    server_connections = 0
    while any(one.poll() is None for one in drivers):
        with sql.reading(place.engine) as connection:
            used = sa.text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
            server_connections = max(server_connections, connection.execute(used).scalar_one())
        time.sleep(0.5)
    assert [one.returncode for one in drivers] == [0] * len(drivers)
    answers = [json.loads((folder / str(driver)).read_text()) for driver in range(options.drivers)]
    shutil.rmtree(folder)
    seconds = max(answer["seconds"] for answer in answers)
    server, pooler = (cpu_of(pid) - was for pid, was in zip(pids, before, strict=True))
    check_exact(place, study, budget, options.epochs)
    place.close()
    history = read_history(url, pids[0], study.name)
    took = {what: sorted(one for answer in answers for one in answer["took"].get(what, [])) for what in WHATS}
    started = sorted(moment for answer in answers for moment in answer["started"])
    return {
        "workers": count,
        "trials": budget,
        "connections": f"{engine.POOL_SIZE * count} to {server_connections}",
        "claims a second at the start": len(started) / started[-1],
        "calls a second": sum(map(len, took.values())) / seconds,
        "server CPU, cores": server / seconds,
        "pooler CPU, cores": pooler / seconds,
        "server CPU ms to read 1,000 finished trials": 1000 * history / budget * 1000,
        "server CPU ms a call": 1000 * server / sum(map(len, took.values())),
        **{f"{what} p50 / p99 ms": f"{at(found, 0.5)} / {at(found, 0.99)}" for what, found in took.items() if found},
    }


def read_history(url: str, pid: int, name: str) -> float:
    """Return the server's CPU seconds for a worker that reads all trials of a study, as a sampler does once."""
    before = cpu_of(pid)
    for _ in range(READERS):
        place = connect(url)
        assert studies.join(place, name).optuna.get_trials(deepcopy=False)
        place.close()
    return (cpu_of(pid) - before) / READERS


WHATS = ("claim", "suggest", "report", "metrics", "finish", "orders", "renew", "analyze", "stamp and reap")


def at(found: list[float], share: float) -> str:
    return f"{1000 * found[min(len(found) - 1, int(share * len(found)))]:.0f}"


def check_exact(place: Storage, study: Study, budget: int, epochs: int) -> None:
    """Raise AssertionError unless each trial of the budget ran once and is whole."""
    with sql.reading(place.engine) as connection:
        mine = trials.c.study_id == study.study_id
        states = Counter(connection.execute(sa.select(trials.c.state).where(mine)).scalars())
        assert states == {TrialState.COMPLETE: budget}, states
        numbers = sorted(connection.execute(sa.select(trials.c.number).where(mine)).scalars())
        assert numbers == list(range(budget)), "numbers"
        ours = sa.select(hpo_trials.c.attempt).where(hpo_trials.c.study_uid == study.uid)
        attempts = Counter(connection.execute(ours).scalars())
        assert attempts == {1: budget}, attempts
        joined = intermediate_values.join(trials, trials.c.trial_id == intermediate_values.c.trial_id)
        reports = connection.execute(sa.select(sa.func.count()).select_from(joined).where(mine)).scalar_one()
        assert reports == budget * epochs, reports


# --- the cost of one call ---------------------------------------------------------------------------------------------


def costs(url: str, pid: int, running: int, name: str) -> dict[str, float]:
    """Return the server's CPU milliseconds of one call, with so many trials RUNNING that were just made."""
    place = connect(url, create=True)
    study = make_study(place, f"{name} {running}", running + 2 * COST_CALLS)
    others = study.ledger("others")
    for _ in range(running // 100):
        claim_many(others, 100)
    client = QueueClient(study.ledger("w"), Retry(60.0), StopSignal())
    leases: list[Lease] = []

    def claim() -> None:
        found = client.claim(ClaimRequest(count=1))
        assert not isinstance(found, Idle)
        leases.extend(found)

    steps = itertools.count(1)
    cost = {"first claim": per_call(pid, claim)}
    client.refresh_statistics()  # as a heartbeat does
    cost["claim"] = per_call(pid, claim)
    one = leases[0]
    for lease in leases[1:]:
        client.held.remove(lease)
    cost["report"] = per_call(
        pid, lambda: client.report([Report(claim=one.claim, step=next(steps), value=1.0, metrics={})])
    )
    cost["orders"] = per_call(pid, client.upkeep.poll_commands)
    cost["renew"] = per_call(pid, client.upkeep.renew)
    cost["stamp and reap"] = per_call(pid, Reaper(client.ledger))
    ends = iter([End(claim=i.claim, state=TrialState.COMPLETE, value=1.0, outcome="complete") for i in leases])
    cost["finish"] = per_call(pid, lambda: client.finish([next(ends)]))
    place.close()
    return cost


def give_limits(direct: str) -> None:
    """Give the role our time limits, and end its connections, which have none."""
    place = connect(direct, create=True)
    with place.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        for limit, value in engine.LIMITS.items():
            connection.exec_driver_sql(f"ALTER ROLE CURRENT_USER SET {limit} = {value}")
        mine = "usename = current_user AND pid <> pg_backend_pid()"
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")
    place.close()


def per_call(pid: int, do: Callable[[], Any]) -> float:
    before = cpu_of(pid)
    for _ in range(COST_CALLS):
        do()
    return 1000 * (cpu_of(pid) - before) / COST_CALLS


# --- the benchmark ----------------------------------------------------------------------------------------------------


@contextmanager
def servers() -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Start a Postgres and a pgbouncer. Yields both URLs and both process ids."""
    from tests.engines.pooler import pooler
    from tests.support.postgres import PostgresServer

    folder = Path(tempfile.mkdtemp(prefix="hpo-fleet-", dir="/tmp"))
    folder.chmod(0o755)
    with (
        PostgresServer(folder, max_connections=SERVER_CONNECTIONS + 10) as server,
        pooler(server, server_connections=SERVER_CONNECTIONS, clients=5000) as front,
    ):
        yield server.url, front.url, (server.pid, front.process.pid)


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=numbers, default=[64, 256, 1000])
    parser.add_argument("--cost", type=numbers, default=[0, 1000, 10_000], help="numbers of RUNNING trials")
    parser.add_argument("--drivers", type=int, default=3)
    parser.add_argument("--trials", type=int, default=2, help="of each worker, on average")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--epoch-seconds", type=float, default=10.0)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(json.loads(options.drive))
        return
    with servers() as (direct, pooled, pids):
        for name, url in (("direct", direct), ("pooled", pooled), (WITH_LIMITS, pooled)):
            if name == WITH_LIMITS:
                give_limits(direct)
            for running in options.cost:
                cost = costs(url, pids[0], running, name)
                row = "  ".join(f"{what} {spent:.2f}" for what, spent in cost.items())
                print(f"server CPU ms a call, {running} RUNNING, {name}: {row}", flush=True)
        for count in options.workers:
            print(json.dumps(run_fleet(pooled, pids, options, count), indent=1), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
