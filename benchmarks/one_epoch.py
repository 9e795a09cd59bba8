"""1-Epoch, a rival in `search.py`: each configuration trains one epoch, then the best few train to their end.

The method is that of Egele et al., "Is One Epoch All You Need For Multi-Fidelity Hyperparameter Optimization?" (2023), with
random configurations. Rounds of SCREENED configurations repeat until the budget is spent, since the budgets here allow more
than one round. A table was recorded with random configurations, so an unused row of it is one.
"""

from __future__ import annotations

import heapq
import math
import random

from optuna.trial import TrialState

from hpo.lab import replay
from hpo.lab.plan import Plan
from hpo.lab.replay import Course, TrialEnd
from hpo.lab.table import Ending, Row
from hpo.spec import seeds

SCREENED = 81  # configurations of a round
KEPT = 3  # of them train to their end
Work = tuple[Row, int]  # a row, and its epoch to be trained


def run(plan: Plan, seed: int) -> Course:
    """Replay once, as `hpo.lab.replay.run` does with a sampler and a pruner."""
    return _OneEpoch(plan, seed).run()


class _OneEpoch:
    def __init__(self, plan: Plan, seed: int) -> None:
        self._table = plan.table
        self._budget = plan.epochs or 0
        self._speeds = replay.speeds(plan.workers, seed)
        self._unused = [plan.table.rows[place] for place in plan.table.whole]
        random.Random(seeds.derive(seed, "one-epoch")).shuffle(self._unused)
        self._begun = 0  # configurations of this round
        self._screened: list[Row] = []  # of these, after their first epoch
        self._kept: list[Row] = []  # wait for a worker
        self._course = Course()

    def run(self) -> Course:
        """Let all workers train until the budget is spent or no row is left."""
        idle = list(range(len(self._speeds)))
        queue: list[tuple[float, int]] = []  # when each worker has trained its epoch
        training: dict[int, Work] = {}  # by worker
        while self._course.epochs < self._budget:
            for worker in idle:  # a worker without work waits for the round's last first epoch
                if (work := training.get(worker) or self._next()) is not None:
                    training[worker] = work
                    heapq.heappush(queue, (self._course.seconds + work[0].seconds / self._speeds[worker], worker))
            idle = [worker for worker in idle if worker not in training]
            if not queue:
                break
            self._course.seconds, worker = heapq.heappop(queue)
            following = self._report(*training.pop(worker))
            if following is not None:
                training[worker] = following
            idle.append(worker)
        return self._course

    def _next(self) -> Work | None:
        if self._kept:
            return self._kept.pop(0), 1
        if self._begun == SCREENED or not self._unused:
            return None
        self._begun += 1
        self._course.distances.append(0.0)
        return self._unused.pop(), 0

    def _report(self, row: Row, place: int) -> Work | None:
        """Report an epoch of a row; return the row's next one if its worker goes on."""
        self._course.epochs += 1
        self._course.note(row.curve[place], self._table.sign)
        if place + 1 == len(row.curve):
            self._end(row, len(row.curve))
        if place == 0:
            self._screened.append(row)
            if len(self._screened) == self._begun and (self._begun == SCREENED or not self._unused):
                self._choose()
            return None
        return (row, place + 1) if place + 1 < len(row.curve) else None

    def _choose(self) -> None:
        """Keep the best rows of the round, and end the others."""
        longer = [row for row in self._screened if len(row.curve) > 1]
        ranked = sorted(longer, key=self._rank)
        self._kept = ranked[:KEPT]
        for row in ranked[KEPT:]:
            self._end(row, 1)
        self._screened, self._begun = [], 0

    def _rank(self, row: Row) -> float:
        value = -self._table.sign * row.curve[0]
        return math.inf if math.isnan(value) else value

    def _end(self, row: Row, epochs: int) -> None:
        is_complete = epochs == len(row.curve) and row.ending is Ending.COMPLETE
        if is_complete and row.value is not None:
            self._course.note(row.value, self._table.sign)
        state = TrialState.COMPLETE if is_complete else TrialState.PRUNED
        self._course.ends.append(TrialEnd(number=row.number, state=state, epochs=epochs))
