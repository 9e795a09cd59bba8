"""The demo study by Optuna alone and by `hpo run`, two processes each, in turn: wall clock and seconds per epoch.

Both sides search the space of examples/digits.toml on the same split with the same layers, batch size, optimizer steps,
TPE and median pruner; `plain_optuna.py` is the other side. A run is timed from the start of its commands to the end of the
last, imports included, in a fresh folder. The processes train on the CPU with one torch thread each; `--default-threads`
leaves Optuna's side what torch does by itself, a thread on every core in every process. The split, the samplers and the
models are seeded by the number of the repeat. In Optuna's favour, its tables are made before the clock starts: two
processes that find an empty SQLite file would race for them, and one would fail with 'table already exists'.

Two things differ from examples/digits.toml as it stands: a trial's value is its last epoch's, since that is what Optuna's
example returns; and seed, trials and pruner are the options below. What the pruner cuts differs between the sides by
chance, so compare seconds per epoch, or `--pruner none`, where both train the same number of epochs.

    python benchmarks/vs_optuna.py --repeats 5
    python benchmarks/vs_optuna.py --repeats 5 --pruner none --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import tomli_w
from optuna.distributions import distribution_to_json

from hpo.receipt import processor, versions
from hpo.storage import parse, plain, redacted

HERE = Path(__file__).parent
STUDY_FILE = HERE.parent / "examples" / "digits.toml"
PROCESSES = 2
WARM_UP_TRIALS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OPTUNA, HPO = "optuna", "hpo"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a comparison is made with."""

    trials: int
    pruner: str
    storage: str | None  # None: a SQLite file in each run's own folder
    default_threads: bool  # for Optuna's side


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of one side."""

    side: str
    repeat: int
    seconds: float
    cpu_seconds: float  # of all its processes: the steadier number where others use the machine too
    trials: int
    complete: int
    epochs: int  # trained, over all trials
    best: float
    load_before: float  # the machine's load average (1 min) when the run began; the runs themselves are in it

    @property
    def epochs_per_second(self) -> float:
        return self.epochs / self.seconds


Command = list[str]
Space = frozenset[str]  # the distributions that were drawn from, as Optuna's JSON


def commands_of_optuna(options: Options, url: str, name: str, seed: int, folder: Path) -> list[Command]:  # noqa: ARG001  (both sides are called alike)
    """Return the commands that a user of Optuna alone starts side by side."""
    common = [sys.executable, str(HERE / "plain_optuna.py"), "--storage", plain(parse(url)), "--study", name]
    common += ["--trials", str(options.trials), "--seed", str(seed), "--pruner", options.pruner]
    common += ["--default-threads"] if options.default_threads else []
    return [[*common, "--process", str(process)] for process in range(PROCESSES)]


def commands_of_hpo(options: Options, url: str, name: str, seed: int, folder: Path) -> list[Command]:
    """Write the study file and return the one command of our side."""
    document = tomllib.loads(STUDY_FILE.read_text())
    document |= {"seed": seed, "value": "last"}
    document["budget"]["trials"] = options.trials
    if options.pruner == "none":
        document["pruner"] = {"name": "none"}
    file = folder / "study.toml"
    file.write_text(tomli_w.dumps(document))
    command = [sys.executable, "-P", "-m", "hpo", "run", str(file), "--name", name, "--storage", url]
    return [[*command, "--workers", str(PROCESSES)]]


SIDES: dict[str, Callable[[Options, str, str, int, Path], list[Command]]] = {
    OPTUNA: commands_of_optuna,
    HPO: commands_of_hpo,
}


def run_side(side: str, options: Options, repeat: int) -> tuple[Result, Space]:
    """Run one side once in a fresh folder, and read from its study what it did."""
    with tempfile.TemporaryDirectory(prefix=f"vs-optuna-{side}-") as temporary:
        folder = Path(temporary)
        url, name = options.storage or f"sqlite:///{folder / 'study.db'}", f"{side}-{uuid.uuid4().hex[:8]}"
        commands = SIDES[side](options, url, name, repeat, folder)
        if side == OPTUNA:
            make_study(url, name)
        load = os.getloadavg()[0]
        one_thread = not (side == OPTUNA and options.default_threads)
        try:
            seconds, cpu_seconds = timed(commands, folder, environment(one_thread))
        except ChildProcessError as error:
            raise SystemExit(without_password(str(error), options.storage)) from None
        trials = optuna.load_study(study_name=name, storage=plain(parse(url))).get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    result = Result(
        side=side,
        repeat=repeat,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        trials=len(trials),
        complete=len(complete),
        epochs=sum(len(trial.intermediate_values) for trial in trials),
        best=max(trial.values[0] for trial in complete),
        load_before=load,
    )
    return result, frozenset(distribution_to_json(one) for trial in trials for one in trial.distributions.values())


def make_study(url: str, name: str) -> None:
    """Make the study of Optuna's side ahead, untimed: its processes fail if two of them meet an empty SQLite file."""
    optuna.create_study(study_name=name, storage=plain(parse(url)), direction="maximize")


def environment(one_thread: bool) -> dict[str, str]:
    """Return the environment of a run: no GPU, nothing of ours that the shell happens to set, threads as asked."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "OMP_", "MKL_"))}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | (ONE_THREAD if one_thread else {})


def timed(commands: Sequence[Command], folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Start the commands side by side; return the wall seconds until the last has ended, and the CPU seconds of all.

    ChildProcessError if one fails.
    """
    logs = [folder / f"output-{index}.log" for index in range(len(commands))]
    used, started = cpu_of_children(), time.perf_counter()
    processes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:  # only after a Ctrl-C is there one left
            process.terminate()
    seconds, cpu_seconds = time.perf_counter() - started, cpu_of_children() - used
    for command, code, log in zip(commands, codes, logs, strict=True):
        if code:
            raise ChildProcessError(f"{shlex.join(command)}\nended with exit code {code}:\n{log.read_text()[-3000:]}")
    return seconds, cpu_seconds


def cpu_of_children() -> float:
    """Return the CPU seconds of every process below this one that has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare(options: Options, repeats: int, tell: Callable[[str], None]) -> list[Result]:
    """Run both sides in turn; SystemExit if they turn out not to have searched the same space."""
    for side in SIDES:  # untimed: what is read from the disk for the first time would burden whoever comes first
        run_side(side, Options(**{**asdict(options), "trials": WARM_UP_TRIALS, "pruner": "none"}), 0)
    results, spaces = [], {side: Space() for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES:
            result, space = run_side(side, options, repeat)
            results.append(result)
            spaces[side] |= space
            tell(row(result))
    if spaces[OPTUNA] != spaces[HPO]:
        raise SystemExit(f"the sides drew from different spaces: {sorted(spaces[OPTUNA] ^ spaces[HPO])}")
    return results


HEADER = (
    f"{'side':8}{'repeat':>7}{'wall s':>9}{'CPU s':>8}{'trials':>8}{'complete':>10}{'epochs':>8}"
    f"{'epochs/s':>10}{'best':>9}{'load':>7}"
)


def row(one: Result) -> str:
    """Tell one run in a line under HEADER."""
    return (
        f"{one.side:8}{one.repeat:7d}{one.seconds:9.2f}{one.cpu_seconds:8.2f}{one.trials:8d}{one.complete:10d}{one.epochs:8d}"
        f"{one.epochs_per_second:10.1f}{one.best:9.4f}{one.load_before:7.2f}"
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Tell numbers as their median with the lowest and the highest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(results: Sequence[Result]) -> str:
    """Tell each side's medians, and how many times as long Optuna's side took, repeat by repeat."""
    of_side = {side: [one for one in results if one.side == side] for side in SIDES}
    lines = []
    for side, runs in of_side.items():
        lines.append(
            f"{side:8} wall {spread([one.seconds for one in runs], 2)} s, CPU {spread([one.cpu_seconds for one in runs], 2)} s, "
            f"epochs {spread([one.epochs for one in runs], 0)}, "
            f"{spread([1000 * one.seconds / one.epochs for one in runs], 2)} ms of wall per epoch, "
            f"best {spread([one.best for one in runs], 4)}"
        )
    pairs = list(zip(of_side[OPTUNA], of_side[HPO], strict=True))
    wall = [theirs.seconds / ours.seconds for theirs, ours in pairs]
    per_epoch = [ours.epochs_per_second / theirs.epochs_per_second for theirs, ours in pairs]
    cpu = [theirs.cpu_seconds / ours.cpu_seconds for theirs, ours in pairs]
    lines.append(
        f"ratio    optuna : hpo  wall {spread(wall, 2)}, wall per epoch {spread(per_epoch, 2)}, CPU {spread(cpu, 2)}"
    )
    return "\n".join(lines)


def without_password(text: str, url: str | None) -> str:
    """Return a text with the storage's URL, if it stands there, as it may be shown."""
    return text.replace(url, redacted(parse(url))).replace(plain(parse(url)), redacted(parse(url))) if url else text


def setting(options: Options, repeats: int) -> dict[str, Any]:
    """Return what the numbers were taken with: options, machine, versions, command."""
    return {
        "command": without_password(shlex.join(["python", *sys.orig_argv[1:]]), options.storage),
        "n": repeats,
        "processes": PROCESSES,
        "threads": {OPTUNA: "torch's default" if options.default_threads else 1, HPO: 1},
        "options": asdict(options) | {"storage": options.storage and redacted(parse(options.storage))},
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": versions(),
    }


def main() -> None:
    """Parse the command line, compare, print, and write the raw numbers if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--trials", type=int, default=64, help="trials of a run (default 64)")
    parser.add_argument("--pruner", choices=["median", "none"], default="median")
    parser.add_argument("--storage", metavar="URL", help="database of both sides; default: a new SQLite file per run")
    parser.add_argument("--default-threads", action="store_true", help="leave Optuna's side torch's own thread count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers here")
    given = parser.parse_args()

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = Options(
        trials=given.trials, pruner=given.pruner, storage=given.storage, default_threads=given.default_threads
    )
    made_with = setting(options, given.repeats)
    print(f"{PROCESSES} processes a side; torch threads in each: {made_with['threads']}; {made_with['options']}")
    print(HEADER, flush=True)
    results = compare(options, given.repeats, lambda line: print(line, flush=True))
    print("", report(results), sep="\n")
    shown = ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())
    print(f"medians (lowest-highest), n = {given.repeats}; {made_with['cpu']}, {made_with['cores']} cores; {shown}")
    print(f"command: {made_with['command']}")
    if given.json:
        runs = [asdict(one) | {"epochs_per_second": one.epochs_per_second} for one in results]
        given.json.write_text(json.dumps(made_with | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
