"""One replay: workers of different speeds train recorded trials in simulated seconds.

A study in memory holds what a worker's study would hold. Each simulated worker has a stack of trials, one by default. After
an epoch all trials of a stack report. Then trials that are through or diverged end. The pruner decides on all others at once.
Free places are filled as in `hpo.worker.stacked_runner`. The sampler proposes the parameters of each new trial. The nearest
unused row of the table stands for the proposal, and the study gets the row's own parameters.

A worker that claims K trials lets the sampler propose all of them from one look, in which each sees the ones before it. Here
they begin one after the other. No time passes between them, so each sees the same history and the ones before it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from hpo.lab.asking import Asking
from hpo.lab.plan import Plan
from hpo.lab.pool import Match, Pool
from hpo.lab.table import Ending, Row
from hpo.queue import start
from hpo.queue.models import Claim
from hpo.queue.start import SuggestedParams
from hpo.spec import seeds
from hpo.storage import memory, sql
from hpo.storage.optuna_private import (
    ExtensibleTrial,
    as_in_optimize,
    bracket_of,
    id_of,
    look_anew,
    stop_was_requested,
)
from hpo.storage.tables import DIVERGED_KEY, utc
from hpo.storage.trial_rows import TrialRow
from hpo.strategy import array_pruners, pruners, samplers
from hpo.strategy.samplers import Sampler

SPEEDS = (0.5, 2.0)  # of workers, relative to the recorded seconds


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A new best value in a replay."""

    epochs: int  # trained by all workers
    seconds: float  # simulated
    value: float


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How a replayed trial ended."""

    number: int  # of the row
    state: TrialState
    epochs: int  # trained
    is_unknown: bool = False  # it was kept beyond the end of its curve, which was cut off
    is_diverged: bool = False  # as recorded, or by the divergence guard


@dataclass(kw_only=True)
class Course:
    """What happened in a replay."""

    epochs: int = 0  # trained by all workers
    seconds: float = 0.0  # simulated
    bests: list[Moment] = field(default_factory=list)  # each better than all before
    ends: list[TrialEnd] = field(default_factory=list)  # in the order in which trials ended
    distances: list[float] = field(default_factory=list)  # from each proposal to its row
    strays: int = 0  # proposals whose branch had no unused row
    sampler_seconds: float = 0.0  # CPU time
    pruner_seconds: float = 0.0  # CPU time

    def note(self, value: float, sign: float) -> None:
        """Note a value that is better than all before. `sign`: the factor, 1 or -1, after which higher values are better."""
        if math.isfinite(value) and (not self.bests or sign * value > sign * self.bests[-1].value):
            self.bests.append(Moment(epochs=self.epochs, seconds=self.seconds, value=value))


@dataclass(eq=False, kw_only=True)
class _Running:
    """A trial that a simulated worker trains, or that is parked."""

    trial: ExtensibleTrial
    row: Row
    sampler: Sampler
    epochs: int = 0
    has_ended: bool = False

    @property
    def is_at_its_end(self) -> bool:
        """Whether the whole curve is trained."""
        return self.epochs == len(self.row.curve)


def run(plan: Plan, seed: int) -> Course:
    """Replay once.

    Args:
        plan: what to replay.
        seed: of the sampler and of the workers' speeds.
    """
    return _Replay(plan, seed).run()


def speeds(workers: int, seed: int) -> list[float]:
    """Return the speeds of simulated workers, relative to the recorded seconds."""
    draw = random.Random(seeds.derive(seed, "speeds"))
    low, high = map(math.log, SPEEDS)
    return [math.exp(draw.uniform(low, high)) for _ in range(workers)]


class _Replay:
    def __init__(self, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._table = plan.table
        # Derived, so that no replay draws the numbers with which the table was recorded.
        self._spec = plan.spec.model_copy(update={"seed": seeds.derive(seed, "replay")})
        self._storage = memory.storage()
        name = plan.table.name if plan.keeps_order else f"{plan.table.name}-{seed}"  # it decides Hyperband's brackets
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction=plan.spec.direction,
            sampler=samplers.build(self._spec, 0),
            pruner=pruners.build(self._spec),
        )
        self._study_id = id_of(self._study)
        self._speeds = speeds(plan.workers, seed)
        self._pool = Pool(plan.table, plan.table.whole)
        self._asking = Asking(plan.table)
        self._grid_points = samplers.grid_size(self._spec)
        self._waiting: list[_Running] = []  # parked until a stack of their key is open, by number
        self._begun = 0
        self._course = Course()

    def run(self) -> Course:
        """Let all workers train until the budget is spent or no trial is left."""
        queue = [(0.0, worker) for worker in range(self._plan.workers)]  # the next moment of each worker
        stacks: list[list[_Running]] = [[] for _ in queue]
        while queue:
            now, worker = heapq.heappop(queue)
            stack = stacks[worker]
            if self._is_beyond_the_budget(stack):
                break
            self._course.seconds = now
            self._train(stack)
            self._fill(stack)
            if stack:
                seconds = max(running.row.seconds for running in stack)  # the slowest decides
                heapq.heappush(queue, (now + seconds / self._speeds[worker], worker))
        return self._course

    def _is_beyond_the_budget(self, stack: Sequence[_Running]) -> bool:
        return self._plan.epochs is not None and self._course.epochs + len(stack) > self._plan.epochs

    # --- trials begin -----------------------------------------------------------------------------------------------

    def _fill(self, stack: list[_Running]) -> None:
        """Fill the free places of a stack. The first trial decides which others may come. Those that may not are parked."""
        while (wanted := self._plan.slots - len(stack) if stack else 1) and (claimed := self._claim(stack, wanted)):
            for running in claimed:
                (stack if _fits(running, stack) else self._waiting).append(running)

    def _claim(self, stack: Sequence[_Running], wanted: int) -> list[_Running]:
        """Return parked trials that may join a stack, then new ones, as `claim_many` does. At most `slots` trials are parked."""
        claimed = [running for running in self._waiting if _fits(running, stack)][:wanted]
        self._waiting = [running for running in self._waiting if running not in claimed]
        room = wanted - len(claimed)
        if stack:
            room = min(room, self._plan.slots - len(self._waiting))
        return [*claimed, *itertools.islice(iter(self._next, None), max(room, 0))]

    def _next(self) -> _Running | None:
        """Begin the next trial that trains; None if there is none. Recorded trials without a curve end at once."""
        while self._has_more:
            begun = self._begin()
            if begun.row.curve:
                return begun
            self._end(begun, _own_state(begun.row))
        return None

    @property
    def _has_more(self) -> bool:
        if self._plan.keeps_order:
            return self._begun < len(self._table.rows)
        if self._begun == self._grid_points:
            return False  # a worker begins no trial when every point is dealt out
        return bool(len(self._pool)) and not stop_was_requested(self._study)

    def _begin(self) -> _Running:
        number, self._begun = self._begun, self._begun + 1
        trial_id = self._storage.create_new_trial(self._study_id)
        self._storage.prime(
            self._study_id, TrialRow(trial_id, number, TrialState.RUNNING, started=utc(), completed=None)
        )
        sampler = samplers.build(self._spec, number)
        with self._timed_sampler(sampler), self._storage.deferred_writes(trial_id) as given:
            trial = ExtensibleTrial(self._study, trial_id)
            row = self._table.rows[number] if self._plan.keeps_order else self._proposed(trial)
        attributes = [] if self._plan.keeps_order else list(given.attributes.values())
        told = SuggestedParams(
            claim=Claim(trial_id=trial_id, number=number, attempt=1), params=_params(row), attributes=attributes
        )
        with sql.writing(self._storage.engine) as connection:
            start.write_suggested(connection, [told])
        trial.cached.params, trial.cached.distributions = row.external, dict(row.space)
        return _Running(trial=trial, row=row, sampler=sampler)

    def _proposed(self, trial: ExtensibleTrial) -> Row:
        """Return the row that stands for what the sampler proposes."""
        match: Match = self._pool.take(self._asking.ask(trial, trial.cached))
        self._course.distances.append(match.distance)
        self._course.strays += not match.is_of_branch
        return self._table.rows[match.place]

    @contextmanager
    def _timed_sampler(self, sampler: Sampler) -> Iterator[None]:
        """Give the study a trial's sampler, as a worker does, and count its CPU time."""
        began = time.process_time()
        self._study.sampler = sampler
        with as_in_optimize(self._study):
            yield
        if not self._plan.keeps_order:
            self._course.sampler_seconds += time.process_time() - began

    # --- an epoch ---------------------------------------------------------------------------------------------------

    def _train(self, stack: list[_Running]) -> None:
        """Train one epoch of a stack, and take out the trials that end."""
        self._course.epochs += len(stack)  # they report together
        for running in stack:
            self._report(running)
        for running in stack:
            self._end_by_itself(running)
        left = [running for running in stack if not running.has_ended]
        for running, is_pruned in zip(left, self._prunes(left), strict=True):
            if is_pruned:
                self._end(running, TrialState.PRUNED)
            elif running.is_at_its_end:
                self._end_as_recorded(running)
        stack[:] = [running for running in stack if not running.has_ended]

    def _report(self, running: _Running) -> None:
        """Report the next value of a trial."""
        step, value = running.row.steps[running.epochs], running.row.curve[running.epochs]
        running.epochs += 1
        self._storage.set_trial_intermediate_value(running.trial.own_id, step, value)
        running.trial.cached.intermediate_values[step] = value
        self._course.note(value, self._table.sign)

    def _end_by_itself(self, running: _Running) -> None:
        """End a trial that the divergence guard ends, or that is through. A worker does not ask the pruner about it."""
        row = running.row
        if self._spec.guard.why(row.told[: running.epochs]):
            self._end(running, TrialState.PRUNED, is_diverged=True)
        elif running.is_at_its_end and row.is_whole and self._spec.is_declared:
            self._end_as_recorded(running)

    def _prunes(self, stack: Sequence[_Running]) -> list[bool]:
        """Return for each trial whether the pruner ends it. All are decided from one read."""
        if not stack:
            return []
        began = time.process_time()
        self._storage.set_known_finished(self._study_id, len(self._course.ends))
        decisions = array_pruners.decide(self._study, [running.trial.cached for running in stack])
        self._course.pruner_seconds += time.process_time() - began
        return decisions

    # --- a trial ends -----------------------------------------------------------------------------------------------

    def _end_as_recorded(self, running: _Running) -> None:
        """End a trial at the end of its curve."""
        self._end(running, _own_state(running.row), is_unknown=self._table.was_cut(running.row))

    def _end(
        self, running: _Running, state: TrialState, *, is_unknown: bool = False, is_diverged: bool = False
    ) -> None:
        """End a trial as a worker does."""
        running.has_ended = True
        value = self._value(running, state)
        values = None if value is None else [value]
        trial = running.trial
        with self._timed_sampler(running.sampler):
            frozen = trial.read_anew()
            look_anew(self._study)
            running.sampler.after_trial(bracket_of(self._study, frozen), frozen, state, values)
        is_diverged |= running.is_at_its_end and running.row.ending is Ending.DIVERGED and state == TrialState.PRUNED
        if is_diverged:
            self._storage.set_trial_user_attr(trial.own_id, DIVERGED_KEY, "in a replay")
        self._storage.set_trial_state_values(trial.own_id, state, values)
        if value is not None and state == TrialState.COMPLETE:
            self._course.note(value, self._table.sign)
        self._course.ends.append(
            TrialEnd(
                number=running.row.number,
                state=state,
                epochs=running.epochs,
                is_unknown=is_unknown,
                is_diverged=is_diverged,
            )
        )

    @staticmethod
    def _value(running: _Running, state: TrialState) -> float | None:
        """Return the value with which a trial ends: its own if it is COMPLETE, the last finite report if it is PRUNED."""
        if state == TrialState.PRUNED:
            told = reversed(running.row.curve[: running.epochs])
            return next((value for value in told if math.isfinite(value)), None)
        return running.row.value if state == TrialState.COMPLETE else None


def _fits(running: _Running, stack: Sequence[_Running]) -> bool:
    """Return whether a trial may join a stack. One whose key is not known joins others of which none is known."""
    return not stack or running.row.stack_key == stack[0].row.stack_key


def _own_state(row: Row) -> TrialState:
    """Return the state in which a trial ends at the end of its curve. One that was cut off ends as PRUNED."""
    of_ending = {Ending.COMPLETE: TrialState.COMPLETE, Ending.FAILED: TrialState.FAIL}
    return of_ending.get(row.ending, TrialState.PRUNED)


def _params(row: Row) -> list[dict[str, object]]:
    """Return a row's parameters as rows of Optuna's table."""
    return [
        {"param_name": name, "param_value": value, "distribution_json": distribution_to_json(distribution)}
        for (name, distribution), value in zip(row.space.items(), row.params, strict=True)
    ]
