"""The targets of our storage path, ours and plain Optuna's measured in turn in one run on the same work: a markdown table.

No training anywhere: a trial suggests, reports, asks the pruner and ends, so what is left is storage, sampler and pruner.
Studies whose epochs last seconds feel the latencies only, not the throughput. Each measurement is a fresh process of this
file (`--side`), in turn with the other side's; `storage_sides.py` holds the work of both. The rows:

- statements: SQL statements that a trial of 20 epochs costs, counted; also for 16 trials whose reports one call writes.
- throughput: trials a second that real processes finish, random sampler and median pruner, 10 reports a trial, whatever
  the pruner says; counted within a window in which all processes are past their first trial.
- latency: `report` + `should_prune` in a study with a history and 32 other RUNNING trials.
- opening: from a process with its imports done to all trials known, and the memory that this takes at its peak.
- suggest: eight suggestions by TPE in a conditional space, and `ask`, in a process that knows the history already.
- status: a look at a study with one new trial.

On SQLite, Optuna's side has a file of its own in Optuna's journal mode, ours one in write-ahead mode, which is part of what is
compared. On Postgres both are on one server, and studies with unique names are made and deleted. `$TMPDIR` says where the
SQLite files lie. With the defaults it takes some ten minutes on two cores; progress goes to stderr, the table to stdout.

    python benchmarks/storage.py
    python benchmarks/storage.py --postgres --json storage-postgres.json
    python benchmarks/storage.py --only statements,latency --history 1000 --repeats 1
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import optuna
import psutil
import sqlalchemy as sa

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks and the tests are no packages that are installed

from benchmarks import storage_sides  # noqa: E402  (after the path)
from benchmarks.storage_sides import HPO, OPTUNA, Job, Result  # noqa: E402
from hpo import receipt  # noqa: E402
from hpo.storage import filesystem  # noqa: E402
from hpo.storage.connect import parse_url, plain_url  # noqa: E402
from hpo.storage.redaction import redacted_url  # noqa: E402

SIDES = (OPTUNA, HPO)
RUNNING = 32  # other trials, while the latency is measured
SMALL = 100  # finished trials of the history that the large one is compared with
LIMIT_SECONDS = 900  # for one measurement
POSTGRES_CONNECTIONS = 200  # of a server of our own
PACKAGES = ("optuna", "sqlalchemy", "psycopg")


# --- where both sides work --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A database and the name of a study in it, for one measurement of one side."""

    url: str
    study: str


class Ground(Protocol):
    """Hands out seats, and takes away what was written there."""

    def fresh(self) -> Any:
        """Return a context with a seat whose study is yet to be made."""

    def history(self, side: str, size: int) -> Any:
        """Return a context with a seat that has so many finished trials, as they were made."""

    def close(self) -> None:
        """Delete what is left."""

    @property
    def shown(self) -> str:
        """What it is, for the report."""


class SqliteGround:
    """A file for each measurement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._histories: dict[int, Path] = {}

    @contextmanager
    def fresh(self) -> Iterator[Seat]:
        """Lend the name of a file that is not there."""
        file = self._folder / f"{uuid.uuid4().hex[:12]}.db"
        try:
            yield Seat(url=f"sqlite:///{file}", study="bench")
        finally:
            for left in self._folder.glob(f"{file.name}*"):
                left.unlink()

    @contextmanager
    def history(self, side: str, size: int) -> Iterator[Seat]:
        """Lend a copy; Optuna's in the journal mode that Optuna leaves a file in."""
        if size not in self._histories:
            self._histories[size] = self._folder / f"history-{size}.db"
            url = f"sqlite:///{self._histories[size]}"
            storage_sides.make_history(url, "bench", str(self._folder / "checkpoints"), size)
        with self.fresh() as seat:
            source, copy = sqlite3.connect(self._histories[size]), sqlite3.connect(seat.url.removeprefix("sqlite:///"))
            source.backup(copy)
            copy.execute(f"PRAGMA journal_mode={'DELETE' if side == OPTUNA else 'WAL'}")
            source.close()
            copy.close()
            yield seat

    def close(self) -> None:
        """Do nothing: the folder is taken away as a whole."""

    @property
    def shown(self) -> str:
        kind = filesystem.kind_of(self._folder)
        return f"SQLite {sqlite3.sqlite_version} on {kind}, fsync {fsync_ms(self._folder):.2g} ms"


class PostgresGround:
    """Studies with unique names in one database."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = plain_url(parse_url(url))
        self._folder = folder
        self._histories: dict[int, str] = {}

    @contextmanager
    def fresh(self) -> Iterator[Seat]:
        """Lend a name that no study has."""
        name = f"hpo-bench-{uuid.uuid4().hex[:12]}"
        try:
            yield Seat(url=self._url, study=name)
        finally:
            storage_sides.forget(self._url, name)

    @contextmanager
    def history(self, side: str, size: int) -> Iterator[Seat]:  # noqa: ARG002  (both grounds are called alike)
        """Lend the one study that both sides open, and take away afterwards what was added."""
        if size not in self._histories:
            self._histories[size] = f"hpo-bench-{size}-{uuid.uuid4().hex[:12]}"
            storage_sides.make_history(self._url, self._histories[size], str(self._folder / "checkpoints"), size)
        try:
            yield Seat(url=self._url, study=self._histories[size])
        finally:
            storage_sides.forget(self._url, self._histories[size], beyond=size)

    def close(self) -> None:
        """Delete the histories."""
        for name in self._histories.values():
            storage_sides.forget(self._url, name)

    @property
    def shown(self) -> str:
        engine = sa.create_engine(self._url, poolclass=sa.pool.NullPool)
        with engine.connect() as connection:
            told = {
                setting: connection.exec_driver_sql(f"SHOW {setting}").scalar_one()
                for setting in ("server_version", "fsync", "synchronous_commit")
            }
        return f"Postgres {told.pop('server_version')}, " + ", ".join(f"{key} {value}" for key, value in told.items())


def fsync_ms(folder: Path, times: int = 20) -> float:
    """Return how long it takes to have a written block on the disk: what a commit costs at the least."""
    found = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            found.append(1000 * (time.perf_counter() - started))
    return median(found)


@contextmanager
def postgres_of_our_own() -> Iterator[str]:
    """Run a Postgres that keeps what it commits over a power cut, unlike the tests' one, and return its URL."""
    from tests.support.postgres import PostgresServer

    folder = Path(tempfile.mkdtemp(prefix="hpo-bench-pg-", dir="/tmp"))
    with PostgresServer(folder, max_connections=POSTGRES_CONNECTIONS) as server:
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.write("fsync = on\n")
        server.restart()
        yield server.url


# --- figures, and what is wanted of them ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A number that is to be reached."""

    shown: str
    reached: Callable[[Figure], bool]


def times_better(factor: float) -> Goal:
    """Be so many times better than Optuna."""
    return Goal(shown=f"{factor:g}x", reached=lambda figure: figure.ratio >= factor)


def at_most(limit: float) -> Goal:
    """Stay at or below a number of our own."""
    return Goal(shown=f"<= {limit:g}", reached=lambda figure: median(figure.hpo) <= limit)


def at_least(limit: float) -> Goal:
    """Stay at or above a number of our own."""
    return Goal(shown=f">= {limit:g}", reached=lambda figure: median(figure.hpo) >= limit)


@dataclass(kw_only=True)
class Figure:
    """One line of the table: a number of each side, by repeat."""

    name: str
    unit: str = ""
    optuna: list[float]
    hpo: list[float]
    higher_is_better: bool = False
    has_ratio: bool = True
    floor: Goal | None = None
    aim: Goal | None = None
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times better we are, repeat by repeat."""
        pairs = zip(self.optuna, self.hpo, strict=True)
        return [_over(ours, theirs) if self.higher_is_better else _over(theirs, ours) for theirs, ours in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        if self.floor is None or self.aim is None:
            return "-"
        if self.aim.reached(self):
            return "aim"
        return "floor" if self.floor.reached(self) else "missed"

    @property
    def cells(self) -> list[str]:
        """The line of the table."""
        name = f"{self.name}, {self.unit}" if self.unit else self.name
        ratio = spread(self.ratios, "x") if self.has_ratio else "-"
        goals = [goal.shown if goal else "-" for goal in (self.floor, self.aim)]
        return [name + self.note, spread(self.optuna), spread(self.hpo), ratio, *goals, self.verdict]


def _over(above: float, below: float) -> float:
    if below > 0:
        return above / below
    return math.inf


HEADER = ("what", "plain Optuna", "hpo", "ratio", "floor", "aim", "verdict")


def spread(values: Sequence[float], unit: str = "") -> str:
    """Tell numbers as their median, with the lowest and the highest where they differ."""
    if not values:
        return "-"
    middle, low, high = (f"{short(value)}{unit}" for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def short(value: float) -> str:
    """Tell a number with three digits that count."""
    if not math.isfinite(value):
        return str(value)
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def line(cells: Sequence[str]) -> str:
    """Return one line of a markdown table."""
    return f"| {' | '.join(cells)} |"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    history: int
    workers: tuple[int, ...]
    seconds: float
    repeats: int


@dataclass(kw_only=True)
class Bench:
    """Runs measurements, one after the other, in turn."""

    options: Options
    ground: Ground
    folder: Path
    raw: list[Result] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # of our own side

    def run(self, side: str, task: str, seat: Seat, **more: Any) -> Result:
        """Do one measurement in a process of its own."""
        folder = str(self.folder / "checkpoints")
        job = Job(side=side, task=task, url=seat.url, study=seat.study, folder=folder, **more)
        load = os.getloadavg()[0]
        started = time.monotonic()
        found = measured(job)
        took = time.monotonic() - started
        self.raw.append({"side": side, "task": task, **more, "load_before": load, "took_seconds": took, "found": found})
        told = json.dumps({key: value for key, value in found.items() if not isinstance(value, list | dict)})
        print(f"{took:6.1f} s  {task:11}{side:8}{told}", file=sys.stderr, flush=True)
        return found

    def compare(
        self,
        task: str,
        seat: Callable[[str], Any],
        *,
        repeats: int | None = None,
        prepare: Callable[[Seat], None] = lambda _: None,
        **more: Any,
    ) -> dict[str, list[Result]]:
        """Measure both sides in turn, each first in every second repeat.

        Args:
            seat: returns the context with the seat of a side.
            prepare: done to each seat before its measurement.
        """
        found: dict[str, list[Result]] = {side: [] for side in SIDES}
        for repeat in range(repeats or self.options.repeats):
            for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                with seat(side) as lent:
                    prepare(lent)
                    found[side].append(self.run(side, task, lent, **more))
        return found

    def on_history(self, size: int) -> Callable[[str], Any]:
        """Return what lends a seat with so many finished trials."""
        return lambda side: self.ground.history(side, size)

    def on_nothing(self) -> Callable[[str], Any]:
        """Return what lends a seat without a study."""
        return lambda _: self.ground.fresh()


def measured(job: Job) -> Result:
    """Run a measurement in a fresh process of this file; ChildProcessError with what it said if it fails."""
    command = [sys.executable, str(Path(__file__)), "--side"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "OMP_", "MKL_"))}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=env, text=True, start_new_session=True, **streams) as process:
        try:
            out, said = process.communicate(json.dumps(asdict(job)), timeout=LIMIT_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise ChildProcessError(f"{job.task} of {job.side} ended with exit code {process.returncode}:\n{said[-3000:]}")
    found: Result = json.loads(out.splitlines()[-1])
    return found | ({"said": said.splitlines()[-5:]} if said else {})


def each(results: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return one number of each result."""
    return [float(result[key]) for result in results]


# --- the rows ---------------------------------------------------------------------------------------------------------


def statements(bench: Bench) -> Iterator[Figure]:
    """Count the statements of a trial: exact, so once."""
    found = bench.compare("statements", bench.on_nothing(), repeats=1)
    with bench.ground.fresh() as seat:
        batched = bench.run(HPO, "batched", seat)
    steps, at_once = storage_sides.COUNTED_STEPS, storage_sides.AT_ONCE
    ways = {
        "": found[HPO][0],
        f", epochs of {storage_sides.SLOW_SECONDS} s": found[HPO][0]["slow"],
        f", {at_once} trials at once": batched,
    }
    for way, ours in ways.items():
        yield Figure(
            name=f"SQL statements of a trial of {steps} epochs{way}",
            optuna=each(found[OPTUNA], "statements"),
            hpo=each([ours], "statements"),
            floor=at_most(50),
            aim=at_most(12),
            note=f" (ours and {short(ours['pings'])} pings)" if ours["pings"] else "",
        )


RATES = {8: (5.0, 15.0), 32: (10.0, 30.0)}  # floor and aim by workers


def throughput(bench: Bench) -> Iterator[Figure]:
    """Count trials a second by workers, and look at the tail of the latency and at what more workers bring."""
    by_workers = {}
    for workers in bench.options.workers:
        found = bench.compare("throughput", bench.on_nothing(), workers=workers, seconds=bench.options.seconds)
        by_workers[workers] = found
        floor, aim = (times_better(factor) for factor in RATES[workers]) if workers in RATES else (None, None)
        bench.faults += [f"{workers} workers: {fault}" for one in found[HPO] for fault in one["faults"]]
        yield Figure(
            name=f"{workers} worker{'s' * (workers > 1)}",
            unit="trials/s",
            optuna=each(found[OPTUNA], "per_second"),
            hpo=each(found[HPO], "per_second"),
            higher_is_better=True,
            floor=floor,
            aim=aim,
            note=_troubles(found),
        )
    if 8 in by_workers:
        tails = {side: [one["p99_ms"] / one["p50_ms"] for one in by_workers[8][side]] for side in SIDES}
        yield Figure(
            name="report + should_prune, 8 workers: p99 / p50",
            optuna=tails[OPTUNA],
            hpo=tails[HPO],
            has_ratio=False,
            floor=at_most(10),
            aim=at_most(5),
        )
    if {8, 32} <= by_workers.keys():
        rates = {
            (workers, side): each(by_workers[workers][side], "per_second") for workers in (8, 32) for side in SIDES
        }
        kept = {side: [many / few for many, few in zip(rates[32, side], rates[8, side], strict=True)] for side in SIDES}
        yield Figure(
            name="trials/s of 32 workers / of 8",
            optuna=kept[OPTUNA],
            hpo=kept[HPO],
            has_ratio=False,
            floor=at_least(0.9),
            aim=at_least(0.9),
        )


def _troubles(found: Mapping[str, Sequence[Result]]) -> str:
    """Tell what went wrong on either side, for the name of a row; nothing if nothing did."""
    told = []
    for side in SIDES:
        errors = sum(sum(one["errors"].values()) for one in found[side])
        faults = sorted({fault for one in found[side] for fault in one["faults"]})
        told += [f"{side}: {errors} errors"] if errors else []
        told += [f"{side}: {fault}" for fault in faults]
    return f" ({'; '.join(told)})" if told else ""


def latency(bench: Bench) -> Iterator[Figure]:
    """Time a report with the pruner's answer, beside RUNNING trials."""

    def others_run(seat: Seat) -> None:
        storage_sides.add_trials(seat.url, seat.study, RUNNING, running=True)

    found = bench.compare("latency", bench.on_history(bench.options.history), prepare=others_run)
    for percentile in ("p50", "p99"):
        yield Figure(
            name=f"report + should_prune, {RUNNING} other trials RUNNING: {percentile}",
            unit="ms",
            optuna=each(found[OPTUNA], f"{percentile}_ms"),
            hpo=each(found[HPO], f"{percentile}_ms"),
            floor=times_better(10),
            aim=times_better(50),
        )


def opening(bench: Bench) -> Iterator[Figure]:
    """Time how a process comes to know a study's trials, and see what memory that takes above an empty study's."""
    history = bench.options.history
    full, empty = (bench.compare("opening", bench.on_history(size)) for size in (history, 0))
    columns, no_columns = ([_columns(bench, size) for _ in range(bench.options.repeats)] for size in (history, 0))
    ways = {"as Optuna's trials": (full[HPO], empty[HPO])}
    if all(columns):
        ways["as our worker does (columns)"] = (columns, no_columns)
    for way, (ours, _) in ways.items():
        yield Figure(
            name=f"opening, {way}",
            unit="s",
            optuna=each(full[OPTUNA], "seconds"),
            hpo=each(ours, "seconds"),
            floor=times_better(10),
            aim=times_better(25),
        )
    for way, (ours, nothing) in ways.items():
        yield Figure(
            name=f"peak memory of opening, {way}",
            unit="KB a trial",
            optuna=_kb_a_trial(full[OPTUNA], empty[OPTUNA], history),
            hpo=_kb_a_trial(ours, nothing, history),
            floor=times_better(10),
            aim=Goal(shown="none (<= 0.5)", reached=lambda figure: median(figure.hpo) <= 0.5),
        )


def _columns(bench: Bench, size: int) -> Result:
    with bench.ground.history(HPO, size) as seat:
        return bench.run(HPO, "columns", seat)


def _kb_a_trial(full: Sequence[Result], empty: Sequence[Result], trials: int) -> list[float]:
    base = median(each(empty, "peak_kb"))
    return [(peak - base) / trials for peak in each(full, "peak_kb")]


def suggest(bench: Bench) -> Iterator[Figure]:
    """Time suggestions from a history, see that they are Optuna's, and time `ask` in a short and a long study."""
    history = bench.options.history
    by_size = {size: bench.compare("suggest", bench.on_history(size)) for size in (SMALL, history)}
    for group in ("group=False", "group=True"):
        found = {side: [one[group] for one in by_size[history][side]] for side in SIDES}
        same = all(theirs["params"] == ours["params"] for theirs, ours in zip(found[OPTUNA], found[HPO], strict=True))
        yield Figure(
            name=f"TPE, 8 suggestions, {group}, {'IDENTICAL' if same else 'DIFFERENT'} values",
            unit="CPU ms",
            optuna=each(found[OPTUNA], "suggest_ms"),
            hpo=each(found[HPO], "suggest_ms"),
            floor=times_better(2.5),
            aim=times_better(5),
        )
    asks = {
        (size, side): [one["group=True"]["ask_ms"] for one in by_size[size][side]] for size in by_size for side in SIDES
    }
    for size in by_size:
        yield Figure(name=f"ask at {size:,} trials", unit="ms", optuna=asks[size, OPTUNA], hpo=asks[size, HPO])
    growth = {
        side: [long / brief for long, brief in zip(asks[history, side], asks[SMALL, side], strict=True)]
        for side in SIDES
    }
    yield Figure(
        name=f"ask at {history:,} / at {SMALL:,} trials", optuna=growth[OPTUNA], hpo=growth[HPO], has_ratio=False
    )


def status(bench: Bench) -> Iterator[Figure]:
    """Time a look at a study with one new trial against two ways of Optuna's."""
    found = bench.compare("status", bench.on_history(bench.options.history))
    for way, key in (("RDBStorage, as dashboards have it", "bare_ms"), ("`study.trials`, cached", "cached_ms")):
        yield Figure(
            name=f"status with 1 new trial; Optuna: {way}",
            unit="ms",
            optuna=each(found[OPTUNA], key),
            hpo=each(found[HPO], key),
            floor=times_better(50),
            aim=times_better(500),
        )


ROWS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "statements": statements,
    "throughput": throughput,
    "latency": latency,
    "opening": opening,
    "suggest": suggest,
    "status": status,
}


# --- the command ------------------------------------------------------------------------------------------------------


def setting(bench: Bench, command: str) -> dict[str, Any]:
    """Return what a run's numbers depend on."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": receipt.git_commit(ROOT),
        "cpu": receipt.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "database": bench.ground.shown,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "options": asdict(bench.options),
        "load_before": os.getloadavg()[0],
    }


def told(made_with: Mapping[str, Any]) -> str:
    """Tell a setting in some lines."""
    versions = ", ".join(f"{name} {number}" for name, number in made_with["versions"].items())
    options = made_with["options"]
    head, _, dirty = made_with["commit"].partition("-")
    commit = f"{head[:7]}{' and changes' * bool(dirty)}"
    machine = f"{made_with['cpu']}, {made_with['cores']} cores, {made_with['memory_gb']} GB"
    return (
        f"Medians (lowest-highest), n = {options['repeats']} a side in turn (statements: exact); history of "
        f"{options['history']:,} finished trials x {storage_sides.HISTORY_STEPS} values; throughput over "
        f"{options['seconds']:g} s.\n"
        f"{machine}; {made_with['database']}; {versions}; load {made_with['load_before']:.1f} before; "
        f"{made_with['date']}, commit {commit or 'unknown'}.\n\nCommand: `{made_with['command']}`"
    )


def compare(bench: Bench, rows: Sequence[str]) -> list[Figure]:
    """Measure the rows and print the table as it grows."""
    print(line(HEADER), line(["---"] * len(HEADER)), sep="\n", flush=True)
    figures = []
    for row in rows:
        for figure in ROWS[row](bench):
            figures.append(figure)
            print(line(figure.cells), flush=True)
    return figures


def as_json(figure: Figure) -> dict[str, Any]:
    """Return a figure for a file."""
    names = ("name", "unit", "optuna", "hpo", "note", "verdict")
    ratios = {"ratios": figure.ratios} if figure.has_ratio else {}
    goals = {key: goal.shown if goal else None for key, goal in (("floor", figure.floor), ("aim", figure.aim))}
    return {name: getattr(figure, name) for name in names} | ratios | goals


def numbers(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    found = tuple(int(part) for part in text.split(","))
    if not all(number > 0 for number in found):
        raise ValueError
    return found


def row_names(text: str) -> list[str]:
    """Read names of rows with commas between them."""
    names = text.split(",")
    if unknown := set(names) - ROWS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}")
    return names


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", metavar="URL", help="postgresql://... for both sides; default: a SQLite file each time")
    where.add_argument("--postgres", action="store_true", help="a Postgres of our own (the extra `test` brings it)")
    parser.add_argument("--history", type=int, default=10_000, metavar="N", help="finished trials (default 10000)")
    parser.add_argument("--workers", type=numbers, default=(1, 8, 32), metavar="N,...", help="default 1,8,32")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a throughput run (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--only", type=row_names, default=list(ROWS), metavar="ROW,...", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers here")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)  # one measurement, its Job on stdin
    given = parser.parse_args()
    if given.url and parse_url(given.url).get_backend_name() != "postgresql":
        parser.error("--url: is for postgresql://...; SQLite files are made where $TMPDIR says")
    if given.history < 2 * SMALL:
        parser.error(f"--history: at least {2 * SMALL}, which is compared with {SMALL}")
    return given


def benchmark(given: argparse.Namespace) -> int:
    """Measure what was asked for; 1 if our own side did something wrong."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    if given.url:
        command = command.replace(given.url, redacted_url(parse_url(given.url)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was made is deleted
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="hpo-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url = stack.enter_context(postgres_of_our_own()) if given.postgres else given.url
        ground = PostgresGround(url, folder) if url else SqliteGround(folder)
        stack.callback(ground.close)
        options = Options(history=given.history, workers=given.workers, seconds=given.seconds, repeats=given.repeats)
        bench = Bench(options=options, ground=ground, folder=folder)
        made_with = setting(bench, command)
        started = time.monotonic()
        try:
            figures = compare(bench, given.only)
        except ChildProcessError as error:
            raise SystemExit(str(error)) from None
    print("", told(made_with), f"{(time.monotonic() - started) / 60:.1f} minutes.", sep="\n")
    for fault in bench.faults:
        print(f"WRONG, on our side: {fault}", file=sys.stderr)
    if given.json:
        found = {"figures": [as_json(figure) for figure in figures], "runs": bench.raw}
        given.json.write_text(json.dumps(made_with | found, indent=2) + "\n")
    return int(bool(bench.faults))


def main() -> int:
    """Measure both sides, or be one of them."""
    given = parsed()
    if given.side:
        print(json.dumps(storage_sides.run(Job(**json.load(sys.stdin)))))
        return 0
    return benchmark(given)


if __name__ == "__main__":
    sys.exit(main())
