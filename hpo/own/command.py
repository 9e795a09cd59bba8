"""A command as the training of a trial: one call runs the program once, with the trial's values in its words."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import optuna

from hpo.errors import LostLease, Outage, Parked, ProgramError, Unasked
from hpo.own.process import Lines, OutOfMemoryCount, Program
from hpo.own.ranks import Ranks
from hpo.spec import program, seeds, space
from hpo.spec.program import Command, PrintedMetric, Reported
from hpo.spec.study_file import StudySpec

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.1  # how soon an order to the worker is seen, and what `hpo.report` has sent
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL for a program whose trial is over
LINGER_SECONDS = 1.0  # for which what the program has started may print on after its end
CONFIRM_SECONDS = 1.5  # for the worker to hear of a signal that has reached its program too
LAST_LINES = 20  # of the output, in the reason of a failure
SEEDS = 2**31  # every language can hold a seed below this
#: Signals by which a person or the system ends programs. Any other shows a mistake in the program.
FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
#: What `hpo` tells its own processes; the storage's URL holds its password.
NOT_HANDED_ON = ("HPO_STORAGE", "HPO_SQLITE_FILE", "HPO_STARTED_AFRESH", "HPO_SERVER_FOLDER")


class Site(Protocol):
    """Where a trial's program runs, and what goes on around it."""

    folder: Path  # of the program's own checkpoints
    reports: Path  # the file that `hpo.report` writes to
    grace: float  # seconds from SIGTERM to SIGKILL for a program that is to go on later

    def begin(self, words: Sequence[str]) -> None:
        """Make the folder for a program. It is empty unless the program goes on from what lies in it."""

    def known(self) -> dict[int, float]:
        """Return the values of earlier attempts by epoch, if the program goes on after them."""

    def keep(self, output: bytes) -> None:
        """Keep or show what the program has printed."""

    def let_go(self) -> None:
        """Raise the Signal that ends the attempt, if there is one."""

    def start_over(self) -> None:
        """Forget the values of earlier attempts, since the program begins again at its first epoch."""

    def note_unread(self, last: int, first: int) -> None:
        """Note that the program saved epochs whose values nobody read. They lie between these two."""

    def record(self) -> None:
        """Note that the program can go on after the epochs that are reported."""

    def end(self) -> None:
        """End what the program has left running."""


class CommandTraining:
    """A function that trains one trial by a command. `trial.loop` is the Site of the trial."""

    def __init__(self, spec: StudySpec, folder: Path) -> None:
        """Make the training of a study.

        Args:
            spec: a spec with a command.
            folder: the folder of the study file.

        Raises SpecError if there is no such program.
        """
        self._command = Command.parse(spec.command or ())
        self._command.refuse_missing(folder)
        self._metric = PrintedMetric.parse(spec.metric)
        self._spec = spec
        self._folder = folder

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the program to its end. Return its last value.

        Raises TrialPruned if the pruner ends the trial, one of the Signals if the attempt must end, and ProgramError if the
        program fails or gives no value.
        """
        site: Site = trial.loop  # type: ignore[attr-defined]
        values = dict(program.flat(space.suggest(self._spec.tree, trial)))
        own = variables(self._spec, trial, site)
        words, memory = self._command.filled({**values, **own}), OutOfMemoryCount()
        site.begin(words)
        try:
            curve = Curve(trial, site)
            with self._started(words, {**environment(), **own}, site) as running:
                run = Run(running, site, self._metric, curve)
                run.to_its_end()
                refuse_failure(running, run.last_lines, memory, site)
        finally:
            site.end()
        if curve.last is None:
            raise ProgramError(*with_output(f"the program ended without a value: {self._sought}", run.last_lines))
        return curve.last

    def _started(self, words: Sequence[str], environment: Mapping[str, str], site: Site) -> Program | Ranks:
        if self._spec.processes == 1:
            return Program(words, folder=self._folder, environment=environment)
        return Ranks(
            words,
            self._spec.processes,
            folder=self._folder,
            environment=environment,
            keep=site.keep,
            timeout=self._spec.recovery.rank_seconds,
            reports=site.reports,
        )

    @property
    def _sought(self) -> str:
        if self._metric.pattern is not None:
            return f"no line matches metric = '{self._metric.pattern.pattern}'"
        if self._metric.key is not None:
            return f"no line is a JSON object with the key {self._metric.key!r}"
        return "the study file has no metric, and the program did not call hpo.report"


def variables(spec: StudySpec, trial: optuna.Trial, site: Site) -> dict[str, str]:
    """Return the variables that tell a program of its trial."""
    return {
        program.TRIAL: str(trial.number),
        program.STUDY: spec.name,
        program.SEED: str(seeds.of_trial(spec.seed, trial.number, trial.user_attrs) % SEEDS),
        program.CHECKPOINT_DIR: str(site.folder),
        program.REPORTS: str(site.reports),
    }


def environment() -> dict[str, str]:
    """Return the environment that programs share. What Python prints comes at once."""
    found = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
    return {"PYTHONUNBUFFERED": "1", **found, "PATH": program.search_path()}


def refuse_failure(running: Program | Ranks, last_lines: Sequence[str], memory: OutOfMemoryCount, site: Site) -> None:
    """Raise what the end of a program means, unless it ended well.

    If the worker is to end the attempt, that counts and not how the program took the signal. Else this raises Unasked if a
    signal from outside killed the program, and ProgramError for any other failure.
    """
    site.let_go()
    code = running.exit_code
    if code == 0:
        return
    name, last_lines = running.name, running.last_lines or last_lines
    if code is None or code > 0:
        raise ProgramError(*with_output(f"{name} ended with exit code {code}", last_lines))
    deadline = time.monotonic() + CONFIRM_SECONDS
    while time.monotonic() < deadline:
        site.let_go()
        time.sleep(0.05)
    if -code == signal.SIGKILL and memory.has_grown():
        raise ProgramError(*with_output(f"{name} was killed, since the machine ran out of memory", last_lines))
    why = ProgramError(*with_output(f"{name} was killed by {_signal_name(-code)}", last_lines))
    if -code in FROM_OUTSIDE:
        raise Unasked(why.lines[0]) from why
    raise why


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"  # of real time


def with_output(why: str, last_lines: Sequence[str]) -> list[str]:
    """Return the lines of an error: the reason with the last line of the output, then the last lines."""
    if not last_lines:
        return [f"{why}; it printed nothing"]
    return [f"{why}; its last line: {last_lines[-1]}", "its last lines:", *last_lines]


class Curve:
    """The values of a trial. Each epoch's first one counts and is reported."""

    def __init__(self, trial: optuna.Trial, site: Site) -> None:
        self._trial = trial
        self._site = site
        self._earlier = site.known()  # of earlier attempts
        self._own: dict[int, float] = {}
        self.last = self._earlier[max(self._earlier)] if self._earlier else None
        self._has_new = False  # whether this attempt has reported a value

    def add(self, found: Reported) -> bool:
        """Report a value. Return whether the pruner ends the trial. Raises ProgramError for another value of an epoch."""
        return self.report(found) and self._trial.should_prune()

    def report(self, found: Reported) -> bool:
        """Report a value. Return whether it is new. Raises ProgramError for another value of an epoch."""
        epoch = len(self._own) + 1 if found.epoch is None else found.epoch
        if self._earlier and not self._own and epoch <= min(self._earlier):
            log.info("trial %d: the program begins again, at epoch %d", self._trial.number, epoch)
            self._site.start_over()
            self._earlier = {}
        known = self._own.get(epoch, found.value)
        if not _is_same(known, found.value):
            raise ProgramError(
                f"the program gave two values for epoch {epoch}: {known!r}, then {found.value!r} in the line "
                f"{found.line!r}; let metric match only one line of an epoch"
            )
        if epoch in self._own:
            return False
        self._own[epoch] = found.value
        if epoch in self._earlier:
            self._warn_of_another(epoch, found.value)
            return False
        if not self._has_new:
            self._note_unread_before(epoch)
        self.last, self._has_new = found.value, True
        self._trial.report(found.value, epoch)
        if found.epoch is not None:
            self._site.record()
        return True

    def _note_unread_before(self, epoch: int) -> None:
        """Note if values are missing between the earlier attempts and this one's first new epoch.

        The program may have trained on while its worker was stopped, and saved epochs that nobody read.
        """
        known = sorted(self._earlier)
        strides = [after - before for before, after in itertools.pairwise(known)]
        if strides and epoch - known[-1] > max(strides):
            self._site.note_unread(known[-1], epoch)

    def _warn_of_another(self, epoch: int, value: float) -> None:
        if not _is_same(self._earlier[epoch], value):
            log.warning(
                "trial %d: epoch %d gave %r in an earlier attempt and gives %r now; the first one counts",
                self._trial.number,
                epoch,
                self._earlier[epoch],
                value,
            )


def _is_same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)  # nan is nan


class Run:
    """One run of a program, from its first line to its end."""

    def __init__(self, running: Program | Ranks, site: Site, metric: PrintedMetric, curve: Curve) -> None:
        self._program = running
        self._site = site
        self._metric = metric
        self._curve = curve
        self._printed = Lines()
        self._sent = Lines()
        self._read_to = 0  # bytes of the file of `hpo.report`
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def last_lines(self) -> list[str]:
        """The last lines that the program has printed."""
        return list(self._last)

    def to_its_end(self) -> None:
        """Report what the program gives until it ends. Raises what ends it before."""
        try:
            for found in self._values(self._site.let_go):
                if self._curve.add(found):
                    raise optuna.TrialPruned
        except (Parked, Outage):
            self._end_within(self._site.grace, reports=True)
            raise
        except LostLease:  # another worker may be about to run it in the same folder, so it gets no grace
            raise
        except BaseException:
            self._end_within(min(GRACE_SECONDS, self._site.grace))
            raise

    def _end_within(self, grace: float, *, reports: bool = False) -> None:
        """Ask the program to end, and wait for it. After the grace it is left to be killed.

        Args:
            grace: in seconds.
            reports: report what it gives until then, since it will go on after that. The pruner does not end it.
        """
        self._program.terminate()
        for found in self._values(lambda: None, time.monotonic() + grace):
            if reports:
                with suppress(ProgramError):
                    self._curve.report(found)

    def _values(self, look: Callable[[], None], deadline: float = math.inf) -> Iterator[Reported]:
        """Yield what the program gives to its end, and for LINGER_SECONDS more what it has started.

        Args:
            look: called before each wait for output.
            deadline: when to stop even if the program goes on.
        """
        while self._program.exit_code is None:
            if time.monotonic() >= deadline:
                return
            look()
            yield from self._news()
        deadline = time.monotonic() + LINGER_SECONDS
        while self._program.is_open and time.monotonic() < deadline:
            yield from self._news()
        yield from self._printed_values(self._printed.rest())
        yield from self._sent_values()

    def _news(self) -> Iterator[Reported]:
        """Wait for output, LOOK_SECONDS at the longest, and yield the values that have come."""
        chunk = self._program.read(LOOK_SECONDS)
        if chunk:
            self._site.keep(chunk)
        yield from self._printed_values(self._printed.of(chunk))
        yield from self._sent_values()

    def _printed_values(self, lines: Sequence[str]) -> Iterator[Reported]:
        self._last.extend(program.cut(line) for line in lines if line.strip())
        yield from filter(None, map(self._metric.find, lines))

    def _sent_values(self) -> Iterator[Reported]:
        """Yield what `hpo.report` has sent since the last call."""
        with suppress(FileNotFoundError), self._site.reports.open("rb") as file:
            file.seek(self._read_to)
            chunk = file.read()
            self._read_to += len(chunk)
            yield from map(program.of_report, self._sent.of(chunk))
