"""Sides run in turn on one task, and what that shows: a line for each run, then medians, spread and ratios.

A run is timed from the start of its first process to the end of its last, imports included, in a fresh folder. Before the
first, each side runs once untimed and tiny, since what is read from the disk for the first time would burden whoever
comes first. Splits, samplers and models are seeded by the number of the repeat.

`reached`: the wall time at which a side first had a complete trial as good as the other's final best in the same repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna

from benchmarks import bench_data, runs, sides, tasks
from benchmarks.runs import Outcome, Result
from benchmarks.sides import Job, Options, Side
from benchmarks.tasks import Task
from hpo.receipt import processor, versions
from hpo.storage.connect import parse_url, plain_url
from hpo.storage.redaction import redacted_url

WARM_UP_TRIALS, WARM_UP_IMAGES = 2, 300


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Who is compared, on what, and how often; the first side is the one that the others are measured against."""

    sides: Mapping[str, Side]
    tasks: Sequence[Task]
    options: Options
    repeats: int
    json: Path | None

    def run(self) -> list[Result]:
        """Compare task by task, print, and write the raw numbers if asked."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        made_with, results = self._setting(), list[Result]()
        print(*made_with["sides"].values(), made_with["options"], sep="\n", flush=True)
        for task in self.tasks:
            print(f"\n{describe(task, self.options)}\n{HEADER}", flush=True)
            of_task = self._compare(task)
            results += of_task
            print(report(of_task, list(self.sides)), flush=True)
            self._write(made_with, results)  # what is known is kept, whatever becomes of the next task
        shown = ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())
        print(f"\nmedians (lowest-highest), n = {self.repeats}; {made_with['hardware']}; {shown}")
        print(f"command: {made_with['command']}")
        return results

    def _write(self, made_with: Mapping[str, Any], results: Sequence[Result]) -> None:
        """Write the raw numbers, if asked."""
        if self.json:
            written = [asdict(one) | {"best": one.best} for one in results]
            self.json.write_text(json.dumps({**made_with, "runs": written}, indent=2) + "\n")

    def _compare(self, task: Task) -> list[Result]:
        """Run the sides in turn; SystemExit if they turn out not to have searched the same space."""
        tiny = task.resized(trials=WARM_UP_TRIALS, epochs=1, images=WARM_UP_IMAGES)
        for name in self.sides:
            self._run_side(name, tiny, replace(self.options, pruner="none"), 0)
        results: list[Result] = []
        spaces: dict[str, frozenset[str]] = {name: frozenset() for name in self.sides}
        for repeat in range(self.repeats):
            for name in self.sides:
                result, outcome = self._run_side(name, task, self.options, repeat)
                results.append(result)
                spaces[name] |= outcome.distributions
                print(row(result), flush=True)
        refuse_different_spaces(spaces)
        return results

    def _run_side(self, name: str, task: Task, options: Options, repeat: int) -> tuple[Result, Outcome]:
        """Run one side once in a fresh folder, and read what it did."""
        side = self.sides[name]
        if task.images:
            bench_data.file(task.data, task.images)  # made now, not while the clock runs
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as temporary:
            folder = Path(temporary)
            url, study = options.storage or f"sqlite:///{folder / 'study.db'}", f"{name}-{uuid.uuid4().hex[:8]}"
            job = Job(task=task, options=options, seed=repeat, folder=folder, url=url, study=study)
            side.prepare(job)
            load = os.getloadavg()[0]
            try:
                timing = runs.timed(side.commands(job), folder, sides.environment(options) | side.environment(job))
            except ChildProcessError as error:
                raise SystemExit(without_password(str(error), options.storage)) from None
            outcome = side.outcome(job)
        result = Result(
            task=task.name,
            side=name,
            repeat=repeat,
            seconds=timing.seconds,
            cpu_seconds=timing.cpu_seconds if side.counts_cpu else None,
            trials=len(outcome.trials),
            complete=sum(one.value is not None for one in outcome.trials),
            epochs=sum(one.epochs for one in outcome.trials),
            maximizes=task.maximizes,
            bests=runs.bests(outcome.trials, timing.started, maximizes=task.maximizes),
            load_before=load,
        )
        return result, outcome

    def _setting(self) -> dict[str, Any]:
        """Return what the numbers are taken with: options, machine, versions, command."""
        storage = self.options.storage
        own_versions = versions()
        for side in self.sides.values():
            own_versions = own_versions | side.versions()
        return {
            "command": without_password(shlex.join(["python", *sys.orig_argv[1:]]), storage),
            "n": self.repeats,
            "sides": {name: str(side) for name, side in self.sides.items()},
            "options": asdict(self.options) | {"storage": storage and redacted_url(parse_url(storage))},
            "hardware": hardware(self.options.gpu),
            "system": platform.platform(),
            "versions": own_versions,
        }


def describe(task: Task, options: Options) -> str:
    """Tell a task in a line."""
    images = f"{task.images:,} images" if task.images else task.data
    return (
        f"{task.name}: {images}, {task.trials} trials of up to {task.epochs} epochs, "
        f"pruner {options.pruner}, sampler {options.sampler}, judged by {task.metric}, {options.processes} processes a side"
    )


def refuse_different_spaces(spaces: Mapping[str, frozenset[str]]) -> None:
    """Raise SystemExit if some side drew from other distributions than the others."""
    everywhere = frozenset.intersection(*spaces.values())
    for name, space in spaces.items():
        if space != everywhere:
            raise SystemExit(f"the sides drew from different spaces; {name} alone or not all: {space - everywhere}")


HEADER = (
    f"{'side':10}{'repeat':>7}{'wall s':>9}{'CPU s':>8}{'trials':>8}{'complete':>10}{'epochs':>8}"
    f"{'epochs/s':>10}{'best':>9}{'load':>7}"
)


def row(one: Result) -> str:
    """Tell one run in a line under HEADER."""
    cpu = "-" if one.cpu_seconds is None else f"{one.cpu_seconds:.2f}"
    return (
        f"{one.side:10}{one.repeat:7d}{one.seconds:9.2f}{cpu:>8}{one.trials:8d}{one.complete:10d}{one.epochs:8d}"
        f"{one.epochs_per_second:10.2f}{one.best:9.4f}{one.load_before:7.2f}"
    )


def report(results: Sequence[Result], names: Sequence[str]) -> str:
    """Tell each side's medians, and how the first one's compare with each other's, repeat by repeat."""
    of_side = {name: [one for one in results if one.side == name] for name in names}
    lines = [medians(name, found) for name, found in of_side.items()]
    rival, *others = names
    for name in others:
        lines += ratios(rival, name, list(zip(of_side[rival], of_side[name], strict=True)))
    return "\n".join(lines)


def medians(name: str, found: Sequence[Result]) -> str:
    """Tell one side's medians in a line."""
    cpu = [one.cpu_seconds for one in found if one.cpu_seconds is not None]
    return (
        f"{name:10} wall {spread([one.seconds for one in found], 2)} s, "
        + (f"CPU {spread(cpu, 2)} s, " if cpu else "")
        + f"epochs {spread([one.epochs for one in found], 0)}, "
        f"{spread([1000 * one.seconds / one.epochs for one in found], 2)} ms of wall per epoch, "
        f"complete {spread([one.complete for one in found], 0)}, best {spread([one.best for one in found], 4)}"
    )


Pairs = Sequence[tuple[Result, Result]]  # the rival's and the other's of the same repeat


def ratios(rival: str, name: str, pairs: Pairs) -> list[str]:
    """Tell how many times as long the rival took, and who reached whose best when."""
    wall = [theirs.seconds / ours.seconds for theirs, ours in pairs]
    per_epoch = [ours.epochs_per_second / theirs.epochs_per_second for theirs, ours in pairs]
    cpu = [a.cpu_seconds / b.cpu_seconds for a, b in pairs if a.cpu_seconds is not None and b.cpu_seconds is not None]
    line = f"ratio      {rival} : {name}  wall {spread(wall, 2)}, wall per epoch {spread(per_epoch, 2)}"
    return [
        line + (f", CPU {spread(cpu, 2)}" if cpu else ""),
        reached(name, rival, [(ours, theirs) for theirs, ours in pairs]),
        reached(rival, name, pairs),
    ]


def reached(one: str, other: str, pairs: Pairs) -> str:
    """Tell when the first of each pair reached the second's final best, and when the second itself did."""
    firsts = [mine.reaching(theirs.best) for mine, theirs in pairs]
    found = [first.seconds for first in firsts if first is not None]
    themselves = [first.seconds for _, theirs in pairs if (first := theirs.reaching(theirs.best)) is not None]
    seconds = f"after {spread(found, 2)} s" if found else "never"
    return f"reached    {one}, {other}'s best: {seconds}, in {len(found)} of {len(pairs)} runs" + (
        f"; {other} itself after {spread(themselves, 2)} s" if themselves else ""
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Tell numbers as their median with the lowest and the highest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def hardware(gpu: bool) -> str:
    """Tell the machine in a few words."""
    words = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    if not gpu:
        return words
    import torch  # here: a comparison on the CPU does without

    return f"{torch.cuda.get_device_name(0)}, {words}"


def without_password(text: str, url: str | None) -> str:
    """Return a text with the storage's URL, if it stands there, as it may be shown."""
    return (
        text.replace(url, redacted_url(parse_url(url))).replace(plain_url(parse_url(url)), redacted_url(parse_url(url)))
        if url
        else text
    )


def parser(
    description: str | None, *, chosen: Sequence[str], pruners: Sequence[str], metrics: Sequence[str] = tasks.METRICS
) -> argparse.ArgumentParser:
    """Return the command line that all comparisons have in common."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    known = list(tasks.STUDY_FILES)
    made.add_argument("--task", nargs="+", choices=known, default=list(chosen), help=f"default: {' '.join(chosen)}")
    made.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    tasks.add_sizes(made)
    made.add_argument("--metric", choices=metrics, help="what is judged; default: the task's own")
    made.add_argument("--pruner", choices=pruners, default="asha", help="of both sides (default asha)")
    made.add_argument("--sampler", choices=list(tasks.SAMPLERS), default="tpe", help="of both sides (default tpe)")
    made.add_argument("--slots", type=number_or_word, help="for our side: trials at once in a worker, or auto")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers here")
    return made


def number_or_word(text: str) -> int | str:
    """Read a number, or leave a word as it is."""
    return int(text) if text.isdigit() else text


def options_of(given: argparse.Namespace, **more: Any) -> Options:
    """Return the options that the common command line says, and more."""
    return Options(pruner=given.pruner, sampler=given.sampler, slots=given.slots, **more)


def tasks_of(given: argparse.Namespace, trials: Mapping[str, int] = tasks.TRIALS) -> list[Task]:
    """Return the tasks that the common command line names; `trials` by task where it says none."""
    return [tasks.chosen(argparse.Namespace(**vars(given) | {"task": name}), trials) for name in given.task]
